//! The guest's network, with real interfaces: the containers that make and look at them share it
//! with the agent.

use guest_protocol::protocols::agent::{
    ARPNeighbors, AddARPNeighborsRequest, ListInterfacesRequest, ListRoutesRequest, Routes,
    UpdateInterfaceRequest, UpdateRoutesRequest, VolumeStatsRequest,
};
use guest_protocol::protocols::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};
use ttrpc::Code;

use super::client::{Client, process, refusal, soon};

/// Runs a script that may change the network.
async fn net(client: &Client<'_>, id: &str, script: &str) -> String {
    let change = |spec: &mut _| {
        let capabilities = process(spec).Capabilities.mut_or_insert_default();
        for set in [
            &mut capabilities.Bounding,
            &mut capabilities.Effective,
            &mut capabilities.Permitted,
        ] {
            set.push("CAP_NET_ADMIN".into());
        }
    };
    let output = client.script(id, script, change).await;
    assert_eq!(
        (output.status, output.stderr.as_str()),
        (0, ""),
        "{script}: {output:?}"
    );
    output.stdout
}

fn address(address: &str, mask: &str) -> IPAddress {
    let family = if address.contains(':') {
        IPFamily::v6
    } else {
        IPFamily::v4
    };
    IPAddress {
        family: family.into(),
        address: address.into(),
        mask: mask.into(),
        ..Default::default()
    }
}

async fn update(client: &Client<'_>, interface: &Interface) -> ttrpc::Result<Interface> {
    let request = UpdateInterfaceRequest {
        interface: Some(interface.clone()).into(),
        ..Default::default()
    };
    client.rpc.agent.update_interface(soon(), &request).await
}

async fn listed(client: &Client<'_>, name: &str) -> Interface {
    let all = client
        .rpc
        .agent
        .list_interfaces(soon(), &ListInterfacesRequest::default())
        .await
        .unwrap()
        .Interfaces;
    all.iter()
        .find(|interface| interface.name == name)
        .unwrap_or_else(|| panic!("no {name} in {all:?}"))
        .clone()
}

async fn routes(client: &Client<'_>, routes: Vec<Route>) -> ttrpc::Result<Vec<Route>> {
    let routes = Routes {
        Routes: routes,
        ..Default::default()
    };
    let request = UpdateRoutesRequest {
        routes: Some(routes).into(),
        ..Default::default()
    };
    client
        .rpc
        .agent
        .update_routes(soon(), &request)
        .await
        .map(|routes| routes.Routes)
}

pub async fn an_interface_gets_its_name_and_addresses(client: &Client<'_>) {
    net(
        client,
        "net-make",
        "ip link add tmp0 address 02:00:00:00:00:11 type veth; ip link set veth0 up",
    )
    .await;
    let mut wanted = Interface {
        device: "eth0".into(),
        name: "pod0".into(),
        IPAddresses: vec![address("10.88.0.5", "16"), address("fd00:88::5", "64")],
        mtu: 1400,
        hwAddr: "02:00:00:00:00:11".into(),
        type_: "veth".into(),
        ..Default::default()
    };
    assert_eq!(update(client, &wanted).await.unwrap(), wanted);
    let got = listed(client, "pod0").await;
    assert_eq!(
        (
            got.mtu,
            got.hwAddr.as_str(),
            got.type_.as_str(),
            got.raw_flags
        ),
        (1400, "02:00:00:00:00:11", "veth", 0)
    );
    for address in &wanted.IPAddresses {
        assert!(got.IPAddresses.contains(address), "{got:?}");
    }
    // Usable at once: nothing is tentative, and it is up.
    // The link-local address and the carrier come and go by themselves.
    let look = "ip addr show dev pod0 scope global | grep inet; ip link show dev pod0 | grep -o UP | head -n 1";
    let text = net(client, "net-look", look).await;
    assert!(
        text.contains("inet 10.88.0.5/16 brd 10.88.255.255") && text.ends_with("UP\n"),
        "{text}"
    );
    let v6 = text
        .lines()
        .find(|line| line.contains("fd00:88::5/64"))
        .unwrap();
    assert!(!v6.contains("tentative"), "{text}");
    // Once more: nothing changes, and a route over it stays.
    let over = Route {
        dest: "192.0.2.0/24".into(),
        gateway: "10.88.0.1".into(),
        device: "pod0".into(),
        ..Default::default()
    };
    routes(client, vec![over.clone()]).await.unwrap();
    update(client, &wanted).await.unwrap();
    assert_eq!(net(client, "net-again", look).await, text);
    assert!(
        client
            .rpc
            .agent
            .list_routes(soon(), &ListRoutesRequest::default())
            .await
            .unwrap()
            .Routes
            .contains(&over)
    );
    // By name, with another hardware address, without ARP.
    wanted.hwAddr = "02:00:00:00:00:12".into();
    wanted.raw_flags = 0x80;
    update(client, &wanted).await.unwrap();
    let got = listed(client, "pod0").await;
    assert_eq!(
        (got.hwAddr.as_str(), got.raw_flags),
        ("02:00:00:00:00:12", 0x80)
    );
    assert!(got.IPAddresses.contains(&wanted.IPAddresses[1]), "{got:?}");
    net(client, "net-drop", "ip link del pod0").await;
}

pub async fn a_name_that_is_taken_is_swapped(client: &Client<'_>) {
    let make = "ip link add one address 02:00:00:00:00:21 type veth; ip link set one up; \
                ip link add two address 02:00:00:00:00:22 type veth";
    net(client, "swap-make", make).await;
    let wanted = Interface {
        name: "one".into(),
        hwAddr: "02:00:00:00:00:22".into(),
        ..Default::default()
    };
    update(client, &wanted).await.unwrap();
    assert_eq!(listed(client, "one").await.hwAddr, "02:00:00:00:00:22");
    assert_eq!(listed(client, "two").await.hwAddr, "02:00:00:00:00:21");
    let text = net(client, "swap-look", "ip link show two").await;
    assert!(text.lines().next().unwrap().contains(",UP"), "{text}");
    net(client, "swap-drop", "ip link del one; ip link del two").await;
}

pub async fn routes_and_neighbours_are_set(client: &Client<'_>) {
    net(
        client,
        "route-make",
        "ip link add way0 type veth; ip link set veth0 up",
    )
    .await;
    let interface = Interface {
        name: "way0".into(),
        IPAddresses: vec![address("10.99.1.2", "32"), address("fd00:99::2", "128")],
        ..Default::default()
    };
    update(client, &interface).await.unwrap();
    let route = |dest: &str, gateway: &str, family: IPFamily| Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "way0".into(),
        family: family.into(),
        ..Default::default()
    };
    // The default ones come first here, and need the others.
    let mut wanted = vec![
        route("", "10.99.1.1", IPFamily::v4),
        route("", "fd00:99::1", IPFamily::v6),
        Route {
            scope: 253,
            source: "10.99.1.2".into(),
            ..route("10.99.1.1/32", "", IPFamily::v4)
        },
        route("fd00:99::1/128", "", IPFamily::v6),
        Route {
            mtu: 1300,
            ..route("198.51.100.0/24", "10.99.1.1", IPFamily::v4)
        },
        Route {
            flags: 4,
            ..route("203.0.113.0/24", "172.31.0.1", IPFamily::v4)
        },
    ];
    for _ in 0..2 {
        let got = routes(client, wanted.clone()).await.unwrap();
        for route in &wanted {
            assert!(got.contains(route), "{route:?} is not in {got:?}");
        }
    }
    // Replaced, not added.
    wanted[4].mtu = 1200;
    let got = routes(client, vec![wanted[4].clone()]).await.unwrap();
    assert_eq!(
        got.iter()
            .filter(|route| route.dest == "198.51.100.0/24")
            .collect::<Vec<_>>(),
        [&wanted[4]]
    );
    let text = net(client, "route-look", "ip route; ip -6 route").await;
    assert!(
        text.contains("default via 10.99.1.1 dev way0")
            && text.contains("default via fd00:99::1 dev way0"),
        "{text}"
    );

    let neighbour = |ip: &str| ARPNeighbor {
        toIPAddress: Some(address(ip, "")).into(),
        device: "way0".into(),
        lladdr: "02:00:00:00:00:99".into(),
        state: 0x80,
        ..Default::default()
    };
    let list = vec![neighbour("10.99.1.1"), neighbour("fd00:99::1")];
    let neighbors = ARPNeighbors {
        ARPNeighbors: list,
        ..Default::default()
    };
    let request = AddARPNeighborsRequest {
        neighbors: Some(neighbors).into(),
        ..Default::default()
    };
    for _ in 0..2 {
        client
            .rpc
            .agent
            .add_arp_neighbors(soon(), &request)
            .await
            .unwrap();
    }
    let text = net(client, "neighbour-look", "ip neigh show dev way0").await;
    for ip in ["10.99.1.1", "fd00:99::1"] {
        let line = text
            .lines()
            .find(|line| line.starts_with(ip))
            .unwrap_or_else(|| panic!("{text}"));
        assert!(
            line.contains("02:00:00:00:00:99") && line.contains("PERMANENT"),
            "{text}"
        );
    }
    net(client, "route-drop", "ip link del way0").await;
}

pub async fn wrong_network_requests_say_what_is_wrong(client: &Client<'_>) {
    let interface = |name: &str| Interface {
        name: name.into(),
        ..Default::default()
    };
    let bad = [
        Interface {
            hwAddr: "nonsense".into(),
            ..interface("lo")
        },
        Interface {
            IPAddresses: vec![address("10.0.0.1", "255.0.0.0")],
            ..interface("lo")
        },
        Interface {
            IPAddresses: vec![address("10.0.0.256", "8")],
            ..interface("lo")
        },
        Interface {
            devicePath: "zz".into(),
            ..interface("lo")
        },
        interface("a-name-that-is-too-long"),
    ];
    for interface in bad {
        let (code, text) = refusal(update(client, &interface).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    let (_, text) = refusal(update(client, &interface("nowhere")).await);
    assert_eq!(
        text,
        "the guest has no interface with address \"\" or name \"nowhere\""
    );
    let (_, text) = refusal(
        update(
            client,
            &Interface {
                devicePath: "1e/1f".into(),
                ..interface("lo")
            },
        )
        .await,
    );
    assert_eq!(text, "no network device at PCI path 1e/1f within 3s");
    let route = Route {
        dest: "10.0.0.0/8".into(),
        device: "nowhere".into(),
        ..Default::default()
    };
    let (_, text) = refusal(routes(client, vec![route]).await);
    assert_eq!(text, "the guest has no interface \"nowhere\"");
    let unreachable = Route {
        gateway: "192.0.2.1".into(),
        device: "lo".into(),
        ..Default::default()
    };
    let (_, text) = refusal(routes(client, vec![unreachable]).await);
    assert!(
        text.starts_with("add route 0.0.0.0/0 over 192.0.2.1 on \"lo\": "),
        "{text}"
    );
}

pub async fn volume_stats_are_those_of_the_file_system(client: &Client<'_>) {
    let stats = async |path: &str| {
        let request = VolumeStatsRequest {
            volume_guest_path: path.into(),
            ..Default::default()
        };
        client.rpc.agent.get_volume_stats(soon(), &request).await
    };
    let usage = stats("/run").await.unwrap().usage;
    let units: Vec<i32> = usage.iter().map(|usage| usage.unit.value()).collect();
    assert_eq!(units, [1, 2]);
    for usage in usage {
        assert!(
            usage.total > 0 && usage.available > 0 && usage.used <= usage.total,
            "{usage:?}"
        );
    }
    let (_, text) = refusal(stats("/no/such").await);
    assert_eq!(
        text,
        "stat file system of /no/such: no such file or directory"
    );
}

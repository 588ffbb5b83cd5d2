//! The QMP commands in use, as types: arguments, name and what they return. Each is held against
//! every recorded QEMU (`recordings/`).

use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value, json};

/// A command: its fields are its arguments.
pub trait Command: Serialize {
    /// As QEMU calls it.
    const NAME: &'static str;
    /// What it returns; `IgnoredAny` where nothing is said.
    type Reply: DeserializeOwned;
}

/// What is told of each command in use; for tests.
#[cfg(test)]
pub(crate) trait Visit {
    /// The next one, with names and types of its arguments as they are here; or none if they are
    /// whatever the caller says.
    fn command<C: Command>(&mut self, arguments: Option<&[(&str, &str)]>);
}

/// Commands with arguments of their own in the first list, in the second those of which every
/// driver, type or backend has others.
macro_rules! commands {
    (
        $(
            $(#[$doc:meta])*
            $name:ident { $($field:ident: $type:ty),* } = $wire:literal -> $reply:ty;
        )*
        ---
        $($(#[$open_doc:meta])* $open_name:ident = $open_wire:literal;)*
    ) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Serialize)]
            #[serde(rename_all = "kebab-case")]
            pub(crate) struct $name { $(pub $field: $type),* }
            impl Command for $name {
                const NAME: &'static str = $wire;
                type Reply = $reply;
            }
        )*
        $(
            $(#[$open_doc])*
            #[derive(Debug, Serialize)]
            pub(crate) struct $open_name(pub Map<String, Value>);
            impl Command for $open_name {
                const NAME: &'static str = $open_wire;
                type Reply = IgnoredAny;
            }
        )*

        /// Shows `visitor` every command in use.
        #[cfg(test)]
        pub(crate) fn each(visitor: &mut impl Visit) {
            $(visitor.command::<$name>(Some(&[$((stringify!($field), stringify!($type))),*]));)*
            $(visitor.command::<$open_name>(None);)*
        }
    };
}

commands! {
    /// Ends the negotiation after the greeting.
    QmpCapabilities {} = "qmp_capabilities" -> IgnoredAny;
    /// Lets the CPUs run.
    Cont {} = "cont" -> IgnoredAny;
    /// Ends QEMU.
    Quit {} = "quit" -> IgnoredAny;
    /// Takes a descriptor that comes with the line and gives it a name.
    Getfd { fdname: String } = "getfd" -> IgnoredAny;
    /// Closes a named descriptor that no device took.
    Closefd { fdname: String } = "closefd" -> IgnoredAny;
    /// Takes a descriptor that comes with the line, for `/dev/fdset/<number>`.
    AddFd {} = "add-fd" -> FdSet;
    /// Gives up such a number; the descriptor is closed when nothing uses it.
    RemoveFd { fdset_id: u64 } = "remove-fd" -> IgnoredAny;
    /// Adds a character device.
    ChardevAdd { id: String, backend: Value } = "chardev-add" -> IgnoredAny;
    /// Removes one that no device uses.
    ChardevRemove { id: String } = "chardev-remove" -> IgnoredAny;
    /// Removes a block node that no device uses.
    BlockdevDel { node_name: String } = "blockdev-del" -> IgnoredAny;
    /// Tells a block node, and with it the guest, how large it is now.
    BlockResize { node_name: String, size: u64 } = "block_resize" -> IgnoredAny;
    /// Removes a network back end that no device uses.
    NetdevDel { id: String } = "netdev_del" -> IgnoredAny;
    /// Removes an object that no device uses.
    ObjectDel { id: String } = "object-del" -> IgnoredAny;
    /// Asks the guest to let go of a device. The end of it is an event.
    DeviceDel { id: String } = "device_del" -> IgnoredAny;
    /// One property of an object.
    QomGet { path: String, property: String } = "qom-get" -> Value;
    /// Sets one.
    QomSet { path: String, property: String, value: Value } = "qom-set" -> IgnoredAny;
    /// Every place for a CPU, with what is in it.
    QueryHotpluggableCpus {} = "query-hotpluggable-cpus" -> Vec<HotpluggableCpu>;
    /// Children and properties of an object.
    QomList { path: String } = "qom-list" -> Vec<Named>;
    /// The settings of a type; an error if there is none of that name.
    QomListProperties { typename: String } = "qom-list-properties" -> Vec<Named>;
    /// Every QMP command the binary knows.
    QueryCommands {} = "query-commands" -> Vec<Named>;
    /// Command line options with their settings.
    QueryCommandLineOptions {} = "query-command-line-options" -> Vec<CommandLineOption>;
    /// State of a virtio device. Unstable by name; since 7.2.
    QueryVirtioStatus { path: String } = "x-query-virtio-status" -> VirtioStatus;
    ---
    /// Adds a device; every driver has arguments of its own. Values must have the type that QEMU
    /// gives them: from 9.2 on a number in quotes is refused.
    DeviceAdd = "device_add";
    /// Adds a block node.
    BlockdevAdd = "blockdev-add";
    /// Adds a network back end; every type has arguments of its own.
    NetdevAdd = "netdev_add";
    /// Adds an object; every type has arguments of its own.
    ObjectAdd = "object-add";
}

/// What `add-fd` returns.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdSet {
    /// The number that QEMU chose.
    pub fdset_id: u64,
}

/// The socket of a vhost-user device: a connected descriptor that `getfd` gave this name.
pub(crate) fn connected_socket(fdname: &str) -> Value {
    json!({"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": fdname}},
        "server": false}})
}

/// An item of a list of which only the name counts.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Named {
    pub name: String,
}

/// An item of `query-hotpluggable-cpus`.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct HotpluggableCpu {
    /// The arguments that put a CPU there.
    pub props: Map<String, Value>,
    #[serde(rename = "type")]
    pub driver: String,
    /// The CPU, if there is one.
    pub qom_path: Option<String>,
}

impl HotpluggableCpu {
    /// Where it is, in the order in which places are filled.
    pub(crate) fn place(&self) -> [Option<u64>; 5] {
        ["socket-id", "die-id", "module-id", "core-id", "thread-id"]
            .map(|id| self.props.get(id)?.as_u64())
    }
}

/// An item of `query-command-line-options`.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct CommandLineOption {
    pub option: String,
}

/// The part of `x-query-virtio-status` in use.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct VirtioStatus {
    status: VirtioDeviceStatus,
}

#[derive(Debug, serde::Deserialize)]
struct VirtioDeviceStatus {
    statuses: Vec<String>,
}

impl VirtioStatus {
    /// Whether the guest's driver said that it is up.
    pub(crate) fn driver_ok(&self) -> bool {
        self.status
            .statuses
            .iter()
            .any(|status| status.contains("DRIVER_OK"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_names_and_arguments_that_qemu_wants() {
        let line = |text: Vec<u8>| String::from_utf8(text).unwrap();
        let encoded = super::super::codec::encode(
            BlockdevDel::NAME,
            &BlockdevDel {
                node_name: "blk0".into(),
            },
            3,
        )
        .unwrap();
        assert_eq!(
            line(encoded),
            "{\"execute\":\"blockdev-del\",\"arguments\":{\"node-name\":\"blk0\"},\"id\":3}\r\n"
        );
        let encoded = super::super::codec::encode(Cont::NAME, &Cont {}, 4).unwrap();
        assert_eq!(
            line(encoded),
            "{\"execute\":\"cont\",\"arguments\":{},\"id\":4}\r\n"
        );
    }

    #[test]
    fn driver_ok_is_found_among_the_long_texts() {
        let text = r#"{"name": "vhost-vsock", "status": {"statuses": ["VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready"]}}"#;
        assert!(
            serde_json::from_str::<VirtioStatus>(text)
                .unwrap()
                .driver_ok()
        );
        assert!(
            !serde_json::from_str::<VirtioStatus>(r#"{"status": {"statuses": ["X_ACKNOWLEDGE"]}}"#)
                .unwrap()
                .driver_ok()
        );
    }
}

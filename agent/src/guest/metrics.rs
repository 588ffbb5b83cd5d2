//! Figures of the agent and of the machine as Prometheus reads them, under the names and in the
//! units that Kata's agent has for them.

use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often the figures were asked for.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// Names of the columns of /proc/stat (proc(5)), in their order.
const CPU_TIMES: [&str; 10] = [
    "user",
    "nice",
    "system",
    "idle",
    "iowait",
    "irq",
    "softirq",
    "steal",
    "guest",
    "guest_nice",
];

/// Lines of /proc/meminfo and their names here.
const MEMORY: [(&str, &str); 9] = [
    ("MemTotal", "mem_total"),
    ("MemFree", "mem_free"),
    ("MemAvailable", "mem_available"),
    ("Buffers", "buffers"),
    ("Cached", "cached"),
    ("AnonPages", "anon_pages"),
    ("Shmem", "shmem"),
    ("Slab", "slab"),
    ("KernelStack", "kernel_stack"),
];

/// Columns of /proc/net/dev and their names here.
const NETWORK: [(usize, &str); 8] = [
    (0, "recv_bytes"),
    (1, "recv_packets"),
    (2, "recv_errs"),
    (3, "recv_drop"),
    (8, "sent_bytes"),
    (9, "sent_packets"),
    (10, "sent_errs"),
    (11, "sent_drop"),
];

/// All figures, as text. What cannot be read is left out.
pub fn text() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let mut out = Exposition(String::new());
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed) + 1;
    out.family(
        "kata_agent_scrape_count",
        "counter",
        "Times the figures were asked for",
    );
    out.value("kata_agent_scrape_count", "", scrapes);
    agent(&mut out, &read("/proc/self/stat"));
    load(&mut out, &read("/proc/loadavg"));
    cpu_time(&mut out, &read("/proc/stat"));
    memory(&mut out, &read("/proc/meminfo"));
    network(&mut out, &read("/proc/net/dev"));
    out.0
}

/// Text in Prometheus' exposition format.
struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// The agent's own, from /proc/self/stat.
fn agent(out: &mut Exposition, stat: &str) {
    // The name of the program, which may have anything in it, ends with the last parenthesis.
    let columns: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace())
        .into_iter()
        .flatten()
        .map(|column| column.parse().unwrap_or(0))
        .collect();
    // Numbers of proc(5), where the state behind the name is 3.
    let column = |number: usize| columns.get(number - 3).copied().unwrap_or(0);
    // SAFETY: sysconf has no preconditions.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    for (name, help, value) in [
        (
            "kata_agent_total_time",
            "Time on a CPU, in clock ticks",
            column(14) + column(15),
        ),
        ("kata_agent_total_vm", "Virtual memory in bytes", column(23)),
        (
            "kata_agent_total_rss",
            "Resident memory in bytes",
            column(24).saturating_mul(page),
        ),
    ] {
        out.family(name, "gauge", help);
        out.value(name, "", value);
    }
}

fn load(out: &mut Exposition, loadavg: &str) {
    let name = "kata_guest_load";
    out.family(name, "gauge", "Load of the guest");
    for (item, value) in ["load1", "load5", "load15"]
        .iter()
        .zip(loadavg.split_whitespace())
    {
        out.value(name, &format!("{{item=\"{item}\"}}"), value);
    }
}

fn cpu_time(out: &mut Exposition, stat: &str) {
    let name = "kata_guest_cpu_time";
    out.family(name, "gauge", "Time of the guest's CPUs, in clock ticks");
    for line in stat.lines() {
        let mut columns = line.split_whitespace();
        let Some(cpu) = columns.next().and_then(|first| first.strip_prefix("cpu")) else {
            continue;
        };
        let cpu = if cpu.is_empty() { "total" } else { cpu };
        for (item, value) in CPU_TIMES.iter().zip(columns) {
            out.value(name, &format!("{{cpu=\"{cpu}\",item=\"{item}\"}}"), value);
        }
    }
}

fn memory(out: &mut Exposition, meminfo: &str) {
    let name = "kata_guest_meminfo";
    out.family(name, "gauge", "Memory of the guest, in bytes");
    for line in meminfo.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let item = MEMORY.iter().find(|(line, _)| *line == key);
        let kib = value.trim().trim_end_matches(" kB").parse::<u64>();
        if let (Some((_, item)), Ok(kib)) = (item, kib) {
            out.value(
                name,
                &format!("{{item=\"{item}\"}}"),
                kib.saturating_mul(1024),
            );
        }
    }
}

fn network(out: &mut Exposition, dev: &str) {
    let name = "kata_guest_netdev_stat";
    out.family(name, "gauge", "Network interfaces of the guest");
    // Two lines are a heading.
    for line in dev.lines().skip(2) {
        let Some((interface, columns)) = line.split_once(':') else {
            continue;
        };
        // The kernel lets a name have a quote in it.
        let interface = interface.trim().replace('\\', "\\\\").replace('"', "\\\"");
        let columns: Vec<&str> = columns.split_whitespace().collect();
        for (column, item) in NETWORK {
            if let Some(value) = columns.get(column) {
                let labels = format!("{{interface=\"{interface}\",item=\"{item}\"}}");
                out.value(name, &labels, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(fill: impl Fn(&mut Exposition)) -> Vec<String> {
        let mut out = Exposition(String::new());
        fill(&mut out);
        let lines = out.0.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    }

    #[test]
    fn figures_have_the_names_and_units_of_katas_agent() {
        let stat = "7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 5 4096000 2 0";
        assert_eq!(
            lines(|out| agent(out, stat))[..2],
            ["kata_agent_total_time 42", "kata_agent_total_vm 4096000"]
        );
        assert_eq!(
            lines(|out| cpu_time(out, "cpu  9 8\ncpu3 1 2\nintr 5\n")),
            [
                "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} 9",
                "kata_guest_cpu_time{cpu=\"total\",item=\"nice\"} 8",
                "kata_guest_cpu_time{cpu=\"3\",item=\"user\"} 1",
                "kata_guest_cpu_time{cpu=\"3\",item=\"nice\"} 2",
            ]
        );
        assert_eq!(
            lines(|out| memory(out, "MemTotal:   4 kB\nHugePages_Total: 1\n")),
            ["kata_guest_meminfo{item=\"mem_total\"} 4096"]
        );
        let dev = "heading\nheading\n  lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n e\"0:7\n";
        let network = lines(|out| network(out, dev));
        assert_eq!(
            network[4],
            "kata_guest_netdev_stat{interface=\"lo\",item=\"sent_bytes\"} 9"
        );
        assert!(network[8].contains("interface=\"e\\\"0\""), "{network:?}");
        assert_eq!(lines(|out| agent(out, "")).len(), 3);
    }

    #[test]
    fn every_figure_of_this_machine_is_a_line_that_prometheus_takes() {
        let text = text();
        assert!(text.contains("kata_guest_load{item=\"load15\"} "), "{text}");
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}

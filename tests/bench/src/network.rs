//! The network of a pod on a CNI bridge, beside the same container of runc: how fast it is, what it costs, and what it adds to a start.
//!
//! ```text
//!  this program ── bridge ── veth ══ the pod's network namespace ═══ runc's container: probe speed
//!     client                          └─ eth0 ⇄ tap ── caisson-vmm ── the pod's machine: probe speed
//! ```
//!
//! The client's clock counts. On the exact host a millisecond is a million instructions of everything that runs there: both ends, the
//! host's kernel, the monitor and the guest. Exits and interrupts are those that KVM counts for all machines, and only the one
//! that is measured runs; a notification of a queue is an exit, too.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    Host, Runtime, Setup,
    host::Image,
    network::{self, Netns, PLUGINS},
    pod::Container,
    process::Running,
    wait::long,
};
use caisson_e2e_probe::speed::{Client, Task};

use crate::{
    figures::{Pair, Report},
    progress, runtimes,
};

/// Where the server in the pod listens.
const PORT: u16 = 7000;
/// The MiB of a stream.
const STREAM_MIB: u64 = 32;
/// The bytes that fill a packet of 1500 bytes.
const FULL: u16 = 1472;
/// The bytes of a small datagram.
const SMALL: u16 = 64;
/// Datagrams of each size.
const DATAGRAMS: u64 = 4096;
/// Round trips.
const ANSWERS: u64 = 300;
/// What KVM counts.
const KVM: &str = "/sys/kernel/debug/kvm";

/// What is moved: a figure's name, how a picture calls it, the task, bytes of a datagram, and the count of bytes or datagrams.
pub const MOVES: [(&str, &str, Task, u16, u64); 6] = [
    ("tcp_to_pod", "TCP to the pod", Task::StreamTo, 0, STREAM_MIB << 20),
    ("tcp_from_pod", "TCP from the pod", Task::StreamFrom, 0, STREAM_MIB << 20),
    ("udp_to_pod", "UDP to the pod", Task::DatagramsTo, FULL, DATAGRAMS),
    ("udp_from_pod", "UDP from the pod", Task::DatagramsFrom, FULL, DATAGRAMS),
    ("small_to_pod", "64 bytes to the pod", Task::DatagramsTo, SMALL, DATAGRAMS),
    ("small_from_pod", "64 bytes from the pod", Task::DatagramsFrom, SMALL, DATAGRAMS),
];

/// The plugins and programs that the nested host needs for this.
pub fn programs() -> Vec<std::path::PathBuf> {
    let plugins = ["bridge", "host-local", "loopback"].map(|plugin| Path::new(PLUGINS).join(plugin));
    plugins.into_iter().chain(["ip", "nsenter"].map(Into::into)).collect()
}

/// Measures everything here; a pod's start `runs` times, all else once: the exact host repeats itself.
///
/// # Errors
/// If a pod fails, or a datagram is lost.
pub fn all(runs: u32, only_runc: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut host = Host::start(Runtime::Runc, Setup::default().image(Image::Probe).own_network());
    fs::create_dir_all(KVM).ok();
    if !Path::new(KVM).exists() {
        let mounted = std::process::Command::new("mount").args(["-t", "debugfs", "none", "/sys/kernel/debug"]).status();
        ensure!(mounted.context("mount debugfs")?.success(), "cannot mount debugfs, where KVM counts exits");
    }
    let runtimes = runtimes(only_runc);
    let mut netns = Netns::new(&host, "pod");
    let added = netns.attach("eth0", &[network::bridge(&host, 1)]);
    let [address, _] = network::ips(&added);
    let address = SocketAddr::new(address.parse().with_context(|| format!("the pod's address {address:?}"))?, PORT);
    host.count_anew();

    let mut figures = Moved::default();
    for (&runtime, round) in runtimes.iter().zip(1..) {
        progress("a pod's network", round, runtimes.len() as u32);
        host.runtime = runtime;
        moves(&host, &netns, address, &mut figures)?;
    }
    figures.report(&mut report);
    starts(&mut report, &mut host, &netns, runtimes, runs)?;
    drop(netns);
    host.finish();
    Ok(report)
}

/// What each of [`MOVES`] took, and the round trips.
#[derive(Default)]
struct Moved {
    times: Vec<Pair>,
    kvm: Vec<Kvm>,
    /// Mean bytes of the packets that crossed the pair of interfaces, as large as the host's kernel passed them on.
    sizes: Vec<(Runtime, f64)>,
    /// The middle and the slowest hundredth.
    answers: [Pair; 2],
    answers_kvm: Kvm,
}

/// Exits from machines and interrupts for them so far, or between two times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kvm {
    exits: u64,
    interrupts: u64,
}

impl Kvm {
    fn now() -> Result<Self> {
        let read = |name: &str| -> Result<u64> {
            let path = Path::new(KVM).join(name);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            text.trim().parse().with_context(|| format!("{} has {text:?}", path.display()))
        };
        Ok(Self { exits: read("exits")?, interrupts: read("irq_injections")? })
    }

    fn since(self, before: Self) -> Self {
        let less = u64::saturating_sub;
        Self { exits: less(self.exits, before.exits), interrupts: less(self.interrupts, before.interrupts) }
    }

    /// Adds two figures of `count` things.
    fn report(self, report: &mut Report, name: &str, count: u64, of: &str) {
        report.add(&format!("{name}_exits_per_{of}"), &[self.exits as f64 / count as f64], "");
        report.add(&format!("{name}_interrupts_per_{of}"), &[self.interrupts as f64 / count as f64], "");
    }
}

fn moves(host: &Host, netns: &Netns, address: SocketAddr, moved: &mut Moved) -> Result<()> {
    let name = format!("speed-{}", host.runtime as usize);
    let [flag, value] = netns.flags();
    let container = host.container(&name).flag(flag).flag(value);
    let mut running = Running::start(&mut container.command(&["probe", "speed", &PORT.to_string()]));
    running.close_stdin();
    running.stdout.wait_for("the server", long(), |text| text.contains("listening").then_some(()));
    let mut client = Client::connect(address).with_context(|| format!("connect to {address}"))?;
    moved.times.resize_with(MOVES.len(), Pair::default);
    for ((name, _, task, size, count), times) in MOVES.into_iter().zip(&mut moved.times) {
        // A connection's window opens, and neighbours are found, before anything counts.
        client.run(task, size, count / 16, || ()).with_context(|| format!("{name}, before it counts"))?;
        let crossed = crossed(name)?;
        let (before, mut clock) = (Kvm::now()?, Vec::with_capacity(2));
        client.run(task, size, count, || clock.push(Instant::now())).with_context(|| name.to_owned())?;
        if host.runtime == Runtime::Caisson {
            moved.kvm.push(Kvm::now()?.since(before));
        }
        let [bytes, packets] = self::crossed(name)?.map(|count| count as f64);
        let [bytes_before, packets_before] = crossed.map(|count| count as f64);
        moved.sizes.push((host.runtime, (bytes - bytes_before) / (packets - packets_before)));
        times.push(host.runtime, spans(&clock).into_iter().sum());
    }
    let (before, mut clock) = (Kvm::now()?, Vec::with_capacity(ANSWERS as usize + 1));
    client.run(Task::Answers, 0, ANSWERS, || clock.push(Instant::now())).context("round trips")?;
    if host.runtime == Runtime::Caisson {
        moved.answers_kvm = Kvm::now()?.since(before);
    }
    let mut spans = spans(&clock);
    spans.sort_unstable();
    for (part, times) in [50, 99].into_iter().zip(&mut moved.answers) {
        times.push(host.runtime, percentile(&spans, part).context("no round trip was timed")?);
    }
    drop(client);
    let finished = caisson_e2e::Finished::of(running, long());
    ensure!(finished.code == Some(0), "{name}: {finished:?}");
    host.expect_nothing_left();
    Ok(())
}

impl Moved {
    fn report(&self, report: &mut Report) {
        for ((name, _, _, size, count), times) in MOVES.into_iter().zip(&self.times) {
            let bytes = if size == 0 { count } else { count * u64::from(size) };
            let mib = bytes as f64 / f64::from(1 << 20);
            if size == SMALL {
                times.report_as(report, name, "packets/s", |ms| count as f64 * 1000.0 / ms);
            } else {
                times.report_as(report, name, "MiB/s", |ms| mib * 1000.0 / ms);
                times.report_as(report, &format!("{name}_instructions_per_mib"), "M", |ms| ms / mib);
            }
        }
        for ((name, _, _, size, count), kvm) in MOVES.into_iter().zip(&self.kvm) {
            match size {
                0 => kvm.report(report, name, count >> 20, "mib"),
                _ => kvm.report(report, name, count, "packet"),
            }
        }
        for (index, (runtime, size)) in self.sizes.iter().enumerate() {
            let (name, ..) = MOVES[index % MOVES.len()];
            let runtime = if *runtime == Runtime::Caisson { "caisson" } else { "runc" };
            report.add(&format!("{name}_packet_{runtime}_bytes"), &[*size], "bytes");
        }
        for (part, times) in ["p50", "p99"].into_iter().zip(&self.answers) {
            times.report(report, &format!("round_trip_{part}"), "ratio");
        }
        if !self.kvm.is_empty() {
            self.answers_kvm.report(report, "round_trip", ANSWERS, "packet");
        }
    }
}

/// `ctr run --rm` of `echo` in the namespace that is ready, and in a new one without any interface.
fn starts(report: &mut Report, host: &mut Host, netns: &Netns, runtimes: &[Runtime], runs: u32) -> Result<()> {
    // Without and with a network.
    let (mut starts, mut wholes): ([Pair; 2], [Pair; 2]) = Default::default();
    // The first round warms the page cache, as everywhere.
    for round in 0..=runs {
        progress("ctr run with a network", round, runs);
        for &runtime in runtimes {
            host.runtime = runtime;
            for (index, flags) in [Vec::new(), netns.flags().to_vec()].into_iter().enumerate() {
                let container = host.container(&format!("start-{}-{index}-{round}", runtime as usize));
                let container = flags.into_iter().fold(container, |container, flag| container.flag(flag));
                let [start, whole] = echo(host, &container)?;
                if round > 0 {
                    starts[index].push(runtime, start);
                    wholes[index].push(runtime, whole);
                }
            }
        }
    }
    for ([without, with], what) in [(starts, "start"), (wholes, "ctr_run")] {
        without.report(report, &format!("{what}_without_network"), "ratio");
        with.report(report, &format!("{what}_with_network"), "ratio");
        with.minus(&without).report_ms(report, &format!("network_adds_to_{what}"));
    }
    Ok(())
}

/// From the start of `ctr run --rm` to the program's output, and to the end of `ctr`.
fn echo(host: &Host, container: &Container) -> Result<[Duration; 2]> {
    let mut command = container.command(&["echo", "hello"]);
    let begin = Instant::now();
    let mut running = Running::start(&mut command);
    running.stdout.wait_for("the output", long(), |text| text.contains("hello\n").then_some(()));
    let start = begin.elapsed();
    let status = running.wait(long());
    let whole = begin.elapsed();
    ensure!(status.success(), "{}: {status}", container.id);
    // What containerd still clears away must not fall into the next run's time.
    host.expect_nothing_left();
    std::thread::sleep(Duration::from_millis(200));
    Ok([start, whole])
}

/// Bytes and packets so far, in the direction of a move, of the host's end of the pair of interfaces.
fn crossed(name: &str) -> Result<[u64; 2]> {
    let links = network::ip("-s -j link show type veth");
    let links: serde_json::Value = serde_json::from_str(&links).with_context(|| format!("read {links:?}"))?;
    let direction = if name.ends_with("to_pod") { "tx" } else { "rx" };
    let count =
        |what: &str| links[0]["stats64"][direction][what].as_u64().with_context(|| format!("no {what} in {links}"));
    Ok([count("bytes")?, count("packets")?])
}

fn spans(clock: &[Instant]) -> Vec<Duration> {
    clock.windows(2).map(|pair| pair.iter().skip(1).zip(pair).map(|(end, begin)| *end - *begin).sum()).collect()
}

/// The smallest of the sorted values that is no smaller than `part` hundredths of them.
fn percentile(sorted: &[Duration], part: usize) -> Option<Duration> {
    sorted.get((sorted.len() * part).div_ceil(100).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<Duration> = (1..=300).map(Duration::from_millis).collect();
        assert_eq!(percentile(&values, 50), Some(Duration::from_millis(150)));
        assert_eq!(percentile(&values, 99), Some(Duration::from_millis(297)));
        assert_eq!(percentile(&values[..1], 50), Some(Duration::from_millis(1)));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn spans_are_between_neighbours() {
        let begin = Instant::now();
        let clock = [0, 3, 10].map(|ms| begin + Duration::from_millis(ms));
        assert_eq!(spans(&clock), [Duration::from_millis(3), Duration::from_millis(7)]);
        assert!(spans(&clock[..1]).is_empty());
    }
}

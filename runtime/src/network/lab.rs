//! For tests: two network namespaces of this machine, a host's and a pod's, and iproute2 in them. Needs root.

use std::{fs::File, os::fd::AsRawFd, process::Command, thread, time::Duration};

use caisson_netlink::{Socket, state::State};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::{Namespace, Settings};

pub(super) const SETTINGS: Settings = Settings { queues: 1, cards: 8, descriptors: 56 };
/// No step takes this long unless something hangs.
pub(super) const LIMIT: Duration = Duration::from_secs(30);

pub(super) struct Space {
    file: File,
    namespace: Namespace,
}

impl Space {
    /// A new one, with its loopback interface up.
    pub fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests run as root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let file = made.join().unwrap();
        let space = Self { namespace: Namespace::from(file.try_clone().unwrap()), file };
        space.ip("link set lo up");
        space
    }

    pub fn namespace(&self) -> Namespace {
        self.namespace.clone()
    }

    /// What `ip` and `tc` take for it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(work).unwrap()
    }

    fn command(&self, program: &str, arguments: &str) -> String {
        let output = self.run(|| Command::new(program).args(arguments.split(' ')).output().expect("iproute2"));
        assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ip(&self, arguments: &str) {
        self.command("ip", arguments);
    }

    pub fn tc(&self, arguments: &str) {
        self.command("tc", arguments);
    }

    /// What `ip -j -d` or `tc -j` shows.
    pub fn show(&self, program: &str, arguments: &str) -> Vec<Value> {
        let text = self.command(program, &format!("-j -d {arguments}"));
        if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
    }

    pub fn names(&self) -> Vec<String> {
        self.show("ip", "link show").iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
    }

    pub fn state(&self) -> State {
        self.run(|| State::read(&mut Socket::open().unwrap()).unwrap())
    }

    /// The kinds of queueing disciplines and filters on the way in of an interface.
    pub fn traffic(&self, interface: &str) -> (bool, usize) {
        let qdiscs = self.show("tc", &format!("qdisc show dev {interface}"));
        let clsact = qdiscs.iter().any(|qdisc| qdisc["kind"] == "clsact");
        let filters =
            if clsact { self.show("tc", &format!("filter show dev {interface} ingress")) } else { Vec::new() };
        (clsact, filters.iter().filter(|filter| !filter["options"]["actions"].is_null()).count())
    }
}

/// A host and a pod whose `eth0` is joined to the host's `veth0`, as the plugin bridge leaves it.
pub(super) fn pod() -> (Space, Space) {
    let (host, pod) = (Space::new(), Space::new());
    host.ip("link add veth0 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02");
    host.ip(&format!("link set eth0 netns {}", pod.path()));
    host.ip("address add 10.0.0.1/24 dev veth0");
    host.ip("link set veth0 up");
    pod.ip("address add 10.0.0.2/24 broadcast 10.0.0.255 dev eth0");
    pod.ip("link set eth0 up");
    pod.ip("route add default via 10.0.0.1");
    (host, pod)
}

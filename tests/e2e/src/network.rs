//! Networks for pods: network namespaces and the real plugins, called as containerd's CRI plugin calls them (the program, its
//! environment, the configuration on its standard input; <https://www.cni.dev/docs/spec/>).
//!
//! ```text
//! Netns::new ─► attach("eth0", plugins) ─► `ctr run --with-ns network:PATH` ─► drop: DEL of each, then the namespace goes
//! ```

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{Host, environment::bin_dir, process::Running};

/// Where Debian's containernetworking-plugins has the plugins.
pub const PLUGINS: &str = "/usr/lib/cni";
/// The version of the protocol that all of them know.
const VERSION: &str = "0.4.0";

/// Moves the calling thread, and with it what it starts, into a new network namespace whose loopback interface is up.
///
/// # Panics
/// Without root's rights.
pub fn enter_new() {
    // SAFETY: unshare takes a number, and no descriptor of this thread becomes another's by a new network namespace.
    let entered = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(entered, 0, "cannot make a network namespace: {}", std::io::Error::last_os_error());
    ip("link set lo up");
}

/// Runs `ip` with these words in the test's network namespace.
///
/// # Panics
/// If it fails.
pub fn ip(words: &str) -> String {
    output(Command::new("ip").args(words.split(' ')))
}

/// Runs a program to its end; its standard output.
///
/// # Panics
/// If it fails.
pub fn output(command: &mut Command) -> String {
    output_of(command, None)
}

fn output_of(command: &mut Command, input: Option<&str>) -> String {
    let call = format!("{command:?}");
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot start {call}: {error}"));
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(input.as_bytes()).unwrap_or_else(|error| panic!("{call} does not take its input: {error}"));
    }
    let ended = child.wait_with_output().unwrap_or_else(|error| panic!("{call}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{call} failed ({}): {out}{err}", ended.status);
    out.into_owned()
}

/// The usual bridge with an IPv4 and an IPv6 network and default routes, number `net` of the test's.
pub fn bridge(host: &Host, net: u8) -> Value {
    json!({
        "type": "bridge", "name": format!("net{net}"), "bridge": format!("br{net}"), "isDefaultGateway": true,
        "ipMasq": false, "hairpinMode": true,
        "ipam": range(host, net),
    })
}

/// host-local's part of a configuration: `10.88.NET.0/24` and `fd00:88:NET::/64`, and default routes.
pub fn addresses(host: &Host, net: u8) -> Value {
    let mut addresses = range(host, net);
    addresses["routes"] = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
    addresses
}

/// The same without routes.
pub fn range(host: &Host, net: u8) -> Value {
    json!({
        "type": "host-local", "dataDir": host.directory().join("addresses"),
        "ranges": [
            [{ "subnet": format!("10.88.{net}.0/24") }],
            [{ "subnet": format!("fd00:88:{net}::/64") }],
        ],
    })
}

/// The command with `configuration` (a list) in the place where programs look for it, and the plugins in the place where they look for those;
/// for this command alone, in a mount namespace of its own.
pub fn with_plugins(host: &Host, configuration: &Value, command: &Command) -> Command {
    let file = host.directory().join("10-test.conflist");
    fs::write(&file, configuration.to_string()).expect("the test's directory takes files");
    let script =
        "set -e; file=$1; shift; mkdir -p /etc/cni/net.d; mount -t tmpfs cni /etc/cni/net.d; cp $file /etc/cni/net.d
        mount -t tmpfs cni /opt; mkdir /opt/cni; ln -s /usr/lib/cni /opt/cni/bin; exec \"$@\"";
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(file);
    wrapped.arg(command.get_program()).args(command.get_args());
    wrapped
}

/// One interface, as the plugins have made it.
struct Attached {
    interface: String,
    plugins: Vec<Value>,
    result: Value,
}

/// A pod's network namespace. When it is dropped, so are its interfaces and itself.
pub struct Netns {
    name: String,
    attached: Vec<Attached>,
}

impl Netns {
    /// An empty one. `name` is unique in the test.
    pub fn new(host: &Host, name: &str) -> Self {
        let name = format!("{}-{name}", host.namespace());
        ip(&format!("netns add {name}"));
        let netns = Self { name, attached: Vec::new() };
        netns.ip("link set lo up");
        netns
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// The flags of `ctr run` that put a container there.
    pub fn flags(&self) -> [String; 2] {
        ["--with-ns".to_owned(), format!("network:{}", self.path().display())]
    }

    /// Has the plugins add `interface`; their result. The configurations are those of a list, in order, without the name of the list.
    pub fn attach(&mut self, interface: &str, plugins: &[Value]) -> Value {
        let mut result = Value::Null;
        for plugin in plugins {
            let text = self.call("ADD", interface, plugin, &result);
            result = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{plugin}: {error}: {text}"));
        }
        let attached = Attached { interface: interface.to_owned(), plugins: plugins.to_vec(), result: result.clone() };
        self.attached.push(attached);
        result
    }

    /// Has the plugins remove the interface that was added last.
    pub fn detach(&mut self) {
        let Some(Attached { interface, plugins, result }) = self.attached.pop() else { return };
        for plugin in plugins.iter().rev() {
            self.call("DEL", &interface, plugin, &result);
        }
    }

    fn call(&self, verb: &str, interface: &str, plugin: &Value, before: &Value) -> String {
        let kind = plugin["type"].as_str().expect("a configuration has a type");
        let mut configuration = plugin.clone();
        configuration["cniVersion"] = json!(VERSION);
        if configuration["name"].is_null() {
            configuration["name"] = json!("test");
        }
        if !before.is_null() {
            configuration["prevResult"] = before.clone();
        }
        let mut command = Command::new(Path::new(PLUGINS).join(kind));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &self.name).env("CNI_NETNS", self.path());
        command.env("CNI_IFNAME", interface).env("CNI_PATH", PLUGINS);
        output_of(&mut command, Some(&configuration.to_string()))
    }

    /// A command in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs `ip` with these words in it.
    pub fn ip(&self, words: &str) -> String {
        output(self.command("ip").args(words.split(' ')))
    }

    /// Runs busybox' shell in it, the same program that the busybox image has.
    pub fn sh(&self, script: &str) -> String {
        output(self.command("/bin/busybox").args(["sh", "-c", script]))
    }

    /// All that a runtime may leave in it: interfaces, addresses, routes, rules, queueing disciplines and filters.
    pub fn state(&self) -> String {
        let mut state = String::new();
        for words in ["-d -o link", "-o address", "-4 route show table all", "-6 route show table all", "rule"] {
            state += &self.ip(words);
        }
        state += &output(self.command("tc").args(["qdisc", "show"]));
        let names = self.ip("-o link");
        for name in names.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next()) {
            state += &output(self.command("tc").args(["filter", "show", "dev", name, "ingress"]));
        }
        // Lifetimes run, and the kernel may still look for duplicates.
        state.replace(" tentative", "").split_inclusive('\n').filter(|line| !line.contains("expires")).collect()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            while !self.attached.is_empty() {
                self.detach();
            }
        }
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// The first address of each family in a plugin's result, IPv4 first.
pub fn ips(result: &Value) -> [String; 2] {
    let all = result["ips"].as_array().expect("a result has addresses");
    let of = |version: &str| {
        let found = all.iter().find(|ip| ip["version"] == version).unwrap_or_else(|| panic!("IPv{version}: {result}"));
        let text = found["address"].as_str().expect("an address is text");
        text.split('/').next().unwrap_or_default().to_owned()
    };
    [of("4"), of("6")]
}

/// What both ends of a pod see of an interface and its routes, from the output of [`script`].
pub fn view(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some((_, mtu)) = line.split_once(" mtu ") {
            lines.push(format!("mtu {}", mtu.split(' ').next().unwrap_or_default()));
        }
        // The host's kernel may still look for duplicates, the guest's does not (IFA_F_NODAD, 02).
        let plain = line.replace(" tentative", "").replace(" flags 02", "");
        if ["link/ether", "inet", "route "].iter().any(|kind| plain.starts_with(kind)) && !plain.contains("ff00::") {
            lines.push(plain.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    lines.sort_unstable();
    lines
}

/// The script whose output [`view`] reads.
pub fn script(interface: &str) -> String {
    format!("ip addr show dev {interface}; ip route | sed 's/^/route /'; ip -6 route | sed 's/^/route /'")
}

/// Starts one end of a connection in the test's network namespace (see the probe's `net`).
pub fn probe(words: &[&str]) -> Running {
    let mut running = Running::start(Command::new(bin_dir().join("caisson-e2e-probe")).arg("net").args(words));
    running.close_stdin();
    running
}

/// Makes a file of resolv.conf's form in the test's directory.
pub fn resolver(host: &Host, address: &str) -> PathBuf {
    let path = host.directory().join("resolv.conf");
    fs::write(&path, format!("nameserver {address}\n")).expect("the test's directory takes files");
    path
}

//! What the plugins make beside veths on a bridge, several of them in one pod, and what stands before and behind a pod: rules, port
//! maps, a resolver.

use std::process::Command;

use caisson_e2e::{
    Host,
    network::{self, Netns, addresses, ip, ips, range, resolver},
};
use serde_json::{Value, json};

use super::*;

caisson_e2e::for_each_runtime!(several in setup(), rules_and_ports in setup());
caisson_e2e::caisson_only!(policy_routing in setup());

/// A wire of the host's: an interface `upN` for plugins to build on, whose other end has the first addresses of network N.
fn wire(net: u8) -> String {
    ip(&format!("link add up{net} type veth peer name far{net}"));
    for end in ["up", "far"] {
        ip(&format!("link set {end}{net} up"));
    }
    format!("far{net}")
}

fn gateway(interface: &str, net: u8) {
    ip(&format!("address add 10.88.{net}.1/24 dev {interface}"));
    ip(&format!("-6 address add fd00:88:{net}::1/64 dev {interface} nodad"));
}

/// A configuration of a plugin that builds on `upN`.
fn on_wire(host: &Host, kind: &str, net: u8, more: Value) -> Value {
    let mut plugin = json!({
        "type": kind, "name": format!("net{net}"), "master": format!("up{net}"), "mtu": 1400, "ipam": range(host, net),
    });
    let fields = more.as_object().expect("an object").clone();
    plugin.as_object_mut().expect("an object").extend(fields);
    plugin
}

fn several(host: &Host) {
    let mut netns = Netns::new(host, "several");
    let ptp = json!({ "type": "ptp", "name": "net10", "mtu": 1300, "ipMasq": false, "ipam": addresses(host, 10) });
    let mut results = vec![netns.attach("eth0", &[ptp])];
    for (net, kind, more) in [
        (11, "macvlan", json!({ "mode": "bridge" })),
        (12, "ipvlan", json!({ "mode": "l2" })),
        (13, "vlan", json!({ "vlanId": 5 })),
    ] {
        let far = wire(net);
        if kind == "vlan" {
            ip(&format!("link add link {far} name tagged type vlan id 5"));
            ip("link set tagged up");
            gateway("tagged", net);
        } else {
            gateway(&far, net);
        }
        results.push(netns.attach(&format!("net{net}"), &[on_wire(host, kind, net, more)]));
    }
    let before = netns.state();
    let [flag, value] = netns.flags();
    let pod = host.container("several").flag(flag).flag(value).start_idle();
    for (interface, result) in ["eth0", "net11", "net12", "net13"].into_iter().zip(&results) {
        sees(&pod, &netns, interface);
        let net = if interface == "eth0" { "10" } else { &interface[3..] };
        connects(&pod, &format!("{interface}-to4"), &format!("10.88.{net}.1"));
        connects(&pod, &format!("{interface}-to6"), &format!("[fd00:88:{net}::1]"));
        let [v4, v6] = ips(result);
        is_reached(&pod, &format!("{interface}-from4"), &v4);
        takes_datagrams(&pod, &format!("{interface}-datagrams"), &format!("[{v6}]"));
    }
    assert_eq!(pod.end().code, Some(137));
    host.expect_nothing_left();
    assert_eq!(netns.state(), before, "the namespace is as it was");
}

fn rules_and_ports(host: &Host) {
    let mut netns = Netns::new(host, "ports");
    let mapped = json!([{ "hostPort": 8080, "containerPort": 7001, "protocol": "tcp" }]);
    let portmap = json!({
        "type": "portmap", "name": "net1", "snat": true, "capabilities": { "portMappings": true },
        "runtimeConfig": { "portMappings": mapped },
    });
    netns.attach("eth0", &[network::bridge(host, 1), portmap]);
    let [flag, value] = netns.flags();
    let resolver =
        format!("type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro", resolver(host, "10.88.1.1").display());
    let pod = host.container("ports").flag(flag).flag(value).flag("--mount").flag(resolver).start_idle();
    assert_eq!(pod.exec("resolver", &["cat", "/etc/resolv.conf"]).succeeded(), "nameserver 10.88.1.1\n");

    let amount = amount();
    let server = listening(probe_in(&pod, "mapped", &["serve", "7001", &amount]));
    finished(probe(&["connect", "10.88.1.1:8080", &amount]));
    finished(server);

    // What the host forbids on its side of the veth is forbidden.
    connects(&pod, "allowed", "10.88.1.1");
    let iptables = |words: &str| {
        let done = Command::new("iptables").args(words.split(' ')).output().expect("iptables is installed");
        assert!(done.status.success(), "iptables {words}: {done:?}");
    };
    let rule = "INPUT -i br1 -p tcp --dport 7000 -j REJECT --reject-with tcp-reset";
    iptables(&format!("-I {rule}"));
    let server = listening(probe(&["serve", "7000", "1"]));
    let refused = Finished::of(probe_in(&pod, "refused", &["connect", "10.88.1.1:7000", "1"]), STEP);
    assert!(refused.code == Some(1) && refused.err().contains("refused"), "{refused:?}");
    iptables(&format!("-D {rule}"));
    finished(probe_in(&pod, "again", &["connect", "10.88.1.1:7000", "1"]));
    finished(server);
    assert_eq!(pod.end().code, Some(137));
}

fn policy_routing(host: &Host) {
    let mut netns = Netns::new(host, "sbr");
    netns.attach("eth0", &[network::bridge(host, 1), json!({ "type": "sbr", "name": "net1" })]);
    let before = netns.state();
    let [flag, value] = netns.flags();
    let refused = host.container("sbr").flag(flag).flag(value).sh("true");
    assert_ne!(refused.code, Some(0));
    let words = "is not one of the default rules: source-based and policy routing cannot be had";
    assert!(refused.err().contains("IPv4 rule") && refused.err().contains(words), "{refused:?}");
    host.expect_nothing_left();
    assert_eq!(netns.state(), before);
}

//! Pods on a bridge, with IPv4 and IPv6, and pods without any network.

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use caisson_e2e::{
    Host,
    network::{self, Netns, ips, output},
};

use serde_json::json;

use super::*;

caisson_e2e::for_each_runtime!(two_pods in setup(), none in setup(), the_tasks_pid in setup(), attached_after_create in setup());

/// A pod in a network namespace that is there already, as CRI has it.
fn start<'a>(host: &'a Host, name: &str, netns: &Netns) -> Pod<'a> {
    let [flag, value] = netns.flags();
    host.container(name).flag(flag).flag(value).start_idle()
}

fn two_pods(host: &Host) {
    let (mut one, mut two) = (Netns::new(host, "one"), Netns::new(host, "two"));
    let [v4, v6] = ips(&one.attach("eth0", &[network::bridge(host, 1)]));
    let [_, other_v6] = ips(&two.attach("eth0", &[network::bridge(host, 1)]));
    let before = [one.state(), two.state()];
    let pod = start(host, "one", &one);
    sees(&pod, &one, "eth0");

    connects(&pod, "to4", "10.88.1.1");
    connects(&pod, "to6", "[fd00:88:1::1]");
    assert_eq!(is_reached(&pod, "from4", &v4), "10.88.1.1");
    assert_eq!(is_reached(&pod, "from6", &format!("[{v6}]")), "fd00:88:1::1");
    takes_datagrams(&pod, "datagrams4", &v4);
    takes_datagrams(&pod, "datagrams6", &format!("[{v6}]"));
    let pinged = pod.exec("ping", &["ping", "-c", "2", "-s", "5000", "10.88.1.1"]).succeeded();
    assert!(pinged.contains("2 packets received"), "{pinged}");

    let other = start(host, "two", &two);
    let server = listening(probe_in(&other, "serve", &["serve", "7000", "100000"]));
    finished(probe_in(&pod, "connect", &["connect", &format!("[{other_v6}]:7000"), "100000"]));
    assert_eq!(finished(server), format!("listening\nexchanged 100000 with {v6}\n"));

    for pod in [pod, other] {
        assert_eq!(pod.end().code, Some(137));
    }
    host.expect_nothing_left();
    assert_eq!([one.state(), two.state()], before, "the namespaces are as they were");
}

/// What is done to the network namespace of the task's pid, as `ctr run --cni`, nerdctl and Docker do it.
fn the_tasks_pid(host: &Host) {
    let pod = host.container("pid").start_idle();
    let tasks = host.ctr_output(["task", "list"]).succeeded();
    let line = tasks.lines().find(|line| line.starts_with(&pod.id)).expect("the task is listed");
    let pid = line.split_whitespace().nth(1).expect("its pid");
    let path = format!("/proc/{pid}/ns/net");
    let inode = |path: &str| fs::metadata(path).map(|file| file.ino()).ok();
    assert!(inode(&path).is_some() && inode(&path) != inode("/proc/thread-self/ns/net"), "{path}");
    let seen = output(Command::new("nsenter").arg(format!("--net={path}")).args(["ip", "-br", "link"]));
    assert!(seen.starts_with("lo ") && seen.contains("UP") && seen.lines().count() == 1, "{seen}");
    assert_eq!(pod.end().code, Some(137));
    assert_eq!(inode(&path), None, "the pid has gone with the task");
}

/// `ctr run --cni` lets the plugins work between Create and Start: the program finds its network.
fn attached_after_create(host: &Host) {
    let list = json!({ "cniVersion": "0.4.0", "name": "net1", "plugins": [network::bridge(host, 1)] });
    let script = "ip addr show dev eth0 && ip route && ping -c 1 10.88.1.1 && probe net connect 10.88.1.1:7000 100000";
    let container = host.container("late").flag("--cni");
    let server = listening(probe(&["serve", "7000", "100000"]));
    let mut running =
        Running::start(&mut network::with_plugins(host, &list, &container.command(&["sh", "-c", script])));
    running.close_stdin();
    let seen = finished(running);
    assert!(seen.contains("inet 10.88.1.2/24") && seen.contains("default via 10.88.1.1 dev eth0"), "{seen}");
    assert!(finished(server).ends_with("exchanged 100000 with 10.88.1.2\n"), "{seen}");
}

fn none(host: &Host) {
    let script = "ip -o link; ping -c 1 127.0.0.1 > /dev/null && ping -c 1 ::1 > /dev/null && echo loops";
    let seen = host.container("none").sh(script);
    // runc leaves the loopback interface up, too.
    let text = seen.succeeded();
    let links: Vec<&str> = text.lines().filter(|line| line.contains(": <")).collect();
    assert!(text.ends_with("loops\n") && links.iter().all(|link| !link.contains("ether")), "{text}");
}

//! What containers do with their network themselves: links of every kind that VPNs and Docker in a pod make, rules of both
//! interfaces of iptables, a WireGuard device. The programs are the host's own.

use caisson_e2e::{Host, Pod, Runtime, Setup};

use super::STEP;

caisson_e2e::for_each_runtime!(links in Setup::default(), rules in Setup::default());

/// A pod with the right to change its network.
fn start(host: &Host) -> Pod<'_> {
    let mut container = host.container("pod").flag("--cap-add=CAP_NET_ADMIN");
    for (source, destination) in [("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")] {
        container = container.flag(format!("--mount=type=bind,src={source},dst={destination},options=rbind:ro"));
    }
    container.start_idle()
}

fn links(host: &Host) {
    let pod = start(host);
    let script = "set -e; ip() { /usr/bin/ip \"$@\"; }; tc() { /usr/sbin/tc \"$@\"; }; ip link add d0 type dummy; ip link add v0 type veth peer name v1; \
                  ip link add br0 type bridge; ip link set v0 master br0; ip link add link d0 name d0.7 type vlan id 7; \
                  ip link add link d0 name m0 type macvlan mode bridge; ip link add wg0 type wireguard; \
                  for link in d0 v0 v1 br0 d0.7 m0 wg0; do ip link set $link up; done; \
                  ip address add 10.99.0.1/24 dev br0; ip address add 10.99.1.1/24 dev d0.7; \
                  tc qdisc add dev d0 root handle 1: htb; tc class add dev d0 parent 1: classid 1:1 htb rate 1mbit; \
                  tc qdisc add dev v0 root fq_codel; tc qdisc add dev v1 root netem delay 1ms; \
                  ip rule add fwmark 7 lookup 100; ip route add default dev d0 table 100; \
                  ip -o link | cut -d: -f2 | cut -d@ -f1 | sort | tr -d '\\n'; echo; tc qdisc show dev d0 | cut -d' ' -f2; \
                  ip route get 192.0.2.1 mark 7 | head -n 1 | cut -d' ' -f 3,5";
    let made = pod.exec("links", &["sh", "-c", script]).succeeded();
    assert_eq!(made, " br0 d0 d0.7 lo m0 v0 v1 wg0\nhtb\nd0 100\n");
    assert_eq!(pod.end().code, Some(137));
    host.expect_nothing_left();
}

fn rules(host: &Host) {
    let pod = start(host);
    let mut server = pod.exec_start("server", &["sh", "-c", "nc -ll -p 7000 -e cat & echo started; wait"]);
    server.close_stdin();
    server.stdout.wait_for("the server's start", STEP, |text| text.contains("started").then_some(()));
    // The legacy interface's tables are modules of a host, which nobody has loaded there.
    let kinds = if host.runtime == Runtime::Caisson { &["nft", "legacy"][..] } else { &["nft"] };
    for (port, kind) in ["81", "82"].iter().zip(kinds) {
        let iptables = format!("/usr/sbin/iptables-{kind}");
        for rule in [
            &["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", port, "-j", "REDIRECT", "--to-ports", "7000"][..],
            &[
                "-A",
                "OUTPUT",
                "-p",
                "tcp",
                "--dport",
                "7000",
                "-m",
                "conntrack",
                "--ctstate",
                "NEW",
                "-m",
                "comment",
                "--comment",
                "counted",
            ],
        ] {
            let words: Vec<&str> = [&[iptables.as_str()], rule].concat();
            pod.exec(&format!("{kind}{}", rule.len()), &words).succeeded();
        }
        let ask = format!("for i in $(seq 100); do echo hello | nc 127.0.0.1 {port} && exit; sleep 0.1; done; exit 1");
        assert_eq!(pod.exec(&format!("ask-{kind}"), &["sh", "-c", &ask]).succeeded(), "hello\n");
        let shown = pod.exec(&format!("show-{kind}"), &[&iptables, "-nvxL", "OUTPUT"]).succeeded();
        let counted = shown.lines().find(|line| line.contains("counted")).unwrap_or_default();
        let packets = counted.split_ascii_whitespace().next().and_then(|packets| packets.parse().ok());
        assert!(packets.is_some_and(|packets: u32| packets > 0), "{shown}");
    }
    assert_eq!(pod.end().code, Some(137));
    drop(server);
    host.expect_nothing_left();
}

//! The machine's network, set in network namespaces of this machine with the two ends of a veth as cards; iproute2 looks at what came
//! of it. Needs root.

use std::{net::IpAddr, process::Command, thread};

use caisson_agent::network::{Network, NetworkError};
use caisson_netlink::Subscription;
use caisson_protos::agent::{
    ConfigureNetworkRequest, NetworkAddress, NetworkHop, NetworkInterface, NetworkNeighbour, NetworkRoute,
};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use ttrpc::Code;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs `test` in a network namespace of its own that has two cards, `left` and `right`, joined by a cable.
fn with_cards(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests run as root");
        ip("link set lo up");
        ip("link add left address 02:00:00:00:00:01 type veth peer name right address 02:00:00:00:00:02");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &str) -> Vec<Value> {
    let text = ip(&format!("-j -d {arguments}"));
    if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn split(network: &str) -> (Vec<u8>, u32) {
    let (ip, prefix) = network.split_once('/').unwrap();
    (bytes(ip), prefix.parse().unwrap())
}

fn address(network: &str) -> NetworkAddress {
    let (ip, prefix) = split(network);
    NetworkAddress { ip, prefix, ..Default::default() }
}

/// A unicast route of the main table, as `ip route add` makes it.
fn route(network: &str, gateway: &str, interface: &str) -> NetworkRoute {
    let (destination, prefix) = split(network);
    let gateway = if gateway.is_empty() { Vec::new() } else { bytes(gateway) };
    // RT_SCOPE_LINK without a gateway (IPv4), RT_SCOPE_UNIVERSE with one; RTPROT_BOOT.
    let scope = if gateway.is_empty() && destination.len() == 4 { 253 } else { 0 };
    let metric = if destination.len() == 16 { 1024 } else { 0 };
    let hops = vec![NetworkHop { interface: interface.into(), gateway, ..Default::default() }];
    NetworkRoute { destination, prefix, table: 254, type_: 1, protocol: 3, scope, metric, hops, ..Default::default() }
}

/// The route that the kernel makes for an address's network.
fn connected(network: &str, source: &str, interface: &str) -> NetworkRoute {
    let source = if source.is_empty() { Vec::new() } else { bytes(source) };
    let metric = if network.contains(':') { 256 } else { 0 };
    NetworkRoute { protocol: 2, source, metric, ..route(network, "", interface) }
}

fn interface(name: &str, mac: [u8; 6], addresses: &[&str]) -> NetworkInterface {
    let addresses = addresses.iter().map(|one| address(one)).collect();
    NetworkInterface { name: name.into(), mac: mac.to_vec(), mtu: 1500, up: true, addresses, ..Default::default() }
}

fn request(interfaces: Vec<NetworkInterface>, routes: Vec<NetworkRoute>) -> ConfigureNetworkRequest {
    ConfigureNetworkRequest { interfaces, routes, ..Default::default() }
}

/// The usual pod: one interface, one network, a default route.
fn usual() -> ConfigureNetworkRequest {
    let eth0 = interface("eth0", MAC, &["10.0.0.2/24"]);
    request(vec![eth0], vec![route("0.0.0.0/0", "10.0.0.1", "eth0"), connected("10.0.0.0/24", "10.0.0.2", "eth0")])
}

fn addresses(interface: &str) -> Vec<String> {
    let link = json(&format!("address show dev {interface}"));
    let all = link[0]["addr_info"].as_array().unwrap();
    all.iter().map(|one| format!("{}/{}", one["local"].as_str().unwrap(), one["prefixlen"])).collect()
}

/// Destinations and gateways of a family's main table.
fn routes(family: &str) -> Vec<String> {
    let describe = |route: &Value| {
        let text = |key: &str| route[key].as_str().map(|value| format!(" {key} {value}")).unwrap_or_default();
        format!("{}{}{}", route["dst"].as_str().unwrap(), text("gateway"), text("dev"))
    };
    json(&format!("{family} route show")).iter().map(describe).collect()
}

#[test]
fn an_interface_gets_all_that_it_has_on_the_host() {
    with_cards(|| {
        let network = Network::default();
        let mut eth0 = interface("eth0", MAC, &["10.0.0.2/24", "10.0.0.3/24", "2001:db8::2/64", "fe80::1234/64"]);
        eth0.mtu = 9000;
        eth0.addresses[0].broadcast = bytes("10.0.0.255");
        eth0.addresses.push(NetworkAddress { peer: bytes("10.9.0.1"), ..address("10.9.0.2/32") });
        eth0.addresses.push(NetworkAddress {
            valid_seconds: 3600,
            preferred_seconds: 1800,
            ..address("2001:db8:1::2/64")
        });
        eth0.neighbours =
            vec![NetworkNeighbour { ip: bytes("10.0.0.9"), mac: OTHER_MAC.to_vec(), ..Default::default() }];
        let mut on_link = route("10.3.0.0/16", "192.0.2.1", "eth0");
        on_link.hops[0].on_link = true;
        let mut tuned = route("10.4.0.0/16", "10.0.0.1", "eth0");
        tuned.metrics = [(2, 1400), (8, 1300), (2, 1400)].into();
        tuned.congestion = "cubic".into();
        (tuned.metric, tuned.protocol, tuned.source) = (77, 4, bytes("10.0.0.3"));
        let nowhere = NetworkRoute { type_: 6, hops: Vec::new(), scope: 0, ..route("10.5.0.0/16", "", "eth0") };
        let mut two = route("10.6.0.0/16", "10.0.0.1", "eth0");
        two.hops.push(NetworkHop { gateway: bytes("10.0.0.7"), weight: 3, ..two.hops[0].clone() });
        let routes = vec![
            // Its gateway is reached by a route that comes later.
            route("0.0.0.0/0", "10.7.0.1", "eth0"),
            route("10.7.0.1/32", "", "eth0"),
            on_link,
            tuned,
            nowhere,
            two,
            route("10.8.0.0/16", "fe80::1", "eth0"),
            route("::/0", "fe80::1", "eth0"),
            connected("10.0.0.0/24", "10.0.0.2", "eth0"),
            connected("10.9.0.1/32", "10.9.0.2", "eth0"),
            connected("2001:db8::/64", "", "eth0"),
            connected("2001:db8:1::/64", "", "eth0"),
            connected("fe80::/64", "", "eth0"),
        ];
        network.configure(&request(vec![eth0], routes)).unwrap();

        let link = &json("address show dev eth0")[0];
        assert_eq!((link["address"].as_str(), link["mtu"].as_u64()), (Some("02:00:00:00:00:01"), Some(9000)));
        assert!(link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"), "{link}");
        let mut found = addresses("eth0");
        found.sort();
        let mut expected =
            vec!["10.0.0.2/24", "10.0.0.3/24", "10.9.0.2/32", "2001:db8:1::2/64", "2001:db8::2/64", "fe80::1234/64"];
        expected.sort_unstable();
        assert_eq!(found, expected);
        for one in link["addr_info"].as_array().unwrap() {
            assert_ne!(one["tentative"].as_bool(), Some(true), "it waits for nobody: {one}");
            match one["local"].as_str().unwrap() {
                "10.0.0.2" => assert_eq!(one["broadcast"], "10.0.0.255"),
                "10.9.0.2" => assert_eq!(one["address"], "10.9.0.1"),
                "2001:db8:1::2" => assert!(one["valid_life_time"].as_u64().unwrap() <= 3600, "{one}"),
                _ => {}
            }
        }
        let all = json("route show");
        let of = |destination: &str| all.iter().find(|route| route["dst"] == destination).unwrap().clone();
        assert_eq!(of("default")["gateway"], "10.7.0.1");
        assert_eq!(of("10.3.0.0/16")["flags"][0], "onlink");
        let tuned = of("10.4.0.0/16");
        assert_eq!((tuned["metric"].as_u64(), tuned["protocol"].as_str()), (Some(77), Some("static")), "{tuned}");
        assert_eq!(tuned["prefsrc"], "10.0.0.3");
        assert_eq!((&tuned["metrics"][0]["mtu"], &tuned["metrics"][0]["congestion"]), (&1400.into(), &"cubic".into()));
        assert_eq!(of("10.5.0.0/16")["type"], "blackhole");
        assert_eq!(of("10.6.0.0/16")["nexthops"][1]["weight"], 4);
        assert_eq!(of("10.8.0.0/16")["via"]["host"], "fe80::1");
        let v6 = json("-6 route show");
        assert!(v6.iter().any(|route| route["dst"] == "default" && route["gateway"] == "fe80::1"), "{v6:?}");
        assert_eq!(v6.len(), 4, "{v6:?}");
        let neighbours = json("neighbour show dev eth0");
        assert!(
            neighbours.iter().any(|one| one["dst"] == "10.0.0.9" && one["lladdr"] == "02:00:00:00:00:02"),
            "{neighbours:?}"
        );
    });
}

#[test]
fn the_same_message_again_changes_nothing() {
    with_cards(|| {
        let network = Network::default();
        let mut wanted = usual();
        wanted.interfaces.push(interface("eth1", OTHER_MAC, &["2001:db8::2/64", "fe80::7/64"]));
        wanted.routes.push(connected("2001:db8::/64", "", "eth1"));
        wanted.routes.push(connected("fe80::/64", "", "eth1"));
        wanted.routes.push(route("::/0", "fe80::1", "eth1"));
        network.configure(&wanted).unwrap();
        let groups = [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
            libc::RTNLGRP_NEIGH,
        ];
        let changes = Subscription::open(&groups).unwrap();
        network.configure(&wanted).unwrap();
        assert!(!changes.drain(|_, _| true).unwrap());
        // The subscription does see what changes.
        wanted.interfaces[0].mtu = 1400;
        network.configure(&wanted).unwrap();
        assert!(changes.drain(|_, _| true).unwrap());
    });
}

#[test]
fn a_later_message_changes_what_differs_and_leaves_what_containers_added() {
    with_cards(|| {
        let network = Network::default();
        network.configure(&usual()).unwrap();
        ip("address add 10.77.0.1/24 dev eth0");
        ip("route add 10.78.0.0/16 via 10.0.0.9");
        ip("neighbour add 10.0.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud permanent");

        let mut eth0 = interface("eth0", MAC, &["10.1.0.2/24", "10.0.0.2/24"]);
        eth0.mtu = 1400;
        let mut wanted = request(
            vec![eth0],
            vec![
                route("0.0.0.0/0", "10.1.0.1", "eth0"),
                connected("10.0.0.0/24", "10.0.0.2", "eth0"),
                connected("10.1.0.0/24", "10.1.0.2", "eth0"),
            ],
        );
        network.configure(&wanted).unwrap();
        assert_eq!(json("link show dev eth0")[0]["mtu"], 1400);
        let mut found = addresses("eth0");
        found.sort();
        assert_eq!(found, ["10.0.0.2/24", "10.1.0.2/24", "10.77.0.1/24"]);
        let found = routes("-4");
        assert!(found.contains(&"default gateway 10.1.0.1 dev eth0".into()), "{found:?}");
        assert!(found.contains(&"10.78.0.0/16 gateway 10.0.0.9 dev eth0".into()), "{found:?}");
        assert_eq!(found.len(), 5, "{found:?}");

        // What the kernel removes with an address is there again.
        wanted.interfaces[0].addresses.remove(1);
        wanted.routes.remove(1);
        wanted.routes.push(NetworkRoute { source: bytes("10.1.0.2"), ..route("10.79.0.0/16", "10.1.0.9", "eth0") });
        network.configure(&wanted).unwrap();
        let mut found = addresses("eth0");
        found.sort();
        assert_eq!(found, ["10.1.0.2/24", "10.77.0.1/24"]);
        let found = routes("-4");
        assert!(found.contains(&"10.79.0.0/16 gateway 10.1.0.9 dev eth0".into()), "{found:?}");
        assert!(!found.iter().any(|route| route.starts_with("10.0.0.0/24")), "{found:?}");
        assert!(json("neighbour show dev eth0").iter().any(|one| one["dst"] == "10.0.0.8"));
    });
}

#[test]
fn routes_that_the_host_does_not_have_are_not_there() {
    // As the plugin ptp leaves it: no route to the network but by the gateway.
    with_cards(|| {
        let network = Network::default();
        let routes_of_ptp = vec![
            route("10.0.0.1/32", "", "eth0"),
            NetworkRoute { source: bytes("10.0.0.2"), ..route("10.0.0.0/24", "10.0.0.1", "eth0") },
            route("0.0.0.0/0", "10.0.0.1", "eth0"),
        ];
        ip("link set left up");
        let wanted = request(vec![interface("eth0", MAC, &["10.0.0.2/24"])], routes_of_ptp);
        network.configure(&wanted).unwrap();
        let mut found = routes("-4");
        found.sort();
        let expected =
            ["10.0.0.0/24 gateway 10.0.0.1 dev eth0", "10.0.0.1 dev eth0", "default gateway 10.0.0.1 dev eth0"];
        assert_eq!(found, expected);
        assert_eq!(addresses("eth0"), ["10.0.0.2/24"], "no link-local address that the host does not have");
        assert_eq!(routes("-6"), [""; 0]);
    });
}

#[test]
fn interfaces_exchange_their_names() {
    with_cards(|| {
        let network = Network::default();
        let wanted =
            request(vec![interface("right", MAC, &["10.0.0.2/24"]), interface("left", OTHER_MAC, &[])], Vec::new());
        network.configure(&wanted).unwrap();
        assert_eq!(json("link show dev right")[0]["address"], "02:00:00:00:00:01");
        assert_eq!(json("link show dev left")[0]["address"], "02:00:00:00:00:02");
        assert_eq!(routes("-4"), [""; 0], "the message has no routes");
        // A container's own interface has a name that a card is to get.
        ip("link add eth5 type bridge");
        let error = network.configure(&request(vec![interface("eth5", MAC, &[])], Vec::new())).unwrap_err();
        assert_eq!(error.to_string(), r#"interface "eth5": cannot give "right" this name: File exists (os error 17)"#);
    });
}

#[test]
fn an_interface_that_is_no_longer_named_loses_what_it_had() {
    with_cards(|| {
        let network = Network::default();
        let mut wanted = usual();
        wanted.interfaces.push(interface("net1", OTHER_MAC, &["10.2.0.2/24"]));
        wanted.routes.push(connected("10.2.0.0/24", "10.2.0.2", "net1"));
        network.configure(&wanted).unwrap();
        network.configure(&usual()).unwrap();
        assert_eq!(addresses("net1"), [""; 0]);
        let flags = json("link show dev net1")[0]["flags"].to_string();
        assert!(!flags.contains("\"UP\""), "{flags}");
        assert_eq!(routes("-4").len(), 2);
        network.configure(&wanted).unwrap();
        assert_eq!(addresses("net1"), ["10.2.0.2/24"]);
    });
}

#[test]
fn an_interface_without_arp_and_one_that_is_down() {
    with_cards(|| {
        let network = Network::default();
        let eth0 = NetworkInterface { no_arp: true, ..interface("eth0", MAC, &["10.0.0.2/24"]) };
        let eth1 = NetworkInterface { up: false, ..interface("eth1", OTHER_MAC, &["10.2.0.2/24"]) };
        let lo = NetworkInterface {
            name: "lo".into(),
            mtu: 65536,
            up: true,
            addresses: vec![NetworkAddress { scope: 254, ..address("127.0.0.1/8") }, address("192.0.2.7/32")],
            ..Default::default()
        };
        network.configure(&request(vec![lo, eth0, eth1], Vec::new())).unwrap();
        let flags = json("link show dev eth0")[0]["flags"].to_string();
        assert!(flags.contains("NOARP") && flags.contains("\"UP\""), "{flags}");
        let flags = json("link show dev eth1")[0]["flags"].to_string();
        assert!(!flags.contains("\"UP\""), "{flags}");
        let found = addresses("lo");
        assert_eq!(found.iter().filter(|one| *one == "127.0.0.1/8").count(), 1, "{found:?}");
        assert!(found.contains(&"192.0.2.7/32".into()) && found.contains(&"::1/128".into()), "{found:?}");
    });
}

#[test]
fn what_cannot_be_set_is_named_with_its_interface_and_value() {
    with_cards(|| {
        let network = Network::default();
        let missing = request(vec![interface("eth0", [2, 0, 0, 0, 0, 9], &[])], Vec::new());
        let error = network.configure(&missing).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"interface "eth0": the machine has no network card with the hardware address 02:00:00:00:00:09"#
        );
        assert_eq!(error.code(), Code::NOT_FOUND);

        let mut unreachable = usual();
        unreachable.routes.push(route("10.9.0.0/16", "192.0.2.1", "eth0"));
        let error = network.configure(&unreachable).unwrap_err();
        let expected = r#"interface "eth0": cannot add the route 10.9.0.0/16 via 192.0.2.1: Network is unreachable (os error 101)"#;
        assert!(error.to_string().starts_with(expected), "{error}");
        assert!(error.to_string().ends_with("(Nexthop has invalid gateway)"), "the kernel explains: {error}");
        assert_eq!(error.code(), Code::INTERNAL);
        // The others are there, and the next message goes on from here.
        assert!(routes("-4").contains(&"default gateway 10.0.0.1 dev eth0".into()));
        let mut without = usual();
        without.routes.remove(0);
        network.configure(&without).unwrap();
        assert_eq!(routes("-4"), ["10.0.0.0/24 dev eth0"]);

        let mut invalid = usual();
        invalid.interfaces[0].name = "eth 0".into();
        assert!(matches!(network.configure(&invalid), Err(NetworkError::Invalid { .. })));
    });
}

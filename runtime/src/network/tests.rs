use std::{
    fs::File,
    future::Future,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
};

use caisson_agent::network::Network as Guest;
use caisson_netlink::{
    address::Address,
    link::Link,
    route::{Hop, Route},
    rule::Rule,
    state::State,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::{collection::vec, prelude::*};

use super::{
    lab::{LIMIT, SETTINGS, Space, pod},
    *,
};

const ETH0: [u8; 6] = [2, 0, 0, 0, 0, 2];
const VETH0: [u8; 6] = [2, 0, 0, 0, 0, 1];

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("waited {LIMIT:?} for {what}"))
}

fn join_space(space: &Space) -> Result<(Vec<Card>, ConfigureNetworkRequest, Watch), NetworkError> {
    join(space.namespace(), SETTINGS)
}

/// The address of a namespace's interface with this name.
fn addresses(message: &ConfigureNetworkRequest, name: &str) -> Vec<Vec<u8>> {
    let interface = message.interfaces.iter().find(|one| one.name == name).unwrap();
    interface.addresses.iter().map(|address| address.ip.clone()).collect()
}

#[test]
fn an_interface_becomes_a_card_with_a_tap_beside_it() {
    let (_host, pod) = pod();
    pod.ip("link set eth0 mtu 1400");
    let (mut cards, message, watch) = join_space(&pod).unwrap();
    let card = cards.pop().unwrap();
    assert_eq!((cards.len(), card.name.as_str(), card.mac, card.mtu, card.queues.len()), (0, "eth0", ETH0, 1400, 1));

    let eth0 = message.interfaces.iter().find(|one| one.name == "eth0").unwrap();
    assert_eq!((eth0.mac.as_slice(), eth0.mtu, eth0.up, eth0.no_arp), (ETH0.as_slice(), 1400, true, false));
    assert!(addresses(&message, "eth0").contains(&vec![10, 0, 0, 2]));
    assert_eq!(eth0.addresses[0].broadcast, [10, 0, 0, 255]);
    let default = message.routes.iter().find(|route| route.prefix == 0 && route.destination.len() == 4).unwrap();
    assert_eq!((default.hops[0].interface.as_str(), default.hops[0].gateway.as_slice()), ("eth0", &[10, 0, 0, 1][..]));

    let tap = pod.names().into_iter().find(|name| name.starts_with("ctap")).unwrap();
    let link = &pod.show("ip", &format!("address show dev {tap}"))[0];
    assert_eq!((link["mtu"].as_u64(), link["linkinfo"]["info_kind"].as_str()), (Some(1400), Some("tun")));
    assert_eq!(link["addr_info"].as_array().map(Vec::len), Some(0), "the host does not speak on it: {link}");
    assert_eq!((pod.traffic("eth0"), pod.traffic(&tap)), ((true, 1), (true, 1)));

    drop((card, watch));
    assert_eq!(pod.names(), ["lo", "eth0"]);
    assert_eq!(pod.traffic("eth0"), (false, 0));
}

#[test]
fn a_tap_has_as_many_queues_as_it_is_to_have() {
    let (_host, pod) = pod();
    pod.ip("link add br0 type bridge");
    let (cards, _, watch) = join(pod.namespace(), Settings { queues: 4, descriptors: 7, ..SETTINGS }).unwrap();
    assert_eq!(cards.iter().map(|card| card.queues.len()).collect::<Vec<_>>(), [3, 3], "both fit");
    drop((cards, watch));
    pod.ip("link delete br0");
    let (cards, _, _watch) = join(pod.namespace(), Settings { queues: 4, ..SETTINGS }).unwrap();
    assert_eq!(cards[0].queues.len(), 4);
    let tap = pod.names().into_iter().find(|name| name.starts_with("ctap")).unwrap();
    let link = &pod.show("ip", &format!("link show dev {tap}"))[0];
    assert_eq!(
        (&link["linkinfo"]["info_data"]["multi_queue"], &link["linkinfo"]["info_data"]["vnet_hdr"]),
        (&true.into(), &true.into()),
        "{link}"
    );
}

/// An ARP request for 10.0.0.1 from the pod, with the header of virtio before it.
fn who_has() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(ETH0);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    frame.extend(ETH0);
    frame.extend([10, 0, 0, 2]);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 1]);
    frame
}

#[test]
fn frames_pass_in_both_directions() {
    let (_host, pod) = pod();
    let (mut cards, _, _watch) = join_space(&pod).unwrap();
    let mut tap = File::from(cards.pop().unwrap().queues.pop().unwrap());
    tap.write_all(&who_has()).unwrap();
    loop {
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(LIMIT).unwrap();
        assert!(poll(&mut fds, limit).unwrap() > 0, "no answer came");
        let mut frame = [0; 2048];
        let length = tap.read(&mut frame).unwrap();
        let frame = &frame[12..length];
        // The host's own multicast comes, too.
        if frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2] {
            assert_eq!((&frame[..6], &frame[6..12], &frame[28..32]), (&ETH0[..], &VETH0[..], &[10, 0, 0, 1][..]));
            return;
        }
    }
}

#[test]
fn the_guest_has_what_the_namespace_has() {
    let (_host, pod) = pod();
    pod.ip("address add 10.0.0.3/24 dev eth0");
    pod.ip("address add 2001:db8::2/64 dev eth0 nodad");
    pod.ip("address add 2001:db8::3/64 dev eth0 nodad");
    pod.ip("address add 10.9.0.2 peer 10.9.0.1 dev eth0");
    pod.ip("address add 192.0.2.9/32 dev lo");
    pod.ip("route add 10.1.0.0/16 via 10.0.0.1 mtu 1400 advmss 1300 metric 7 proto static src 10.0.0.3");
    pod.ip("route add 10.2.0.0/16 via 203.0.113.1 dev eth0 onlink");
    pod.ip("route add 10.3.0.0/16 nexthop via 10.0.0.1 weight 3 nexthop via 10.0.0.7");
    pod.ip("route add blackhole 10.4.0.0/16");
    pod.ip("route add 10.5.0.0/16 via inet6 fe80::1 dev eth0");
    pod.ip("route add local 198.51.100.0/24 dev lo");
    pod.ip("-6 route add default via fe80::1 dev eth0");
    pod.ip("-6 route add unreachable 2001:db8:9::/48");
    pod.ip("neighbour add 10.0.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent");
    pod.ip("neighbour add fe80::1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    let planned = plan(&pod.state(), &[], SETTINGS).unwrap();

    // The machine has a card with another name; the host's end of it is of no interest here.
    let guest = Space::new();
    let other = Space::new();
    guest.ip("link add card0 address 02:00:00:00:00:02 type veth peer name far");
    guest.ip(&format!("link set far netns {}", other.path()));
    other.ip("link set far up");
    guest.run(|| Guest::default().configure(&planned.message)).unwrap();
    let of_guest = plan(&guest.state(), &[], SETTINGS).unwrap();
    for (one, other) in planned.message.interfaces.iter().zip(&of_guest.message.interfaces) {
        assert_eq!(one, other);
    }
    let missing = |of: &ConfigureNetworkRequest, from: &ConfigureNetworkRequest| {
        let missing = of.routes.iter().filter(|route| !from.routes.contains(route));
        missing.map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(missing(&planned.message, &of_guest.message), [""; 0], "not in the guest");
    assert_eq!(missing(&of_guest.message, &planned.message), [""; 0], "only in the guest");
    assert_eq!(planned.message.interfaces.len(), 2);
    assert_eq!(planned.message.routes.len(), 13);
}

#[tokio::test]
async fn what_changes_later_is_reported_and_nothing_else() {
    let (host, pod) = pod();
    let (cards, _, mut watch) = join_space(&pod).unwrap();
    assert_eq!(cards.len(), 1);

    pod.ip("address add 10.7.0.2/24 dev eth0");
    let change = within("the new address", watch.changed()).await.unwrap();
    assert!(addresses(&change.message, "eth0").contains(&vec![10, 7, 0, 2]));
    assert_eq!((change.appeared.len(), change.gone.len()), (0, 0));

    pod.ip("route add 10.8.0.0/16 via 10.7.0.1");
    let change = within("the new route", watch.changed()).await.unwrap();
    assert!(change.message.routes.iter().any(|route| route.destination == [10, 8, 0, 0]));

    pod.ip("link set eth0 mtu 1300");
    let change = within("the new MTU", watch.changed()).await.unwrap();
    assert_eq!(change.message.interfaces.iter().find(|one| one.name == "eth0").unwrap().mtu, 1300);
    let tap = pod.names().into_iter().find(|name| name.starts_with("ctap")).unwrap();
    assert_eq!(pod.show("ip", &format!("link show dev {tap}"))[0]["mtu"], 1300);

    host.ip("link add veth1 type veth peer name net1 address 02:00:00:00:00:03");
    host.ip(&format!("link set net1 netns {}", pod.path()));
    let change = within("the new interface", watch.changed()).await.unwrap();
    assert_eq!((change.appeared[0].name.as_str(), change.appeared[0].mac), ("net1", [2, 0, 0, 0, 0, 3]));
    assert_eq!(pod.traffic("net1"), (true, 1));

    host.ip("link delete veth1");
    let gone = async {
        loop {
            let change = watch.changed().await.unwrap();
            if !change.gone.is_empty() {
                return change;
            }
        }
    };
    let change = within("the interface to go", gone).await;
    assert_eq!((change.gone, change.message.interfaces.len()), (vec![[2, 0, 0, 0, 0, 3]], 2));
    assert!(!pod.names().iter().any(|name| name == "net1"));
    assert_eq!(pod.names().iter().filter(|name| name.starts_with("ctap")).count(), 1);

    // A neighbour that is found out is none that was set.
    pod.ip("neighbour add 10.0.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud reachable");
    pod.ip("neighbour add 10.0.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    let change = within("the neighbour", watch.changed()).await.unwrap();
    let eth0 = change.message.interfaces.iter().find(|one| one.name == "eth0").unwrap();
    assert_eq!(eth0.neighbours.iter().map(|one| one.ip.clone()).collect::<Vec<_>>(), [vec![10, 0, 0, 9]]);
}

#[tokio::test]
async fn what_a_guest_cannot_have_is_an_error_and_the_next_change_is_reported() {
    let (_host, pod) = pod();
    let (_cards, _, mut watch) = join_space(&pod).unwrap();
    pod.ip("rule add from 10.0.0.2 table 100 priority 512");
    let error = within("the rule", watch.changed()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "network namespace: IPv4 rule 512 (table 100) is not one of the default rules: source-based and policy routing \
         cannot be had"
    );
    pod.ip("address add 10.7.0.2/24 dev eth0");
    pod.ip("rule delete priority 512");
    let change = async {
        loop {
            if let Ok(change) = watch.changed().await {
                return change;
            }
        }
    };
    let change = within("the address", change).await;
    assert!(addresses(&change.message, "eth0").contains(&vec![10, 7, 0, 2]));
}

#[test]
fn a_namespace_without_interfaces_has_no_cards_and_takes_them_later() {
    let space = Space::new();
    let (cards, message, watch) = join_space(&space).unwrap();
    assert!(cards.is_empty());
    assert_eq!(message.interfaces.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    assert!(message.routes.is_empty());
    drop(watch);
}

#[test]
fn filters_of_others_stay() {
    let (_host, pod) = pod();
    pod.tc("qdisc add dev eth0 clsact");
    pod.tc("filter add dev eth0 ingress pref 7 protocol all u32 match u32 0 0 action mirred egress mirror dev lo");
    let (cards, _, watch) = join_space(&pod).unwrap();
    assert_eq!(pod.traffic("eth0"), (true, 2));
    drop((cards, watch));
    assert_eq!(pod.traffic("eth0"), (true, 1));
    assert_eq!(pod.names(), ["lo", "eth0"]);
}

#[test]
fn what_a_killed_shim_has_left_is_replaced_or_removed() {
    let (_host, pod) = pod();
    // Its monitor lives on, and has the tap open.
    let (cards, _, watch) = join_space(&pod).unwrap();
    std::mem::forget(watch);
    let (again, _, watch) = join_space(&pod).unwrap();
    assert_eq!((again.len(), pod.traffic("eth0")), (1, (true, 1)));
    std::mem::forget(watch);
    clean(&pod.namespace()).unwrap();
    assert_eq!((pod.names(), pod.traffic("eth0")), (vec!["lo".to_owned(), "eth0".to_owned()], (false, 0)));
    drop((cards, again));
    // Filters of others stay, and the place that they are in.
    for direction in ["ingress", "egress"] {
        pod.tc("qdisc add dev eth0 clsact");
        let action = "pref 7 protocol all u32 match u32 0 0 action mirred egress mirror dev lo";
        pod.tc(&format!("filter add dev eth0 {direction} {action}"));
        std::mem::forget(join_space(&pod).unwrap());
        clean(&pod.namespace()).unwrap();
        assert_eq!(pod.traffic("eth0"), (true, usize::from(direction == "ingress")));
        pod.tc("qdisc delete dev eth0 clsact");
    }
}

#[test]
fn an_interface_that_lies_on_another_is_refused_by_name() {
    let (_host, pod) = pod();
    pod.ip("link add link eth0 name macvlan0 type macvlan mode bridge");
    let error = join_space(&pod).err().unwrap().to_string();
    let expected = r#"interface "macvlan0" lies on "eth0" in the same namespace"#;
    assert!(error.contains(expected), "{error}");
    assert_eq!(pod.traffic("eth0"), (false, 0));
    pod.ip("link delete macvlan0");
    pod.ip("tuntap add dev tun0 mode tun");
    pod.ip("link set tun0 up");
    let error = join_space(&pod).err().unwrap().to_string();
    let expected = r#"interface "tun0" is of kind "tun": a guest can have veth, macvlan, ipvlan, vlan, bridge, dummy"#;
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn a_macvlan_of_the_hosts_becomes_a_card_and_a_bridge_stands_for_its_ports() {
    let (host, pod) = pod();
    host.ip("link add link veth0 name mac0 address 02:00:00:00:00:04 type macvlan mode bridge");
    host.ip(&format!("link set mac0 netns {}", pod.path()));
    pod.ip("link add br0 address 02:00:00:00:00:05 type bridge");
    pod.ip("link set eth0 master br0");
    pod.ip("route delete default");
    let planned = plan(&pod.state(), &[], SETTINGS).unwrap();
    let mut names: Vec<_> = planned.interfaces.iter().map(|one| one.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["br0", "mac0"]);
}

fn link(index: u32, kind: &str) -> Link {
    Link {
        index,
        name: format!("eth{index}"),
        mac: vec![2, 0, 0, 0, 0, index as u8],
        mtu: 1500,
        flags: libc::IFF_UP as u32,
        hardware: 1,
        kind: Some(kind.into()),
        ..Link::default()
    }
}

#[test]
fn functions_of_the_host_are_refused_by_name() {
    let virtual_function = Link { kind: None, device: Some("0000:3b:02.1".into()), ..link(2, "") };
    let state = State { links: vec![virtual_function], ..State::default() };
    let refusal = plan(&state, &[], SETTINGS).unwrap_err().to_string();
    assert!(refusal.starts_with(r#"interface "eth2" is a physical or virtual function (0000:3b:02.1)"#), "{refusal}");
    // What modules put into every namespace is nothing that somebody wants.
    let tunnel = Link { flags: 0, hardware: 768, name: "tunl0".into(), ..link(3, "ipip") };
    let state = State { links: vec![tunnel], ..State::default() };
    assert_eq!(plan(&state, &[], SETTINGS).unwrap().interfaces, []);
    let same = Link { mac: link(2, "").mac, ..link(3, "ipvlan") };
    let state = State { links: vec![link(2, "ipvlan"), same], ..State::default() };
    let refusal = plan(&state, &[], SETTINGS).unwrap_err().to_string();
    assert_eq!(refusal, r#"interfaces "eth2" and "eth3" have the same hardware address 02:00:00:00:00:02"#);
    let state = State { links: (2..11).map(|index| link(index, "veth")).collect(), ..State::default() };
    assert_eq!(plan(&state, &[], SETTINGS).unwrap_err().to_string(), "9 interfaces: a guest can have 8");
}

fn any_link() -> impl Strategy<Value = Link> {
    let kind =
        prop::option::of(prop::sample::select(vec!["veth", "macvlan", "ipvlan", "bridge", "tun", "wireguard", "bond"]));
    let numbers = (1u32..8, 0u8..8, any::<bool>(), prop::option::of(1u32..8), prop::option::of(1u32..8));
    (kind, numbers).prop_map(|(kind, (index, mac, up, below, controller))| Link {
        kind: kind.map(Into::into),
        mac: vec![2, 0, 0, 0, 0, mac],
        flags: if up { libc::IFF_UP as u32 } else { 0 } | if index == 1 { libc::IFF_LOOPBACK as u32 } else { 0 },
        below: below.filter(|_| mac == 0),
        controller: controller.filter(|_| mac == 1),
        ..link(index, "")
    })
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(|ip| Ipv4Addr::from(ip).into()), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn any_route() -> impl Strategy<Value = Route> {
    let hop = (1u32..9, prop::option::of(any_ip())).prop_map(|(interface, gateway)| Hop {
        interface,
        gateway,
        ..Hop::default()
    });
    let fields = (0u8..33, prop::sample::select(vec![100u32, 254, 255]), prop::sample::select(vec![2u8, 3, 4]));
    (any_ip(), fields, vec(hop, 0..3)).prop_map(|(ip, (prefix, table, protocol), hops)| Route {
        table,
        protocol,
        hops,
        ..Route::new(ip, prefix)
    })
}

fn any_state() -> impl Strategy<Value = State> {
    let address = (1u32..9, any_ip(), 0u8..33, any::<u32>())
        .prop_map(|(interface, ip, prefix, flags)| Address { flags, ..Address::new(interface, ip, prefix) });
    let links = vec(any_link(), 0..6).prop_map(|mut links| {
        links.sort_by_key(|link| link.index);
        links.dedup_by_key(|link| link.index);
        links
    });
    (links, vec(address, 0..6), vec(any_route(), 0..6)).prop_map(|(links, addresses, routes)| State {
        links,
        addresses,
        routes,
        ..State::default()
    })
}

proptest! {
    #[test]
    fn a_plan_is_consistent_or_there_is_none(state in any_state()) {
        let Ok(plan) = plan(&state, &[], SETTINGS) else { return Ok(()) };
        let names: Vec<&str> = plan.message.interfaces.iter().map(|one| one.name.as_str()).collect();
        for (number, interface) in plan.interfaces.iter().enumerate() {
            let link = state.links.iter().find(|link| link.index == interface.index).unwrap();
            prop_assert!(link.kind.is_some() && !link.is_loopback());
            prop_assert!(names.contains(&interface.name.as_str()), "each card has its part of the message");
            prop_assert!(!plan.interfaces[..number].iter().any(|other| other.mac == interface.mac));
        }
        let loopbacks = state.links.iter().filter(|link| link.is_loopback()).count();
        prop_assert_eq!(plan.message.interfaces.len(), plan.interfaces.len() + loopbacks);
        for route in &plan.message.routes {
            prop_assert!(route.hops.iter().all(|hop| names.contains(&hop.interface.as_str())));
            prop_assert!(route.table == 254 || route.table == 255 && route.protocol != 2);
        }
        // Its own taps change nothing.
        let mut with_taps = state.clone();
        with_taps.links.extend(plan.interfaces.iter().map(|one| Link {
            index: one.index + 100,
            name: plan::tap_name(one.index),
            ..link(0, "tun")
        }));
        prop_assert_eq!(super::plan(&with_taps, &[], SETTINGS), Ok(plan));
    }

    #[test]
    fn only_default_rules_are_taken(ipv6: bool, priority in prop_oneof![Just(0u32), Just(32766), Just(32767), any::<u32>()], table in 250u32..256, plain: bool) {
        let rule = Rule { ipv6, priority, table, plain };
        let defaults = |ipv6| [(0, 255), (32766, 254)].map(|(priority, table)| Rule { ipv6, priority, table, plain: true });
        let rules = [defaults(false).as_slice(), &defaults(true), std::slice::from_ref(&rule)].concat();
        let taken = plan(&State { rules, ..State::default() }, &[], SETTINGS).is_ok();
        prop_assert_eq!(taken, rule.is_default());
    }
}

#[test]
fn a_queue_length_of_zero_stays() {
    let (_host, pod) = pod();
    pod.ip("link set eth0 txqueuelen 0");
    let _joined = join_space(&pod).unwrap();
    assert_eq!(pod.traffic("eth0"), (true, 1));
    // Absent: there is no queue.
    assert!(pod.show("ip", "link show dev eth0")[0]["txqlen"].as_u64().unwrap_or(0) == 0);
}

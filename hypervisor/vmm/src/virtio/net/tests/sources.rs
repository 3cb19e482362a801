use proptest::prelude::*;

use super::*;

const MAC: Mac = [2, 0, 0, 0, 0, 1];
const OTHER: Mac = [2, 0, 0, 0, 0, 9];
const OWN4: [u8; 4] = [10, 0, 0, 2];
const OWN6: &str = "fd00::2";
/// From the MAC.
const LOCAL: &str = "fe80::ff:fe00:1";

fn sources() -> Sources {
    let allowed = AllowedSources { ipv4: vec![OWN4.into()], ipv6: vec![OWN6.parse().unwrap()] };
    Sources::new(MAC, &allowed)
}

fn check(frame: &[u8]) -> Result<(), Spoofed> {
    sources().check(frame.get(..LOOKED_AT).unwrap_or(frame))
}

fn ethernet(source: Mac, kind: u16, packet: &[u8]) -> Vec<u8> {
    [&OTHER[..], &source, &kind.to_be_bytes(), packet].concat()
}

fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 20 + payload.len() as u8, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(source);
    packet.extend(destination);
    packet.extend(payload);
    ethernet(MAC, IPV4, &packet)
}

fn arp(operation: u8, sender: Mac, address: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend(sender);
    packet.extend(address);
    packet.extend([0; 6]);
    packet.extend([10, 0, 0, 1]);
    ethernet(MAC, ARP, &packet)
}

/// With extension headers: each its own number, its content without the two first bytes.
fn ipv6(source: &str, extensions: &[(u8, &[u8])], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut rest = Vec::new();
    for (n, (kind, content)) in extensions.iter().enumerate() {
        rest.push(extensions.get(n + 1).map_or(protocol, |next| next.0));
        let units = match *kind {
            FRAGMENT => 0,
            AUTHENTICATION => (content.len() + 2) / 4 - 2,
            _ => (content.len() + 2) / 8 - 1,
        };
        rest.push(units as u8);
        rest.extend(*content);
    }
    rest.extend(payload);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((rest.len() as u16).to_be_bytes());
    packet.push(extensions.first().map_or(protocol, |first| first.0));
    packet.push(255);
    packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(rest);
    ethernet(MAC, IPV6, &packet)
}

fn neighbour(kind: u8, target: &str, option: Option<(u8, Mac)>) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    packet.extend(target.parse::<Ipv6Addr>().unwrap().octets());
    if let Some((option, mac)) = option {
        packet.extend([option, 1]);
        packet.extend(mac);
    }
    packet
}

#[test]
fn the_mac_is_the_guest_s_in_every_frame() {
    assert_eq!(check(&ethernet(OTHER, IPV4, &ipv4(OWN4, [1; 4], 6, &[])[14..])), Err(Spoofed::Mac));
    assert_eq!(check(&[0; 13]), Err(Spoofed::Mac));
    assert_eq!(check(&[]), Err(Spoofed::Unreadable));
}

#[test]
fn only_ip_and_arp_pass() {
    for kind in [0x8035, 0x8847, 0x8863, 0x8864, 0x88cc, 100, 0xffff] {
        assert_eq!(check(&ethernet(MAC, kind, &[0; 50])), Err(Spoofed::Type(kind)));
    }
}

#[test]
fn ipv4_sources() {
    assert_eq!(check(&ipv4(OWN4, [8, 8, 8, 8], 6, &[])), Ok(()));
    for source in [[10, 0, 0, 3], [127, 0, 0, 1], [0; 4], [255; 4], [224, 0, 0, 1]] {
        assert_eq!(check(&ipv4(source, [8, 8, 8, 8], 6, &[])), Err(Spoofed::Ipv4), "{source:?}");
    }
    let dhcp = [0, 68, 0, 67, 0, 8, 0, 0];
    assert_eq!(check(&ipv4([0; 4], [255; 4], UDP, &dhcp)), Ok(()), "a DHCP client");
    assert_eq!(check(&ipv4([0; 4], [255; 4], UDP, &[0, 67, 0, 68])), Err(Spoofed::Ipv4));
    assert_eq!(check(&ipv4([0; 4], [10, 0, 0, 1], UDP, &dhcp)), Err(Spoofed::Ipv4));
    assert_eq!(check(&ipv4([0; 4], [255; 4], 6, &dhcp)), Err(Spoofed::Ipv4));
    let mut fragment = ipv4([0; 4], [255; 4], UDP, &dhcp);
    fragment[14 + 7] = 1;
    assert_eq!(check(&fragment), Err(Spoofed::Ipv4));
}

#[test]
fn ipv4_headers_that_cannot_be_read() {
    for (at, value) in [(14, 0x65), (14, 0x44), (14, 0x4f)] {
        let mut frame = ipv4(OWN4, [8, 8, 8, 8], 6, &[]);
        frame[at] = value;
        assert_eq!(check(&frame), Err(Spoofed::Unreadable), "{value:#x}");
    }
    assert_eq!(check(&ipv4(OWN4, [8; 4], 6, &[])[..30]), Err(Spoofed::Unreadable));
}

#[test]
fn vlan_tags_hide_nothing() {
    let tag = |frame: Vec<u8>, kind: [u8; 2]| [&frame[..12], &kind, &[0, 5], &frame[12..]].concat();
    let (good, bad) = (ipv4(OWN4, [8; 4], 6, &[]), ipv4([9; 4], [8; 4], 6, &[]));
    for kind in [[0x81, 0x00], [0x88, 0xa8]] {
        assert_eq!(check(&tag(good.clone(), kind)), Ok(()));
        assert_eq!(check(&tag(bad.clone(), kind)), Err(Spoofed::Ipv4));
        assert_eq!(check(&tag(tag(bad.clone(), [0x81, 0]), kind)), Err(Spoofed::Ipv4));
    }
    let thrice = tag(tag(tag(good, [0x81, 0]), [0x81, 0]), [0x81, 0]);
    assert_eq!(check(&thrice), Err(Spoofed::Type(0x8100)));
}

#[test]
fn arp_says_who_one_is() {
    assert_eq!(check(&arp(1, MAC, OWN4)), Ok(()));
    assert_eq!(check(&arp(2, MAC, OWN4)), Ok(()));
    assert_eq!(check(&arp(1, MAC, [0; 4])), Ok(()), "a probe");
    assert_eq!(check(&arp(2, MAC, [0; 4])), Err(Spoofed::Arp));
    assert_eq!(check(&arp(2, MAC, [10, 0, 0, 1])), Err(Spoofed::Arp));
    assert_eq!(check(&arp(1, OTHER, OWN4)), Err(Spoofed::Arp));
    let mut other = arp(2, MAC, OWN4);
    other[14 + 4] = 8;
    assert_eq!(check(&other), Err(Spoofed::Arp), "another kind of ARP");
    assert_eq!(check(&arp(2, MAC, OWN4)[..31]), Err(Spoofed::Unreadable));
}

#[test]
fn ipv6_sources() {
    for source in [OWN6, LOCAL] {
        assert_eq!(check(&ipv6(source, &[], 6, &[])), Ok(()), "{source}");
    }
    for source in ["fd00::3", "fe80::1", "::1", "::", "ff02::1"] {
        assert_eq!(check(&ipv6(source, &[], 6, &[])), Err(Spoofed::Ipv6), "{source}");
    }
    let mut frame = ipv6(OWN6, &[], 6, &[]);
    frame[14] = 0x50;
    assert_eq!(check(&frame), Err(Spoofed::Unreadable));
}

#[test]
fn neighbour_discovery_says_who_one_is() {
    let icmp = |source: &str, payload: &[u8]| check(&ipv6(source, &[], ICMPV6, payload));
    let (solicit, advertise) = (NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT);
    assert_eq!(icmp(OWN6, &neighbour(solicit, "fd00::1", Some((1, MAC)))), Ok(()));
    assert_eq!(icmp(OWN6, &neighbour(solicit, "fd00::1", Some((1, OTHER)))), Err(Spoofed::Neighbour));
    assert_eq!(icmp(OWN6, &neighbour(advertise, OWN6, Some((2, MAC)))), Ok(()));
    assert_eq!(icmp(LOCAL, &neighbour(advertise, OWN6, Some((2, MAC)))), Ok(()));
    assert_eq!(icmp(OWN6, &neighbour(advertise, OWN6, Some((2, OTHER)))), Err(Spoofed::Neighbour));
    assert_eq!(icmp(OWN6, &neighbour(advertise, "fd00::1", Some((2, MAC)))), Err(Spoofed::Neighbour));
    assert_eq!(icmp(OWN6, &neighbour(advertise, "fd00::1", None)), Err(Spoofed::Neighbour));
    // Detection of duplicates: from nobody, for the own addresses only.
    assert_eq!(icmp("::", &neighbour(solicit, OWN6, None)), Ok(()));
    assert_eq!(icmp("::", &neighbour(solicit, LOCAL, None)), Ok(()));
    assert_eq!(icmp("::", &neighbour(solicit, "fd00::1", None)), Err(Spoofed::Neighbour));
    assert_eq!(icmp("::", &[128, 0, 0, 0]), Err(Spoofed::Ipv6), "an echo request from nobody");
    assert_eq!(icmp(OWN6, &[128, 0, 0, 0]), Ok(()));
    // Routers' words.
    assert_eq!(icmp(LOCAL, &[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]), Ok(()));
    for kind in [ROUTER_ADVERTISEMENT, REDIRECT] {
        assert_eq!(icmp(LOCAL, &[kind; 40]), Err(Spoofed::Neighbour));
    }
}

#[test]
fn options_are_looked_through() {
    let with = |options: &[u8]| {
        let packet = [&neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", None)[..], options].concat();
        check(&ipv6(OWN6, &[], ICMPV6, &packet))
    };
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let other = [&[1, 1][..], &OTHER].concat();
    assert_eq!(with(&nonce), Ok(()));
    assert_eq!(with(&[&nonce[..], &other].concat()), Err(Spoofed::Neighbour));
    assert_eq!(with(&[1, 2, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), Err(Spoofed::Neighbour), "a long address");
    assert_eq!(with(&[14, 0, 0, 0, 0, 0, 0, 0]), Err(Spoofed::Unreadable), "of no length");
    assert_eq!(with(&nonce.repeat(17)), Err(Spoofed::Unreadable), "too many");
    // What comes after the packet's end in a padded frame is nothing.
    let padded = [ipv6(OWN6, &[], ICMPV6, &neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", None)), other].concat();
    assert_eq!(check(&padded), Ok(()));
}

#[test]
fn extension_headers_hide_nothing() {
    let false_claim = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::1", None);
    for extensions in [
        &[(HOP_BY_HOP, &[0; 6][..])][..],
        &[(DESTINATION, &[0; 14])],
        &[(ROUTING, &[0; 6]), (DESTINATION, &[0; 6]), (AUTHENTICATION, &[0; 14])],
        &[(FRAGMENT, &[0, 1, 0, 0, 0, 1])],
    ] {
        assert_eq!(check(&ipv6(OWN6, extensions, ICMPV6, &false_claim)), Err(Spoofed::Neighbour), "{extensions:?}");
        assert_eq!(check(&ipv6(OWN6, extensions, 6, &[])), Ok(()), "{extensions:?}");
    }
    let true_claim = neighbour(NEIGHBOUR_ADVERTISEMENT, OWN6, None);
    assert_eq!(check(&ipv6(OWN6, &[(HOP_BY_HOP, &[0; 6])], ICMPV6, &true_claim)), Ok(()));
    let first: (u8, &[u8]) = (FRAGMENT, &[0, 1, 0, 0, 0, 1]);
    assert_eq!(check(&ipv6(OWN6, &[first], ICMPV6, &true_claim)), Err(Spoofed::Neighbour), "in fragments");
    let later: (u8, &[u8]) = (FRAGMENT, &[1, 0, 0, 0, 0, 1]);
    assert_eq!(check(&ipv6(OWN6, &[later], ICMPV6, &false_claim)), Ok(()), "no more than data");
    // A report of group membership comes with a hop-by-hop header, at first from nobody.
    assert_eq!(check(&ipv6("::", &[(HOP_BY_HOP, &[0; 6])], ICMPV6, &[LISTENER_REPORT_2, 0, 0, 0])), Ok(()));
    let many = [(DESTINATION, &[0u8; 6][..]); 10];
    assert_eq!(check(&ipv6(OWN6, &many, ICMPV6, &true_claim)), Err(Spoofed::Unreadable));
    let long = vec![0; 246];
    assert_eq!(check(&ipv6(OWN6, &[(DESTINATION, &long)], ICMPV6, &true_claim)), Err(Spoofed::Unreadable));
}

proptest! {
    /// What passes has the guest's MAC, and the guest's address or none wherever an address is.
    #[test]
    fn whatever_passes_is_the_guest_s(
        mut frame in proptest::collection::vec(any::<u8>(), 0..300), kind in 0usize..6, own: bool,
    ) {
        if frame.len() >= 60 {
            frame[6..12].copy_from_slice(&MAC);
            let [high, low] = [IPV4, IPV6, ARP, 0x8100, 0x88a8, 0][kind].to_be_bytes();
            (frame[12], frame[13]) = (high, low);
            match kind {
                0 => frame[14] = 0x45,
                1 => frame[14] = 0x60,
                _ => {}
            }
            if own && kind == 1 {
                frame[22..38].copy_from_slice(&OWN6.parse::<Ipv6Addr>().unwrap().octets());
            }
        }
        if check(&frame).is_ok() {
            prop_assert_eq!(&frame[6..12], &MAC);
            match u16::from_be_bytes([frame[12], frame[13]]) {
                IPV4 => prop_assert!(frame[26..30] == OWN4 || frame[26..30] == [0; 4]),
                ARP => prop_assert!(frame[28..32] == OWN4 || frame[28..32] == [0; 4]),
                IPV6 => {
                    let source = Ipv6Addr::from(<[u8; 16]>::try_from(&frame[22..38]).unwrap());
                    prop_assert!([OWN6, LOCAL, "::"].contains(&source.to_string().as_str()));
                }
                kind => prop_assert!(VLAN.contains(&kind)),
            }
        }
    }
}

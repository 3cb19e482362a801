//! Whose addresses a guest may send from, as a pure function of a frame's first bytes: its own MAC, IPv4 and IPv6 addresses, in IP
//! headers, in ARP and in neighbour discovery.
//!
//! What is not understood is refused: a frame is passed only if it is IPv4, IPv6 or ARP, behind at most two VLAN tags, and all
//! that says where it comes from was seen. So are router advertisements and redirects: a pod is no router. The
//! caller hands the very bytes that were looked at to the kernel, not those that the guest may have changed since.

use std::net::{Ipv4Addr, Ipv6Addr};

use caisson_protos::monitor::AllowedSources;

use super::{filter::Mac, header::ETHERNET};

/// As many bytes of a frame must be given, or all of it: Ethernet, two tags, IPv6 and some extension headers, a neighbour
/// advertisement with its options.
pub const LOOKED_AT: usize = 256;
/// The most extension headers of an IPv6 packet.
const MAX_EXTENSIONS: usize = 8;
/// The most options of a neighbour discovery packet.
const MAX_OPTIONS: usize = 16;

// Ethernet types (include/uapi/linux/if_ether.h).
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const VLAN: [u16; 2] = [0x8100, 0x88a8];

// IP protocols and IPv6 extension headers.
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const DESTINATION: u8 = 60;

// ICMPv6 types.
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_REPORT_2: u8 = 143;

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Spoofed {
    /// The Ethernet source.
    #[error("another's MAC")]
    Mac,
    /// Neither IP nor ARP.
    #[error("Ethernet type {0:#06x}")]
    Type(u16),
    /// The IPv4 source.
    #[error("another's IPv4 address")]
    Ipv4,
    /// The IPv6 source.
    #[error("another's IPv6 address")]
    Ipv6,
    /// An ARP packet.
    #[error("ARP for another")]
    Arp,
    /// A neighbour discovery packet.
    #[error("neighbour discovery for another")]
    Neighbour,
    /// Headers that end too early, or too late to be looked at.
    #[error("headers that cannot be read")]
    Unreadable,
}

/// Whose addresses may be used.
#[derive(Clone, Debug)]
pub struct Sources {
    mac: Mac,
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
}

impl Sources {
    /// Those of a device with the address `mac`, and the link-local IPv6 address that follows from it.
    pub fn new(mac: Mac, allowed: &AllowedSources) -> Self {
        let [a, b, c, d, e, f] = mac;
        let own = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        let mut ipv6 = allowed.ipv6.clone();
        ipv6.push(own.into());
        Self { mac, ipv4: allowed.ipv4.clone(), ipv6 }
    }

    /// Checks a frame, of which `frame` is the first [`LOOKED_AT`] bytes or all.
    ///
    /// # Errors
    /// See [`Spoofed`].
    pub fn check(&self, frame: &[u8]) -> Result<(), Spoofed> {
        if array::<6>(frame, 6)? != self.mac {
            return Err(Spoofed::Mac);
        }
        let mut at = ETHERNET - 2;
        let mut kind = u16::from_be_bytes(array(frame, at)?);
        for _ in 0..2 {
            if VLAN.contains(&kind) {
                at += 4;
                kind = u16::from_be_bytes(array(frame, at)?);
            }
        }
        let packet = frame.get(at + 2..).unwrap_or_default();
        match kind {
            IPV4 => self.ipv4(packet),
            IPV6 => self.ipv6(packet),
            ARP => self.arp(packet),
            other => Err(Spoofed::Type(other)),
        }
    }

    fn ipv4(&self, packet: &[u8]) -> Result<(), Spoofed> {
        let [version_length] = array(packet, 0)?;
        let header = usize::from(version_length & 0xf) * 4;
        if version_length >> 4 != 4 || header < 20 || packet.len() < header {
            return Err(Spoofed::Unreadable);
        }
        let source = Ipv4Addr::from(array::<4>(packet, 12)?);
        if self.ipv4.contains(&source) || source.is_unspecified() && is_dhcp_client(packet, header)? {
            Ok(())
        } else {
            Err(Spoofed::Ipv4)
        }
    }

    fn arp(&self, packet: &[u8]) -> Result<(), Spoofed> {
        // Ethernet and IPv4, with their lengths.
        if array(packet, 0)? != [0, 1, 8, 0, 6, 4] {
            return Err(Spoofed::Arp);
        }
        let is_request = array(packet, 6)? == [0, 1];
        let (sender, address) = (array::<6>(packet, 8)?, Ipv4Addr::from(array::<4>(packet, 14)?));
        // A probe asks whether an address is free (RFC 5227).
        let allowed = self.ipv4.contains(&address) || is_request && address.is_unspecified();
        if sender == self.mac && allowed { Ok(()) } else { Err(Spoofed::Arp) }
    }

    fn ipv6(&self, packet: &[u8]) -> Result<(), Spoofed> {
        if array::<1>(packet, 0)?[0] >> 4 != 6 {
            return Err(Spoofed::Unreadable);
        }
        let source = Ipv6Addr::from(array::<16>(packet, 8)?);
        let unspecified = source.is_unspecified();
        if !unspecified && !self.ipv6.contains(&source) {
            return Err(Spoofed::Ipv6);
        }
        match upper_layer(packet)? {
            Upper::Icmp { at, is_fragment } => self.icmpv6(packet, at, unspecified, is_fragment),
            // A later fragment or another protocol: the source is all there is.
            Upper::Other if unspecified => Err(Spoofed::Ipv6),
            Upper::Other => Ok(()),
        }
    }

    fn icmpv6(&self, packet: &[u8], at: usize, unspecified: bool, is_fragment: bool) -> Result<(), Spoofed> {
        let [kind] = array(packet, at)?;
        let (options, target) = match kind {
            LISTENER_REPORT | LISTENER_DONE | LISTENER_REPORT_2 => return Ok(()),
            ROUTER_SOLICITATION => (at + 8, None),
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(Spoofed::Neighbour),
            NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {
                (at + 24, Some(Ipv6Addr::from(array::<16>(packet, at + 8)?)))
            }
            _ if unspecified => return Err(Spoofed::Ipv6),
            _ => return Ok(()),
        };
        // Nobody takes it in fragments (RFC 6980).
        if is_fragment {
            return Err(Spoofed::Neighbour);
        }
        // An advertisement claims the target, and so does a solicitation from nobody: another machine that tests that address for
        // being free takes it as taken (RFC 4862, 5.4.3).
        let claims = kind == NEIGHBOUR_ADVERTISEMENT || unspecified && kind == NEIGHBOUR_SOLICITATION;
        if claims && target.is_some_and(|target| !self.ipv6.contains(&target)) {
            return Err(Spoofed::Neighbour);
        }
        self.options(packet, options)
    }

    /// The link-layer addresses in the options of a neighbour discovery packet are the sender's.
    fn options(&self, packet: &[u8], start: usize) -> Result<(), Spoofed> {
        // What follows the packet in its frame is not a part of it.
        let length = usize::from(u16::from_be_bytes(array(packet, 4)?)) + 40;
        let (mut at, mut count) = (start, 0);
        while at < length {
            count += 1;
            let [kind, units] = array(packet, at)?;
            if units == 0 || count > MAX_OPTIONS {
                return Err(Spoofed::Unreadable);
            }
            // 1: source, 2: target.
            if matches!(kind, 1 | 2) && (units != 1 || array::<6>(packet, at + 2)? != self.mac) {
                return Err(Spoofed::Neighbour);
            }
            at += usize::from(units) * 8;
        }
        Ok(())
    }
}

/// What an IPv6 packet carries.
enum Upper {
    Icmp { at: usize, is_fragment: bool },
    Other,
}

fn upper_layer(packet: &[u8]) -> Result<Upper, Spoofed> {
    let [mut next] = array(packet, 6)?;
    let (mut at, mut is_fragment) = (40, false);
    for _ in 0..=MAX_EXTENSIONS {
        let header = match next {
            ICMPV6 => return Ok(Upper::Icmp { at, is_fragment }),
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT | AUTHENTICATION => array::<4>(packet, at)?,
            _ => return Ok(Upper::Other),
        };
        let [following, length, high, low] = header;
        at += match next {
            FRAGMENT => {
                // The first one has the offset 0.
                if u16::from_be_bytes([high, low]) >> 3 != 0 {
                    return Ok(Upper::Other);
                }
                is_fragment = true;
                8
            }
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        next = following;
    }
    Err(Spoofed::Unreadable)
}

/// A whole datagram from the client's port to the server's, to everybody: a client without an address.
fn is_dhcp_client(packet: &[u8], header: usize) -> Result<bool, Spoofed> {
    let [protocol] = array(packet, 9)?;
    let fragment = u16::from_be_bytes(array(packet, 6)?) & 0x3fff;
    let everybody = Ipv4Addr::from(array::<4>(packet, 16)?).is_broadcast();
    Ok(protocol == UDP && fragment == 0 && everybody && array(packet, header)? == [0, 68, 0, 67])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Spoofed> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(Spoofed::Unreadable)
}

#[cfg(test)]
#[path = "tests/sources.rs"]
mod tests;

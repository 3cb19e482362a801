//! Neighbours: which hardware address an address has.

use std::{fmt, net::IpAddr};

use crate::message::{Message, attributes, family, ip, u8_at, u16_at, u32_at, unspecified};

/// `struct ndmsg`, bytes.
const HEADER: usize = 12;

/// An entry of the table of neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub interface: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// NUD_*.
    pub state: u16,
}

impl Neighbour {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let mut neighbour = Self {
            ip: unspecified(u8_at(payload, 0)?)?,
            interface: u32_at(payload, 4)?,
            state: u16_at(payload, 8)?,
            mac: Vec::new(),
        };
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                libc::NDA_DST => neighbour.ip = ip(value)?,
                libc::NDA_LLADDR => neighbour.mac = value.to_vec(),
                _ => {}
            }
        }
        Some(neighbour)
    }

    /// Whether it was set and not found out.
    #[must_use]
    pub fn is_static(&self) -> bool {
        self.state & libc::NUD_PERMANENT != 0
    }

    fn message(&self, kind: u16, flags: i32) -> Message {
        let mut header = vec![family(self.ip), 0, 0, 0];
        header.extend(self.interface.to_ne_bytes());
        header.extend(libc::NUD_PERMANENT.to_ne_bytes());
        header.extend([0, libc::RTN_UNICAST]);
        let mut message = Message::new(kind, flags, &header);
        message.ip(libc::NDA_DST, self.ip);
        message
    }

    /// The request that sets it for good, whatever is known of the address.
    #[must_use]
    pub fn set(&self) -> Message {
        let mut message = self.message(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.bytes(libc::NDA_LLADDR, &self.mac);
        message
    }

    /// The request that removes it.
    #[must_use]
    pub fn remove(&self) -> Message {
        self.message(libc::RTM_DELNEIGH, 0)
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.ip, mac(&self.mac))
    }
}

/// A hardware address as it is usually written.
#[must_use]
pub fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Asks for all of a family (AF_INET, AF_INET6).
#[must_use]
pub fn list(family: i32) -> Message {
    let mut header = [0; HEADER];
    header[0] = family as u8;
    Message::new(libc::RTM_GETNEIGH, 0, &header)
}

/// Whether a notification with this payload is of an entry that was set and not found out.
#[must_use]
pub fn is_static(payload: &[u8]) -> bool {
    Neighbour::parse(payload).is_some_and(|neighbour| neighbour.is_static())
}

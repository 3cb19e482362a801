//! Network interfaces.

use crate::{
    message::{Message, attributes, text, u16_at, u32_at},
    uapi::{
        IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_IFNAME, IFLA_INET6_ADDR_GEN_MODE, IFLA_INFO_KIND, IFLA_LINK,
        IFLA_LINK_NETNSID, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_NUM_TX_QUEUES, IFLA_PARENT_DEV_NAME, IFLA_TXQLEN,
        IN6_ADDR_GEN_MODE_NONE,
    },
};

/// `struct ifinfomsg`, bytes.
const HEADER: usize = 16;
/// The longest name of an interface, bytes (IFNAMSIZ without the zero).
pub const NAME_MAX: usize = 15;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number, unique in the namespace.
    pub index: u32,
    /// Its name, unique in the namespace.
    pub name: String,
    /// Its hardware address; six bytes for Ethernet.
    pub mac: Vec<u8>,
    /// The largest packet.
    pub mtu: u32,
    /// IFF_*.
    pub flags: u32,
    /// ARPHRD_*.
    pub hardware: u16,
    /// veth, macvlan, ...; None for loopback and for physical devices.
    pub kind: Option<String>,
    /// The interface on which it lies (vlan, macvlan, ipvlan), if that is in the same namespace.
    pub below: Option<u32>,
    /// The bridge or bond of which it is a port.
    pub controller: Option<u32>,
    /// The device behind it, as its bus calls it.
    pub device: Option<String>,
    /// How many transmit queues it has.
    pub tx_queues: u32,
    /// How many packets may wait to be sent; 0 for devices that let none wait.
    pub queue_length: u32,
}

impl Link {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let mut link = Self {
            hardware: u16_at(payload, 2)?,
            index: u32_at(payload, 4)?,
            flags: u32_at(payload, 8)?,
            ..Self::default()
        };
        let mut elsewhere = false;
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                IFLA_IFNAME => link.name = text(value),
                IFLA_ADDRESS => link.mac = value.to_vec(),
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_LINK => link.below = u32_at(value, 0).filter(|below| *below != 0 && *below != link.index),
                IFLA_LINK_NETNSID => elsewhere = true,
                IFLA_MASTER => link.controller = u32_at(value, 0),
                IFLA_LINKINFO => {
                    let info = attributes(value, 0).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    link.kind = info.map(|(_, kind)| text(kind));
                }
                IFLA_NUM_TX_QUEUES => link.tx_queues = u32_at(value, 0)?,
                IFLA_TXQLEN => link.queue_length = u32_at(value, 0)?,
                IFLA_PARENT_DEV_NAME => link.device = Some(text(value)),
                _ => {}
            }
        }
        // For a pair that is the other end.
        let pair = matches!(link.kind.as_deref(), Some("veth" | "netkit"));
        link.below = link.below.filter(|_| !elsewhere && !pair);
        Some(link)
    }

    /// Whether this is IFF_LOOPBACK.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }

    /// Whether this is IFF_UP.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Whether it resolves addresses to hardware addresses.
    #[must_use]
    pub fn has_arp(&self) -> bool {
        self.flags & libc::IFF_NOARP as u32 == 0
    }
}

/// Asks for all of them.
#[must_use]
pub fn list() -> Message {
    Message::new(libc::RTM_GETLINK, 0, &[0; HEADER])
}

fn change(index: u32, flags: u32, mask: u32) -> Message {
    request(libc::RTM_NEWLINK, index, flags, mask)
}

fn request(kind: u16, index: u32, flags: u32, mask: u32) -> Message {
    let mut header = [0; HEADER];
    for (place, value) in [(4, index), (8, flags), (12, mask)] {
        if let Some(field) = header.get_mut(place..place + 4) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
    Message::new(kind, 0, &header)
}

/// Sets and clears IFF_* flags.
#[must_use]
pub fn set_flags(index: u32, flags: i32, mask: i32) -> Message {
    change(index, flags as u32, mask as u32)
}

/// Gives it another name.
#[must_use]
pub fn rename(index: u32, name: &str) -> Message {
    let mut message = change(index, 0, 0);
    message.text(IFLA_IFNAME, name);
    message
}

/// Sets the largest packet.
#[must_use]
pub fn set_mtu(index: u32, mtu: u32) -> Message {
    let mut message = change(index, 0, 0);
    message.u32(IFLA_MTU, mtu);
    message
}

/// Sets how many packets may wait to be sent.
#[must_use]
pub fn set_queue_length(index: u32, packets: u32) -> Message {
    let mut message = change(index, 0, 0);
    message.u32(IFLA_TXQLEN, packets);
    message
}

/// The kernel makes no IPv6 link-local address of its own when the interface goes up.
#[must_use]
pub fn without_link_local(index: u32) -> Message {
    let mut message = change(index, 0, 0);
    message.nested(IFLA_AF_SPEC, |families| {
        families.nested(libc::AF_INET6 as u16, |inet6| {
            inet6.u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
        });
    });
    message
}

/// Removes it; so a tap goes while somebody still has it open.
#[must_use]
pub fn remove(index: u32) -> Message {
    request(libc::RTM_DELLINK, index, 0, 0)
}

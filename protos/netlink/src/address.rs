//! Addresses of interfaces.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use crate::{
    message::{Message, attributes, family, ip, text, u8_at, u32_at},
    uapi::{IFA_FLAGS, IFA_RT_PRIORITY},
};

/// `struct ifaddrmsg`, bytes.
const HEADER: usize = 8;
/// A lifetime without end.
pub const FOREVER: u32 = u32::MAX;

/// The flags that are part of an address and not of its state.
pub const KEPT_FLAGS: u32 =
    libc::IFA_F_HOMEADDRESS | libc::IFA_F_MANAGETEMPADDR | libc::IFA_F_NOPREFIXROUTE | libc::IFA_F_MCAUTOJOIN;

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub interface: u32,
    /// The address.
    pub ip: IpAddr,
    /// Its network, or its peer's, in bits.
    pub prefix: u8,
    /// The other end of a point-to-point connection.
    pub peer: Option<IpAddr>,
    /// IPv4: where broadcasts go.
    pub broadcast: Option<Ipv4Addr>,
    /// IPv4: its label, which is usually the interface's name.
    pub label: Option<String>,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// IFA_F_*.
    pub flags: u32,
    /// The metric of the route to its network, 0 for the kernel's choice.
    pub metric: u32,
    /// Seconds for which it may be used, [`FOREVER`] usually.
    pub valid: u32,
    /// Seconds for which it may be used for what is new.
    pub preferred: u32,
}

impl Address {
    /// An address that is for ever and has nothing but itself.
    #[must_use]
    pub fn new(interface: u32, ip: IpAddr, prefix: u8) -> Self {
        Self {
            interface,
            ip,
            prefix,
            peer: None,
            broadcast: None,
            label: None,
            scope: 0,
            flags: 0,
            metric: 0,
            valid: FOREVER,
            preferred: FOREVER,
        }
    }

    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let unspecified = crate::message::unspecified(u8_at(payload, 0)?)?;
        let mut address = Self::new(u32_at(payload, 4)?, unspecified, u8_at(payload, 1)?);
        address.flags = u8_at(payload, 2)?.into();
        address.scope = u8_at(payload, 3)?;
        let (mut local, mut other) = (None, None);
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                libc::IFA_LOCAL => local = ip(value),
                libc::IFA_ADDRESS => other = ip(value),
                libc::IFA_BROADCAST => {
                    address.broadcast = match ip(value)? {
                        IpAddr::V4(broadcast) => Some(broadcast),
                        IpAddr::V6(_) => None,
                    }
                }
                libc::IFA_LABEL => address.label = Some(text(value)),
                IFA_FLAGS => address.flags = u32_at(value, 0)?,
                IFA_RT_PRIORITY => address.metric = u32_at(value, 0)?,
                libc::IFA_CACHEINFO => {
                    address.preferred = u32_at(value, 0)?;
                    address.valid = u32_at(value, 4)?;
                }
                _ => {}
            }
        }
        address.ip = local.or(other)?;
        address.peer = other.filter(|other| *other != address.ip);
        Some(address)
    }

    /// Whether two addresses of one interface are alike but for state and the rest of a lifetime.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        let comparable = |address: &Self| Self {
            // That of an IPv6 address follows from the address.
            scope: if address.ip.is_ipv4() { address.scope } else { 0 },
            flags: address.flags & KEPT_FLAGS,
            valid: if address.valid == FOREVER { FOREVER } else { 0 },
            preferred: if address.preferred == FOREVER { FOREVER } else { 0 },
            ..address.clone()
        };
        comparable(self) == comparable(other)
    }

    fn message(&self, kind: u16, flags: i32) -> Message {
        let [low, ..] = self.flags.to_ne_bytes();
        let mut header = vec![family(self.ip), self.prefix, low, self.scope];
        header.extend(self.interface.to_ne_bytes());
        let mut message = Message::new(kind, flags, &header);
        message.ip(libc::IFA_LOCAL, self.ip).ip(libc::IFA_ADDRESS, self.peer.unwrap_or(self.ip));
        message
    }

    /// The request that adds it.
    #[must_use]
    pub fn add(&self) -> Message {
        let mut message = self.message(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        message.u32(IFA_FLAGS, self.flags);
        if let Some(broadcast) = self.broadcast {
            message.ip(libc::IFA_BROADCAST, broadcast.into());
        }
        if let Some(label) = &self.label {
            message.text(libc::IFA_LABEL, label);
        }
        if self.metric != 0 {
            message.u32(IFA_RT_PRIORITY, self.metric);
        }
        if self.valid != FOREVER || self.preferred != FOREVER {
            let mut lifetime = [0; 16];
            lifetime.as_mut_slice()[..4].copy_from_slice(&self.preferred.to_ne_bytes());
            lifetime.as_mut_slice()[4..8].copy_from_slice(&self.valid.to_ne_bytes());
            message.bytes(libc::IFA_CACHEINFO, &lifetime);
        }
        message
    }

    /// The request that removes it.
    #[must_use]
    pub fn remove(&self) -> Message {
        self.message(libc::RTM_DELADDR, 0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "{} peer {peer}/{}", self.ip, self.prefix),
            None => write!(f, "{}/{}", self.ip, self.prefix),
        }
    }
}

/// Asks for all of them.
#[must_use]
pub fn list() -> Message {
    Message::new(libc::RTM_GETADDR, 0, &[0; HEADER])
}

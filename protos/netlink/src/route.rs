//! Routes.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use crate::{
    address::FOREVER,
    message::{Message, attributes, family, ip, text, u8_at, u16_at, u32_at, unspecified},
    uapi::{RTA_ENCAP, RTA_EXPIRES, RTA_PREF, RTA_VIA, RTAX_CC_ALGO, RTM_F_CLONED, RTNH_F_ONLINK},
};

/// `struct rtmsg`, bytes.
const HEADER: usize = 12;
/// `struct rtnexthop`, bytes.
const HOP_HEADER: usize = 8;
/// Clock ticks in a second, as the kernel tells them to programs.
const TICKS: u32 = 100;

/// A route. Its family is that of its destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The network, or all zeros.
    pub destination: IpAddr,
    /// The network's bits; 0 for the default route.
    pub prefix: u8,
    /// RT_TABLE_*.
    pub table: u32,
    /// Type of service; 0 for any.
    pub tos: u8,
    /// RTPROT_*: who made it.
    pub protocol: u8,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// RTN_*: unicast, blackhole, ...
    pub kind: u8,
    /// Its priority: the lowest is taken.
    pub metric: u32,
    /// The address that what is sent comes from.
    pub source: Option<IpAddr>,
    /// IPv6: the router's preference (RFC 4191).
    pub preference: u8,
    /// RTAX_*, numbers: MTU, window, ...
    pub metrics: BTreeMap<u16, u32>,
    /// RTAX_CC_ALGO.
    pub congestion: Option<String>,
    /// Where to; several for a multipath route, none for a blackhole.
    pub hops: Vec<Hop>,
    /// Seconds until it goes, [`FOREVER`] usually.
    pub expires: u32,
    /// What it has that this type cannot say.
    pub beyond: Option<&'static str>,
}

/// A next hop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// The interface's number.
    pub interface: u32,
    /// The next machine, which may have an address of the other family.
    pub gateway: Option<IpAddr>,
    /// The gateway is taken to be reachable through the interface, whatever other routes say.
    pub on_link: bool,
    /// Its share less one.
    pub weight: u8,
}

impl Hop {
    fn read(&mut self, kind: u16, value: &[u8]) -> Option<()> {
        match kind {
            libc::RTA_OIF => self.interface = u32_at(value, 0)?,
            libc::RTA_GATEWAY => self.gateway = ip(value),
            RTA_VIA => self.gateway = ip(value.get(2..)?),
            _ => {}
        }
        Some(())
    }

    fn write(&self, message: &mut Message, destination: IpAddr) {
        match self.gateway {
            Some(gateway) if gateway.is_ipv4() == destination.is_ipv4() => {
                message.ip(libc::RTA_GATEWAY, gateway);
            }
            Some(IpAddr::V4(gateway)) => {
                let family = (libc::AF_INET as u16).to_ne_bytes();
                message.bytes(RTA_VIA, &[family.as_slice(), &gateway.octets()].concat());
            }
            Some(IpAddr::V6(gateway)) => {
                let family = (libc::AF_INET6 as u16).to_ne_bytes();
                message.bytes(RTA_VIA, &[family.as_slice(), &gateway.octets()].concat());
            }
            None => {}
        }
    }

    fn flags(&self) -> u8 {
        if self.on_link { RTNH_F_ONLINK } else { 0 }
    }
}

impl Route {
    /// A unicast route of the main table, made by an administrator, without a next hop yet.
    #[must_use]
    pub fn new(destination: IpAddr, prefix: u8) -> Self {
        Self {
            destination,
            prefix,
            table: libc::RT_TABLE_MAIN.into(),
            tos: 0,
            protocol: libc::RTPROT_BOOT,
            scope: libc::RT_SCOPE_UNIVERSE,
            kind: libc::RTN_UNICAST,
            metric: 0,
            source: None,
            preference: 0,
            metrics: BTreeMap::new(),
            congestion: None,
            hops: Vec::new(),
            expires: FOREVER,
            beyond: None,
        }
    }

    /// None for what is malformed. `Some(None)` for an entry of a cache.
    pub(crate) fn parse(payload: &[u8]) -> Option<Option<Self>> {
        let mut route = Self::new(unspecified(u8_at(payload, 0)?)?, u8_at(payload, 1)?);
        if u8_at(payload, 2)? != 0 {
            route.beyond = Some("a source prefix");
        }
        route.tos = u8_at(payload, 3)?;
        route.table = u8_at(payload, 4)?.into();
        route.protocol = u8_at(payload, 5)?;
        route.scope = u8_at(payload, 6)?;
        route.kind = u8_at(payload, 7)?;
        let flags = u32_at(payload, 8)?;
        if flags & RTM_F_CLONED != 0 {
            return Some(None);
        }
        let mut single = Hop { on_link: flags & u32::from(RTNH_F_ONLINK) != 0, ..Hop::default() };
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                libc::RTA_DST => route.destination = ip(value)?,
                libc::RTA_TABLE => route.table = u32_at(value, 0)?,
                libc::RTA_PRIORITY => route.metric = u32_at(value, 0)?,
                libc::RTA_PREFSRC => route.source = ip(value),
                libc::RTA_METRICS => route.read_metrics(value)?,
                libc::RTA_MULTIPATH => route.hops = hops(value)?,
                libc::RTA_FLOW => route.beyond = Some("a realm"),
                libc::RTA_CACHEINFO => match u32_at(value, 8)? {
                    0 => {}
                    ticks => route.expires = (ticks / TICKS).max(1),
                },
                RTA_PREF => route.preference = u8_at(value, 0)?,
                RTA_ENCAP => route.beyond = Some("an encapsulation"),
                _ => single.read(kind, value)?,
            }
        }
        if route.hops.is_empty() && single.interface != 0 {
            route.hops.push(single);
        }
        Some(Some(route))
    }

    fn read_metrics(&mut self, value: &[u8]) -> Option<()> {
        for (kind, value) in attributes(value, 0) {
            if kind == RTAX_CC_ALGO {
                self.congestion = Some(text(value));
            } else {
                self.metrics.insert(kind, u32_at(value, 0)?);
            }
        }
        Some(())
    }

    fn message(&self, kind: u16, flags: i32) -> Message {
        let on_link = match self.hops.as_slice() {
            [hop] => hop.flags().into(),
            _ => 0u32,
        };
        // The attribute holds the whole number.
        let table = u8::try_from(self.table).unwrap_or(libc::RT_TABLE_UNSPEC);
        let mut header =
            vec![family(self.destination), self.prefix, 0, self.tos, table, self.protocol, self.scope, self.kind];
        header.extend(on_link.to_ne_bytes());
        let mut message = Message::new(kind, flags, &header);
        message.u32(libc::RTA_TABLE, self.table);
        if self.prefix != 0 {
            message.ip(libc::RTA_DST, self.destination);
        }
        if self.metric != 0 {
            message.u32(libc::RTA_PRIORITY, self.metric);
        }
        if let Some(source) = self.source {
            message.ip(libc::RTA_PREFSRC, source);
        }
        match self.hops.as_slice() {
            [] => {}
            [hop] => {
                message.u32(libc::RTA_OIF, hop.interface);
                hop.write(&mut message, self.destination);
            }
            hops => {
                message.bytes(libc::RTA_MULTIPATH, &multipath(hops, self.destination));
            }
        }
        message
    }

    /// The request that adds it, beside others to the same network.
    #[must_use]
    pub fn add(&self) -> Message {
        let mut message = self.message(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_APPEND);
        if !self.metrics.is_empty() || self.congestion.is_some() {
            message.nested(libc::RTA_METRICS, |metrics| {
                for (kind, value) in &self.metrics {
                    metrics.u32(*kind, *value);
                }
                if let Some(name) = &self.congestion {
                    metrics.text(RTAX_CC_ALGO, name);
                }
            });
        }
        if self.preference != 0 {
            message.u8(RTA_PREF, self.preference);
        }
        if self.expires != FOREVER {
            message.u32(RTA_EXPIRES, self.expires);
        }
        message
    }

    /// The request that removes it.
    #[must_use]
    pub fn remove(&self) -> Message {
        self.message(libc::RTM_DELROUTE, 0)
    }

    /// Whether two routes are alike but for the rest of a lifetime.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        let comparable =
            |route: &Self| Self { expires: if route.expires == FOREVER { FOREVER } else { 0 }, ..route.clone() };
        comparable(self) == comparable(other)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            0 => write!(f, "default")?,
            prefix => write!(f, "{}/{prefix}", self.destination)?,
        }
        for gateway in self.hops.iter().filter_map(|hop| hop.gateway) {
            write!(f, " via {gateway}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

fn hops(mut rest: &[u8]) -> Option<Vec<Hop>> {
    let mut hops = Vec::new();
    while !rest.is_empty() {
        let length = usize::from(u16_at(rest, 0)?);
        let entry = rest.get(..length).filter(|entry| entry.len() >= HOP_HEADER)?;
        let mut hop = Hop {
            on_link: u8_at(entry, 2)? & RTNH_F_ONLINK != 0,
            weight: u8_at(entry, 3)?,
            interface: u32_at(entry, 4)?,
            gateway: None,
        };
        for (kind, value) in attributes(entry, HOP_HEADER) {
            hop.read(kind, value)?;
        }
        hops.push(hop);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(hops)
}

fn multipath(hops: &[Hop], destination: IpAddr) -> Vec<u8> {
    let mut all = Vec::new();
    for hop in hops {
        let mut attributes = Message::new(0, 0, &[]);
        hop.write(&mut attributes, destination);
        // A gateway is 24 bytes at most.
        let length = (HOP_HEADER + attributes.body().len()) as u16;
        all.extend(length.to_ne_bytes());
        all.extend([hop.flags(), hop.weight]);
        all.extend(hop.interface.to_ne_bytes());
        all.extend(attributes.body());
    }
    all
}

/// Asks for all of a family (AF_INET, AF_INET6).
#[must_use]
pub fn list(family: i32) -> Message {
    let mut header = [0; HEADER];
    header[0] = family as u8;
    Message::new(libc::RTM_GETROUTE, 0, &header)
}

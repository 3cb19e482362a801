//! A request under construction, and the attributes of an answer. Numbers are in the host's byte order, as everywhere in rtnetlink
//! but for addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK, NlasIterator};

/// The header that every message begins with (`struct nlmsghdr`), bytes.
pub(crate) const HEADER: usize = 16;

/// A request: its type, its flags beyond NLM_F_REQUEST, the family's header and the attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    body: Vec<u8>,
    /// An attribute was longer than its length field can say.
    too_long: bool,
}

impl Message {
    /// A request without attributes. `flags` are NLM_F_*.
    #[must_use]
    pub fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        Self { kind, flags: flags as u16, body: header.to_vec(), too_long: false }
    }

    /// Adds an attribute.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let Ok(length) = u16::try_from(NLA_HEADER_SIZE + value.len()) else {
            self.too_long = true;
            return self;
        };
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute of one byte.
    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    /// Adds a number.
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds a string, with the zero that ends it.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds an address.
    pub fn ip(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(ip) => self.bytes(kind, &ip.octets()),
            IpAddr::V6(ip) => self.bytes(kind, &ip.octets()),
        }
    }

    /// Adds an attribute that holds the attributes that `fill` adds.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inner = Self::new(0, 0, &[]);
        fill(&mut inner);
        self.too_long |= inner.too_long;
        self.bytes(kind | NLA_F_NESTED, &inner.body)
    }

    /// The family's header and the attributes.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The whole message with its header, or None if it is too long for one.
    pub(crate) fn encode(&self, flags: i32, sequence: u32) -> Option<Vec<u8>> {
        let length = u32::try_from(HEADER + self.body.len()).ok().filter(|_| !self.too_long)?;
        let mut message = Vec::with_capacity(length as usize);
        message.extend(length.to_ne_bytes());
        message.extend(self.kind.to_ne_bytes());
        message.extend((self.flags | flags as u16).to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend([0; 4]); // the port: the kernel fills it in
        message.extend(&self.body);
        Some(message)
    }
}

/// A message that was received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// The messages of one datagram; ends at the first that is not whole.
pub(crate) fn received(datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32_at(rest, 0)? as usize;
        let payload = rest.get(HEADER..length)?;
        let message = Received { kind: u16_at(rest, 4)?, flags: u16_at(rest, 6)?, sequence: u32_at(rest, 8)?, payload };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes behind a header of `header` bytes; what is behind the first malformed one is not seen.
pub(crate) fn attributes(payload: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let bytes = payload.get(header..).unwrap_or_default();
    NlasIterator::new(bytes).map_while(|attribute| {
        let attribute = attribute.ok()?;
        let (kind, length) = (attribute.kind() & NLA_TYPE_MASK, usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(NLA_HEADER_SIZE..length)?))
    })
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u8_at(bytes: &[u8], offset: usize) -> Option<u8> {
    bytes.get(offset).copied()
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_ne_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_ne_bytes)
}

/// A string up to its zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// An address, whose length says the family.
pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => array_at(bytes, 0).map(|octets: [u8; 4]| Ipv4Addr::from(octets).into()),
        16 => array_at(bytes, 0).map(|octets: [u8; 16]| Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

/// AF_INET or AF_INET6.
pub(crate) fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// The address of all zeros of the family of `like`.
pub(crate) fn unspecified(family: u8) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::UNSPECIFIED.into()),
        libc::AF_INET6 => Some(Ipv6Addr::UNSPECIFIED.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut message = Message::new(16, 0, &[9; 16]);
        message.u32(4, 1500).text(3, "eth0").nested(18, |info| {
            info.text(1, "veth").ip(2, "2001:db8::1".parse().unwrap());
        });
        let encoded = message.encode(libc::NLM_F_ACK, 7).unwrap();
        let all: Vec<_> = received(&encoded).collect();
        assert_eq!((all.len(), all[0].kind, all[0].sequence, i32::from(all[0].flags)), (1, 16, 7, libc::NLM_F_ACK));
        let found: Vec<_> = attributes(all[0].payload, 16).collect();
        assert_eq!(found.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [4, 3, 18]);
        assert_eq!((u32_at(found[0].1, 0), text(found[1].1).as_str()), (Some(1500), "eth0"));
        let inner: Vec<_> = attributes(found[2].1, 0).collect();
        assert_eq!((text(inner[0].1).as_str(), ip(inner[1].1)), ("veth", "2001:db8::1".parse().ok()));
    }

    #[test]
    fn an_attribute_that_is_too_long_makes_no_message() {
        let mut message = Message::new(16, 0, &[]);
        message.nested(1, |inner| {
            inner.bytes(1, &[0; 70_000]);
        });
        assert_eq!(message.encode(0, 0), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_to_an_end(bytes: Vec<u8>, header in 0usize..20) {
            for message in received(&bytes) {
                let _ = attributes(message.payload, header).count();
            }
            let _ = attributes(&bytes, header).count();
        }
    }
}

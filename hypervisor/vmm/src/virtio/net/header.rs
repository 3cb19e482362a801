//! The header before each packet (`struct virtio_net_hdr_v1`; virtio 1.2, section 5.1.6), which the tap reads and writes as well:
//! what the guest may ask of the host's kernel by it, as pure functions.
//!
//! The kernel checks it, too. What is checked here beyond that is what the driver has negotiated and what one packet may
//! cost: into how many segments it falls.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of the header.
pub const HEADER: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// The largest frame: two VLAN tags, an IPv6 header, and all that its 16-bit length can say.
pub const MAX_FRAME: usize = ETHERNET + 8 + 40 + 65_535;
/// The least segment that TCP makes (TCP_MIN_GSO_SIZE, include/net/tcp.h).
const MIN_TCP_SEGMENT: u64 = 8;
/// The most datagrams in one packet (UDP_MAX_SEGMENTS, include/linux/udp.h).
const MAX_UDP_SEGMENTS: u64 = 128;
/// More bytes of headers than this no packet has; a larger hint is left aside.
const MAX_HINT: u16 = 256;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCP6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const UDP: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;

/// Why a packet is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The frame's length.
    #[error("frame of {0} bytes")]
    Frame(usize),
    /// Not negotiated, or unknown.
    #[error("an offload that was not negotiated")]
    Offload,
    /// The checksum's place.
    #[error("checksum outside the packet")]
    Checksum,
    /// The segments' size.
    #[error("segments of an impossible size")]
    Segments,
}

/// What a packet is on the wire, after the kernel has cut it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// With the headers of each segment.
    pub bytes: u64,
    /// Segments.
    pub packets: u64,
}

/// The header. All fields are little-endian (5.1.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    /// Chains that the packet takes, in the direction of the guest.
    pub num_buffers: u16,
}

impl Header {
    /// From its bytes.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; HEADER] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }

    /// Checks the header of a frame of `frame` bytes that comes from a driver with `features`; gives the header for the tap,
    /// without anything that means nothing.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn for_tap(self, frame: usize, features: u64) -> Result<(Self, Cost), HeaderError> {
        if !(ETHERNET..=MAX_FRAME).contains(&frame) {
            return Err(HeaderError::Frame(frame));
        }
        let mut out =
            Self { flags: 0, gso_type: NONE, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, num_buffers: 0 };
        // Unknown flags are to be ignored (5.1.6.2.2).
        if self.flags & NEEDS_CSUM != 0 {
            if !has(features, VIRTIO_NET_F_CSUM) {
                return Err(HeaderError::Offload);
            }
            let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
            if usize::from(self.csum_start) < ETHERNET || end > frame {
                return Err(HeaderError::Checksum);
            }
            (out.flags, out.csum_start, out.csum_offset) = (NEEDS_CSUM, self.csum_start, self.csum_offset);
        }
        if self.gso_type == NONE {
            return Ok((out, Cost { bytes: frame as u64, packets: 1 }));
        }
        let (allowed, network, transport) = match self.gso_type & !ECN {
            TCP4 => (VIRTIO_NET_F_HOST_TSO4, 20, 20),
            TCP6 => (VIRTIO_NET_F_HOST_TSO6, 40, 20),
            UDP => (VIRTIO_NET_F_HOST_USO, 20, 8),
            _ => return Err(HeaderError::Offload),
        };
        let ecn = self.gso_type & ECN != 0;
        if !has(features, allowed) || ecn && (allowed == VIRTIO_NET_F_HOST_USO || !has(features, VIRTIO_NET_F_HOST_ECN))
        {
            return Err(HeaderError::Offload);
        }
        // Each segment gets a checksum of its own (5.1.6.2.1).
        if out.flags & NEEDS_CSUM == 0 || usize::from(self.csum_start) < ETHERNET + network {
            return Err(HeaderError::Checksum);
        }
        (out.gso_type, out.gso_size) = (self.gso_type, self.gso_size);
        let headers = u64::from(self.csum_start) + transport;
        let cost = out.cost(frame, headers).ok_or(HeaderError::Segments)?;
        let fits = match allowed {
            VIRTIO_NET_F_HOST_USO => cost.packets <= MAX_UDP_SEGMENTS,
            _ => u64::from(self.gso_size) >= MIN_TCP_SEGMENT,
        };
        if !fits {
            return Err(HeaderError::Segments);
        }
        // A hint (5.1.6.2.2): how much the kernel puts into one piece. Never below what the headers have at least.
        let least = u16::try_from(headers).unwrap_or(u16::MAX);
        let most = MAX_HINT.min(u16::try_from(frame).unwrap_or(u16::MAX)).max(least);
        out.hdr_len = if (least..=most).contains(&self.hdr_len) { self.hdr_len } else { least };
        Ok((out, cost))
    }

    /// What a frame with `headers` bytes of headers costs; None if it cannot be cut.
    fn cost(&self, frame: usize, headers: u64) -> Option<Cost> {
        let payload = (frame as u64).checked_sub(headers).filter(|payload| *payload > 0)?;
        let size = u64::from(self.gso_size);
        let packets = payload.checked_add(size.checked_sub(1)?)?.checked_div(size)?;
        Some(Cost { bytes: payload + packets * headers, packets })
    }

    /// Takes the header of a frame of `frame` bytes that comes from the tap to a driver with `features`; None if the driver
    /// cannot have it (it was queued in the tap for the driver before).
    pub fn for_driver(mut self, frame: usize, features: u64) -> Option<(Self, Cost)> {
        if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
            if self.flags & NEEDS_CSUM != 0 {
                return None;
            }
            self.flags = 0;
        }
        self.flags &= NEEDS_CSUM | DATA_VALID;
        let whole = Cost { bytes: frame as u64, packets: 1 };
        if self.gso_type == NONE {
            return Some((self, whole));
        }
        let (allowed, transport) = match self.gso_type & !ECN {
            TCP4 => (VIRTIO_NET_F_GUEST_TSO4, 20),
            TCP6 => (VIRTIO_NET_F_GUEST_TSO6, 20),
            // The kernel has one switch for both.
            UDP if has(features, VIRTIO_NET_F_GUEST_USO6) => (VIRTIO_NET_F_GUEST_USO4, 8),
            _ => return None,
        };
        if !has(features, allowed) || self.gso_type & ECN != 0 && !has(features, VIRTIO_NET_F_GUEST_ECN) {
            return None;
        }
        let headers = u64::from(self.csum_start) + transport;
        Some((self, self.cost(frame, headers).unwrap_or(whole)))
    }
}

fn has(features: u64, feature: u32) -> bool {
    features & 1 << feature != 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TCP: Header = Header {
        flags: NEEDS_CSUM,
        gso_type: TCP4,
        hdr_len: 66,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    const PLAIN: Header =
        Header { flags: 0, gso_type: NONE, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, num_buffers: 0 };

    fn refused(header: Header, frame: usize, features: u64) -> HeaderError {
        header.for_tap(frame, features).unwrap_err()
    }

    #[test]
    fn plain_frames_have_bounds() {
        assert_eq!(PLAIN.for_tap(60, 0), Ok((PLAIN, Cost { bytes: 60, packets: 1 })));
        assert_eq!(refused(PLAIN, 13, 0), HeaderError::Frame(13));
        assert_eq!(refused(PLAIN, MAX_FRAME + 1, 0), HeaderError::Frame(MAX_FRAME + 1));
    }

    #[test]
    fn a_large_packet_counts_as_its_segments() {
        let (header, cost) = TCP.for_tap(54 + 14_480, u64::MAX).unwrap();
        assert_eq!(header, TCP);
        assert_eq!(cost, Cost { bytes: 14_480 + 10 * 54, packets: 10 });
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        for missing in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4] {
            assert_eq!(refused(TCP, 5000, !(1 << missing)), HeaderError::Offload);
        }
        let ecn = Header { gso_type: TCP4 | ECN, ..TCP };
        assert!(ecn.for_tap(5000, u64::MAX).is_ok());
        assert_eq!(refused(ecn, 5000, !(1 << VIRTIO_NET_F_HOST_ECN)), HeaderError::Offload);
        for gso_type in [2, 3, 6, 0x40, UDP | ECN, ECN] {
            assert_eq!(refused(Header { gso_type, ..TCP }, 5000, u64::MAX), HeaderError::Offload, "{gso_type}");
        }
    }

    #[test]
    fn checksums_and_segments_that_cannot_be_are_refused() {
        for (start, offset) in [(13, 0), (34, 5000), (4999, 0), (u16::MAX, u16::MAX)] {
            let header = Header { gso_type: NONE, csum_start: start, csum_offset: offset, ..TCP };
            assert_eq!(refused(header, 5000, u64::MAX), HeaderError::Checksum, "{start} {offset}");
        }
        assert_eq!(refused(Header { flags: 0, ..TCP }, 5000, u64::MAX), HeaderError::Checksum);
        for gso_size in [0, 1, 7] {
            assert_eq!(refused(Header { gso_size, ..TCP }, 5000, u64::MAX), HeaderError::Segments);
        }
        assert_eq!(refused(TCP, 54, u64::MAX), HeaderError::Segments, "no payload");
        let udp = Header { gso_type: UDP, gso_size: 10, csum_offset: 6, ..TCP };
        assert!(udp.for_tap(42 + 1280, u64::MAX).is_ok());
        assert_eq!(refused(udp, 42 + 1281, u64::MAX), HeaderError::Segments);
    }

    #[test]
    fn the_length_of_headers_is_no_more_than_a_hint() {
        for (hint, kept) in [(0, 54), (54, 54), (100, 100), (257, 54), (u16::MAX, 54)] {
            let (header, _) = Header { hdr_len: hint, ..TCP }.for_tap(5000, u64::MAX).unwrap();
            assert_eq!(header.hdr_len, kept, "{hint}");
        }
    }

    #[test]
    fn a_driver_gets_only_what_it_asked_for() {
        let valid = Header { flags: DATA_VALID, ..PLAIN };
        assert_eq!(valid.for_driver(100, u64::MAX).unwrap().0.flags, DATA_VALID);
        assert_eq!(valid.for_driver(100, 0).unwrap().0.flags, 0);
        assert!(TCP.for_driver(5000, u64::MAX).is_some());
        assert!(TCP.for_driver(5000, !(1 << VIRTIO_NET_F_GUEST_CSUM)).is_none());
        assert!(TCP.for_driver(5000, !(1 << VIRTIO_NET_F_GUEST_TSO4)).is_none());
        assert!(Header { gso_type: UDP, ..TCP }.for_driver(5000, !(1 << VIRTIO_NET_F_GUEST_USO6)).is_none());
        assert!(Header { gso_type: 3, ..TCP }.for_driver(5000, u64::MAX).is_none());
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_bounded(bytes: [u8; HEADER], frame in 0usize..70_000, features: u64) {
            let header = Header::parse(&bytes);
            prop_assert_eq!(header.bytes(), bytes);
            if let Ok((out, cost)) = header.for_tap(frame, features) {
                prop_assert!(usize::from(out.hdr_len) <= frame);
                prop_assert!((1..=8192).contains(&cost.packets));
                prop_assert!(cost.bytes >= frame as u64);
                prop_assert_eq!(out.for_tap(frame, features), Ok((out, cost)), "checked twice is checked once");
            }
            let _ = header.for_driver(frame, features);
        }
    }
}

//! The packet header of virtio-vsock (virtio 1.2, section 5.10.6): 44 bytes, little endian, before the payload in
//! every chain of the receive and transmit queues.
//!
//! ```text
//!  0        8        16       20       24   28   30   32     36         40       44
//!  ├────────┼────────┼────────┼────────┼────┼────┼────┼──────┼──────────┼────────┤
//!  │src_cid │dst_cid │src_port│dst_port│len │type│ op │flags │buf_alloc │fwd_cnt │
//!  └────────┴────────┴────────┴────────┴────┴────┴────┴──────┴──────────┴────────┘
//! ```
//!
//! A header is copied out of guest memory once and never read again, so it cannot change after it was checked.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The context id of the host, as the guest sees it.
pub const HOST_CID: u64 = 2;
/// The only socket type that this device knows (VIRTIO_VSOCK_TYPE_STREAM).
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for (virtio 1.2, 5.10.6, "op").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Opens a stream.
    Request = 1,
    /// Accepts a REQUEST.
    Response = 2,
    /// Ends a stream at once, or refuses a packet. Never answered.
    Reset = 3,
    /// The sender will not receive or not send any more: [`Shutdown`] in the flags.
    Shutdown = 4,
    /// Payload.
    Data = 5,
    /// Nothing but the credit fields that every packet has.
    CreditUpdate = 6,
    /// Asks for a CREDIT_UPDATE.
    CreditRequest = 7,
}

impl Op {
    /// The operation with that number.
    pub fn from_number(number: u16) -> Option<Self> {
        use Op::*;
        [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|op| *op as u16 == number)
    }
}

/// Directions of a stream that are over, seen from one of its ends: the flags of a SHUTDOWN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shutdown {
    /// It will not receive any more.
    pub receive: bool,
    /// It will not send any more.
    pub send: bool,
}

impl Shutdown {
    /// Reads the flags of a SHUTDOWN; bits without a meaning are ignored.
    pub fn from_flags(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    /// The flags of a SHUTDOWN.
    pub fn to_flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// What is over in either.
    pub fn union(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }

    /// Whether both directions are over.
    pub fn is_both(self) -> bool {
        self.receive && self.send
    }
}

/// One packet's header. Fields are as the other side wrote them: nothing is checked yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload after the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Number of the operation, see [`Op::from_number`].
    pub op: u16,
    /// Meaning depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer for this stream, bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender's application has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header from its bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes the header's bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that refuses this packet: everything turned round, no credit.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// The next `N` bytes; zeros past the end, which [`HEADER_LEN`] excludes.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((chunk, later)) => {
            *rest = later;
            *chunk
        }
        None => [0; N],
    }
}

fn put<const N: usize>(rest: &mut &mut [u8], value: [u8; N]) {
    if let Some((chunk, later)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *chunk = value;
        *rest = later;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 1024,
            len: 5,
            kind: 1,
            op: 7,
            flags: 2,
            buf_alloc: 0x4_0000,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[20..24], [0, 4, 0, 0]);
        assert_eq!((bytes[24], bytes[28], bytes[30], bytes[32], bytes[38], bytes[40]), (5, 1, 7, 2, 4, 9));
    }

    #[test]
    fn operations_are_known_by_their_numbers() {
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(5), Some(Op::Data));
        assert_eq!(Op::from_number(8), None);
        for number in 1..8 {
            assert_eq!(Op::from_number(number).map(|op| op as u16), Some(number));
        }
    }

    proptest! {
        #[test]
        fn a_header_survives_its_bytes(bytes in proptest::array::uniform::<_, HEADER_LEN>(any::<u8>())) {
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }

        #[test]
        fn shutdown_flags_keep_their_two_bits(flags: u32) {
            prop_assert_eq!(Shutdown::from_flags(flags).to_flags(), flags & 3);
        }
    }
}

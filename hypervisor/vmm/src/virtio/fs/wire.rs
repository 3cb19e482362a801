//! The two headers of the FUSE protocol, and what the monitor checks of them. It understands nothing else of a message,
//! except two fields of the answer to INIT.
//!
//! ```text
//! request  len:u32 opcode:u32 unique:u64 nodeid:u64 uid:u32 gid:u32 pid:u32 padding:u32 │ body
//! reply    len:u32 error:i32  unique:u64                                                │ body (none if error != 0)
//! ```
//!
//! Layouts: include/uapi/linux/fuse.h; little endian on this machine as on the guest's.

/// Length of a request's header, bytes.
pub const REQUEST_HEADER: usize = 40;
/// Length of a reply's header, bytes.
pub const REPLY_HEADER: usize = 16;
/// The longest request: 1 MiB of data and a page for all headers and names.
pub const MAX_REQUEST: usize = MAX_DATA + PAGE;

const PAGE: usize = 4096;
const MAX_DATA: usize = 1 << 20;

const OPCODE_FORGET: u32 = 2;
/// FUSE_INIT.
pub const OPCODE_INIT: u32 = 26;
const OPCODE_INTERRUPT: u32 = 36;
const OPCODE_BATCH_FORGET: u32 = 42;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// FORGET and BATCH_FORGET: never answered.
    Forget,
    /// INTERRUPT: names another request; often without room for a reply.
    Interrupt,
    /// INIT: the limits in its answer may have to be lowered.
    Init,
    /// Everything else.
    Other,
}

/// Why a request is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The header's length is not what the driver made available.
    #[error("the header says {header} bytes, the chain has {chain}")]
    Length {
        /// From the header.
        header: usize,
        /// Readable bytes.
        chain: usize,
    },
    /// Longer than [`MAX_REQUEST`].
    #[error("{0} bytes exceed {MAX_REQUEST}")]
    TooLong(usize),
    /// No room for the header of a reply.
    #[error("{0} writable bytes cannot hold a reply")]
    NoReply(usize),
}

/// A request's header as the driver wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    bytes: [u8; REQUEST_HEADER],
}

impl Request {
    /// Takes a header as read from the chain.
    pub fn new(bytes: [u8; REQUEST_HEADER]) -> Self {
        Self { bytes }
    }

    /// The driver's own number for the request.
    pub fn unique(&self) -> u64 {
        u64_at(&self.bytes, 8)
    }

    /// What it asks for.
    pub fn opcode(&self) -> u32 {
        u32_at(&self.bytes, 4)
    }

    /// Checks the request against its chain's lengths.
    ///
    /// # Errors
    /// If it must not be forwarded.
    pub fn check(&self, readable: usize, writable: usize) -> Result<Kind, Refusal> {
        let header = u32_at(&self.bytes, 0) as usize;
        if header != readable {
            return Err(Refusal::Length { header, chain: readable });
        }
        if readable > MAX_REQUEST {
            return Err(Refusal::TooLong(readable));
        }
        let kind = match self.opcode() {
            OPCODE_INTERRUPT => Kind::Interrupt,
            OPCODE_FORGET | OPCODE_BATCH_FORGET => Kind::Forget,
            OPCODE_INIT => Kind::Init,
            _ => Kind::Other,
        };
        if matches!(kind, Kind::Init | Kind::Other) && writable < REPLY_HEADER {
            return Err(Refusal::NoReply(writable));
        }
        Ok(kind)
    }

    /// The header to forward, under the monitor's own number.
    pub fn renumbered(mut self, number: u64) -> [u8; REQUEST_HEADER] {
        self.bytes[8..16].copy_from_slice(&number.to_le_bytes());
        self.bytes
    }
}

/// A reply's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The whole reply, bytes.
    pub len: usize,
    /// 0, or a negated error number.
    pub error: i32,
    /// The number of the request that it answers.
    pub unique: u64,
}

impl Reply {
    /// A reply without a body; `errno` is positive.
    pub fn error(unique: u64, errno: i32) -> Self {
        Self { len: REPLY_HEADER, error: -errno, unique }
    }

    /// Reads a header.
    pub fn parse(bytes: &[u8; REPLY_HEADER]) -> Self {
        Self { len: u32_at(bytes, 0) as usize, error: u32_at(bytes, 4) as i32, unique: u64_at(bytes, 8) }
    }

    /// The header's bytes.
    pub fn bytes(&self) -> [u8; REPLY_HEADER] {
        let mut bytes = [0; REPLY_HEADER];
        bytes[0..4].copy_from_slice(&u32::try_from(self.len).unwrap_or(u32::MAX).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.unique.to_le_bytes());
        bytes
    }

    /// What the driver gets to see of a server's reply: its own number, and EIO in place of anything that breaks the
    /// protocol. `received` is the packet's length, `room` the chain's writable length.
    pub fn settle(self, received: usize, room: usize, unique: u64) -> Self {
        let sound = match self.error {
            0 => self.len == received && received <= room,
            // The kernel's error numbers end at 511 (fs/fuse/dev.c refuses others, too).
            -511..=-1 => self.len == REPLY_HEADER && received == REPLY_HEADER,
            _ => false,
        };
        if sound { Self { unique, ..self } } else { Self::error(unique, libc::EIO) }
    }
}

/// Where INIT's answer says how much one request may carry; offsets from the beginning of the reply.
pub mod init {
    /// `max_write`, u32, bytes.
    pub const MAX_WRITE: usize = 36;
    /// `max_pages`, u16, of 4096 bytes.
    pub const MAX_PAGES: usize = 44;

    /// The most pages of one request or reply. Linux puts all but the last 17 pages of a packet into one block of contiguous memory
    /// (sock_alloc_send_pskb, MAX_SKB_FRAGS): 24 pages and the headers need 32 KiB, the largest that it does not count as
    /// costly (PAGE_ALLOC_COSTLY_ORDER); 256 pages would need 1 MiB, which a fragmented host has to make first or cannot.
    const MAX_PAGES_SENT: usize = 24;

    /// The largest data of one request over a socket whose send buffer has `send_buffer` bytes: (bytes, pages). Several
    /// requests fit into an eighth of the buffer each, since Linux reports room once less than a quarter is taken.
    pub fn limits(send_buffer: usize) -> (u32, u16) {
        let pages = ((send_buffer / 8).saturating_sub(super::PAGE) / super::PAGE).min(MAX_PAGES_SENT);
        let pages = pages.max(1) as u16;
        (u32::from(pages) * super::PAGE as u32, pages)
    }
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(len: u32, opcode: u32, unique: u64) -> Request {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[0..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        Request::new(bytes)
    }

    #[test]
    fn a_request_is_classed_by_its_opcode() {
        assert_eq!(request(40, 1, 0).check(40, 16), Ok(Kind::Other));
        assert_eq!(request(40, 26, 0).check(40, 16), Ok(Kind::Init));
        assert_eq!(request(40, 2, 0).check(40, 0), Ok(Kind::Forget));
        assert_eq!(request(40, 42, 0).check(40, 0), Ok(Kind::Forget));
        assert_eq!(request(48, 36, 0).check(48, 0), Ok(Kind::Interrupt));
    }

    #[test]
    fn a_request_without_room_for_its_reply_is_refused() {
        assert_eq!(request(40, 1, 0).check(40, 15), Err(Refusal::NoReply(15)));
    }

    #[test]
    fn the_limits_of_a_small_socket_are_lower_and_never_zero() {
        assert_eq!(init::limits(4 << 20), (24 * 4096, 24));
        assert_eq!(init::limits(212_992), (5 * 4096, 5));
        assert_eq!(init::limits(0), (4096, 1));
    }

    proptest! {
        #[test]
        fn a_request_is_forwarded_only_if_its_length_is_true_and_bounded(
            bytes in prop::array::uniform32(any::<u8>()), len in any::<u32>(), readable in 40usize..3 << 20, writable in 0usize..64
        ) {
            let mut header = [0; REQUEST_HEADER];
            header[..32].copy_from_slice(&bytes);
            for len in [len, readable as u32] {
                header[0..4].copy_from_slice(&len.to_le_bytes());
                let verdict = Request::new(header).check(readable, writable);
                prop_assert_eq!(verdict.is_ok(), len as usize == readable && readable <= MAX_REQUEST
                    && (writable >= REPLY_HEADER || matches!(verdict, Ok(Kind::Forget | Kind::Interrupt))));
            }
        }

        #[test]
        fn renumbering_changes_nothing_but_the_number(bytes in prop::collection::vec(any::<u8>(), REQUEST_HEADER), number: u64) {
            let bytes: [u8; REQUEST_HEADER] = bytes.try_into().unwrap();
            let new = Request::new(bytes).renumbered(number);
            prop_assert_eq!(Request::new(new).unique(), number);
            prop_assert_eq!(&new[..8], &bytes[..8]);
            prop_assert_eq!(&new[16..], &bytes[16..]);
        }

        #[test]
        fn whatever_the_server_says_the_driver_gets_a_sound_reply_to_its_own_request(
            header in prop::array::uniform16(any::<u8>()), received in 16usize..100, room in 16usize..100, unique: u64
        ) {
            let reply = Reply::parse(&header).settle(received, room, unique);
            prop_assert_eq!(reply.unique, unique);
            prop_assert!(reply.len >= REPLY_HEADER && reply.len <= room);
            prop_assert!((-511..=0).contains(&reply.error));
            prop_assert!(reply.error == 0 || reply.len == REPLY_HEADER);
            prop_assert!(reply.error != 0 || reply.len == received);
            prop_assert_eq!(Reply::parse(&reply.bytes()), reply);
        }
    }
}

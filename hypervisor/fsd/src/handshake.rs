//! INIT: what guest and server agree on.
//!
//! - **No OPEN.** A regular file is not opened or released by the guest; the server opens what it needs. That saves
//!   two messages for each file, and the guest cannot hold descriptors here. Only an open for writing is asked for (our
//!   guest kernel has a patch), so that the host can refuse it. A file that can only be appended to is written without the
//!   guest's cache.
//! - **Writeback cache.** The guest is the only user of what it may cache, so it writes back when it likes. A patch of
//!   our guest kernel has it write back before it asks for data and holes (LSEEK).
//! - **ACLs and umask.** The server applies the umask, since only the host's kernel knows whether a default ACL
//!   replaces it.
//! - **setuid, setgid** go on write, truncate and chown; the server takes care when the guest says so (KILLPRIV_V2).
//! - **Locks** stay in the guest, where only the guest has the files.
//!
//! Files that the host's own processes change as well ([`Sharing::WithHost`]) have no writeback cache: a guest with one
//! trusts its own idea of a file's size and content. Instead it asks before each read whether the file has changed, and
//! then drops what it has of it. Names are looked up each time, so a listing has no use for attributes. Of an open for
//! writing the guest says when it ends, as the host's processes cannot execute such a file. Their locks are the host's
//! ([`crate::locks`]). They may be mounted with mapped ids (Linux 6.12): the guest translates the owners that it gets and
//! sends, and a request that creates nothing then has user and group -1. Nothing here asks who it is from.

use fuse_backend_rs::abi::fuse_abi::FsOptions;

/// Who changes the files of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The guest alone, below what the shim makes.
    Alone,
    /// The host's processes, too.
    WithHost,
}

impl Sharing {
    /// What is agreed on, if the guest can.
    pub const fn options(self) -> FsOptions {
        match self {
            Self::Alone => OPTIONS,
            Self::WithHost => OPTIONS
                .difference(FsOptions::WRITEBACK_CACHE)
                .difference(FsOptions::EXPLICIT_INVAL_DATA)
                .difference(FsOptions::DO_READDIRPLUS)
                .difference(FsOptions::READDIRPLUS_AUTO)
                .union(FsOptions::AUTO_INVAL_DATA)
                .union(FsOptions::POSIX_LOCKS)
                .union(FsOptions::FLOCK_LOCKS)
                .union(FsOptions::INIT_EXT),
        }
    }

    /// The same, with what the crate has no names for.
    const fn offered(self) -> u64 {
        let more = match self {
            Self::Alone => 0,
            Self::WithHost => ALLOW_IDMAP,
        };
        self.options().bits() | SETXATTR_EXT as u64 | more
    }
}

/// FUSE_ALLOW_IDMAP of include/uapi/linux/fuse.h.
const ALLOW_IDMAP: u64 = 1 << 40;

/// Everything that this server does, if the guest can.
pub const OPTIONS: FsOptions = FsOptions::from_bits_truncate(
    FsOptions::ASYNC_READ.bits()
        | FsOptions::BIG_WRITES.bits()
        | FsOptions::DONT_MASK.bits()
        | FsOptions::DO_READDIRPLUS.bits()
        | FsOptions::READDIRPLUS_AUTO.bits()
        | FsOptions::ASYNC_DIO.bits()
        | FsOptions::WRITEBACK_CACHE.bits()
        | FsOptions::ZERO_MESSAGE_OPEN.bits()
        | FsOptions::PARALLEL_DIROPS.bits()
        | FsOptions::POSIX_ACL.bits()
        | FsOptions::MAX_PAGES.bits()
        | FsOptions::CACHE_SYMLINKS.bits()
        | FsOptions::EXPLICIT_INVAL_DATA.bits()
        | FsOptions::HANDLE_KILLPRIV_V2.bits(),
);

/// FUSE_SETXATTR_EXT, which fuse-backend-rs has no name for: SETXATTR says whether an ACL takes the setgid bit away.
pub const SETXATTR_EXT: u32 = 1 << 29;

/// The protocol's version that is spoken. Linux since 5.11 has at least 7.33, which all of [`OPTIONS`] need.
const MAJOR: u32 = 7;
const MINOR: u32 = 33;

/// The largest data of a request, bytes.
pub const MAX_DATA: usize = 1 << 20;
/// Room for all of a request but its data, bytes.
pub const HEADER_ROOM: usize = 4096;
const PAGE: usize = 4096;

/// The length of INIT's answer, bytes.
const OUT: usize = 64;

/// The answer to an INIT whose body is `body`, over a socket with a send buffer of `send_buffer` bytes, for files of
/// this sharing.
///
/// # Errors
/// EPROTO for a guest that is too old, EINVAL for a malformed request.
pub fn answer(body: &[u8], send_buffer: usize, sharing: Sharing) -> Result<[u8; OUT], i32> {
    let field = |at: usize| body.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let (Some(major), Some(minor), Some(readahead), Some(flags)) = (field(0), field(4), field(8), field(12)) else {
        return Err(libc::EINVAL);
    };
    let mut out = [0; OUT];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = out.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &MAJOR.to_le_bytes());
    put(4, &MINOR.to_le_bytes());
    if major > MAJOR {
        // The guest then asks again with this version.
        return Ok(out);
    }
    if major < MAJOR || minor < MINOR {
        return Err(libc::EPROTO);
    }
    let pages = pages(send_buffer);
    put(8, &readahead.to_le_bytes());
    // The upper half is there if the guest says so.
    let upper = if flags & FsOptions::INIT_EXT.bits() as u32 != 0 { field(16).unwrap_or(0) } else { 0 };
    let agreed = sharing.offered() & (u64::from(upper) << 32 | u64::from(flags));
    put(12, &(agreed as u32).to_le_bytes());
    put(32, &((agreed >> 32) as u32).to_le_bytes());
    // Requests in the background and when to throttle: as many as the queue holds.
    put(16, &512u16.to_le_bytes());
    put(18, &384u16.to_le_bytes());
    put(20, &(pages * PAGE as u32).to_le_bytes());
    // Times are exact to the nanosecond.
    put(24, &1u32.to_le_bytes());
    put(28, &(pages as u16).to_le_bytes());
    Ok(out)
}

/// Whether an INIT's answer says that SETXATTR has its longer form.
pub fn is_extended(answer: &[u8; OUT]) -> bool {
    u32::from_le_bytes([answer[12], answer[13], answer[14], answer[15]]) & SETXATTR_EXT != 0
}

/// Pages of data in a packet; Linux takes a packet that is 32 bytes shorter than the send buffer.
fn pages(send_buffer: usize) -> u32 {
    let data = send_buffer.saturating_sub(32 + HEADER_ROOM).min(MAX_DATA);
    (data / PAGE).max(1) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn init(major: u32, minor: u32, flags: u32) -> Vec<u8> {
        [major, minor, 1 << 17, flags].iter().flat_map(|v| v.to_le_bytes()).chain([0; 48]).collect()
    }

    fn field(out: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(out[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn only_what_both_know_is_agreed_on() {
        let out = answer(&init(7, 37, u32::MAX), 8 << 20, Sharing::Alone).unwrap();
        assert_eq!(field(&out, 12), OPTIONS.bits() as u32 | SETXATTR_EXT);
        assert_eq!(field(&out, 20), 1 << 20);
        assert_eq!(field(&out, 28), 256);
        assert_eq!(field(&answer(&init(7, 37, 0x20), 8 << 20, Sharing::Alone).unwrap(), 12), 0x20);
    }

    #[test]
    fn locks_of_its_own_files_open_truncation_and_lookups_of_dots_stay_in_the_guest() {
        let never = FsOptions::ATOMIC_O_TRUNC | FsOptions::EXPORT_SUPPORT;
        let locks = FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS;
        assert!(!Sharing::Alone.options().intersects(never | locks));
        assert!(!Sharing::WithHost.options().intersects(never) && Sharing::WithHost.options().contains(locks));
    }

    #[test]
    fn a_guest_trusts_its_own_idea_of_a_file_only_where_nobody_else_changes_it() {
        let flags = |sharing| {
            FsOptions::from_bits_truncate(field(&answer(&init(7, 37, u32::MAX), 8 << 20, sharing).unwrap(), 12).into())
        };
        let (alone, with_host) = (flags(Sharing::Alone), flags(Sharing::WithHost));
        assert!(alone.contains(FsOptions::WRITEBACK_CACHE) && !alone.contains(FsOptions::AUTO_INVAL_DATA));
        assert!(!with_host.intersects(FsOptions::WRITEBACK_CACHE | FsOptions::EXPLICIT_INVAL_DATA));
        assert!(with_host.contains(FsOptions::AUTO_INVAL_DATA));
        assert!(alone.contains(FsOptions::DO_READDIRPLUS) && !with_host.contains(FsOptions::DO_READDIRPLUS));
    }

    #[test]
    fn ids_can_be_mapped_of_files_that_the_host_has_as_well() {
        let mut body = init(7, 41, u32::MAX);
        let upper = |body: &[u8], sharing| field(&answer(body, 8 << 20, sharing).unwrap(), 32);
        assert_eq!(upper(&body, Sharing::WithHost), 0);
        body[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(upper(&body, Sharing::WithHost), 1 << 8);
        assert_eq!(upper(&body, Sharing::Alone), 0);
        // What lies there means nothing without INIT_EXT.
        body[12..16].copy_from_slice(&(!(1u32 << 30)).to_le_bytes());
        assert_eq!(upper(&body, Sharing::WithHost), 0);
    }

    #[test]
    fn an_old_guest_is_refused_and_a_new_major_version_is_told_ours() {
        assert_eq!(answer(&init(7, 31, 0), 8 << 20, Sharing::Alone), Err(libc::EPROTO));
        assert_eq!(answer(&init(6, 99, 0), 8 << 20, Sharing::Alone), Err(libc::EPROTO));
        assert_eq!(field(&answer(&init(8, 0, 0), 8 << 20, Sharing::Alone).unwrap(), 0), 7);
    }

    #[test]
    fn a_small_socket_makes_small_requests() {
        let out = answer(&init(7, 37, u32::MAX), 212_992, Sharing::Alone).unwrap();
        assert_eq!((field(&out, 20), field(&out, 28)), (50 * 4096, 50));
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body in prop::collection::vec(any::<u8>(), 0..80), buffer: usize) {
            let _ = answer(&body, buffer, Sharing::Alone);
        }
    }
}

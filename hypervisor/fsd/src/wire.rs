//! Requests that fuse-backend-rs does not decode, and their answers (include/uapi/linux/fuse.h).

use std::{
    ffi::{CStr, CString},
    time::Duration,
};

use fuse_backend_rs::{abi::fuse_abi::stat64, api::filesystem::Entry};
use rustix::fs::{Statx, StatxTimestamp};

/// The longest answer of these, bytes (struct fuse_statx_out).
pub const MAX_ANSWER: usize = 288;

/// A request that is decoded here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// COPY_FILE_RANGE: inside the server from the request's node to another.
    CopyFileRange {
        /// Where to begin reading.
        from: u64,
        /// The node that is written.
        to_node: u64,
        /// Where to begin writing.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// SYNCFS.
    Syncfs,
    /// TMPFILE: a file without a name.
    Tmpfile {
        /// Its mode, with the type's bits.
        mode: u32,
        /// The caller's mask.
        umask: u32,
    },
    /// STATX: attributes, with the time of birth.
    Statx,
    /// IOCTL.
    Ioctl {
        /// The command.
        command: u32,
        /// What comes with it.
        data: Vec<u8>,
    },
    /// SETXATTR in its longer form, which says whether the setgid bit goes.
    Setxattr {
        /// The attribute.
        name: CString,
        /// Its value.
        value: Vec<u8>,
        /// XATTR_CREATE, XATTR_REPLACE.
        flags: u32,
        /// Whether the setgid bit goes (FUSE_SETXATTR_ACL_KILL_SGID).
        without_setgid: bool,
    },
}

impl Request {
    /// The request of this opcode and body; None if it is another one, Some(None) if it is malformed. `extended` says whether
    /// SETXATTR has its longer form.
    pub fn parse(opcode: u32, body: &[u8], extended: bool) -> Option<Option<Self>> {
        let wide = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
        Some(match opcode {
            // struct fuse_setxattr_in: size, flags, setxattr_flags, padding; then the name and the value
            21 if extended => (|| {
                let (size, flags, more) = (word(0)?, word(4)?, word(8)?);
                let rest = body.get(16..)?;
                let name = CStr::from_bytes_until_nul(rest).ok()?;
                let value = rest.get(name.count_bytes() + 1..)?;
                (value.len() == size as usize).then(|| Self::Setxattr {
                    name: name.to_owned(),
                    value: value.to_owned(),
                    flags,
                    without_setgid: more & 1 != 0,
                })
            })(),
            // struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size
            39 => (|| {
                let (command, size) = (word(12)?, word(24)? as usize);
                let data = body.get(32..)?.get(..size)?.to_owned();
                Some(Self::Ioctl { command, data })
            })(),
            // struct fuse_copy_file_range_in: fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
            47 => (|| {
                let (from, to_node, to, len) = (wide(8)?, wide(16)?, wide(32)?, wide(40)?);
                Some(Self::CopyFileRange { from, to_node, to, len })
            })(),
            50 => Some(Self::Syncfs),
            // struct fuse_create_in: flags, mode, umask, open_flags; then a name that means nothing
            51 => (|| Some(Self::Tmpfile { mode: word(4)?, umask: word(8)? }))(),
            // struct fuse_statx_in: getattr_flags, reserved, fh, sx_flags, sx_mask
            52 => word(20).map(|_| Self::Statx),
            _ => return None,
        })
    }
}

/// An answer that is being made.
#[derive(Debug, Default)]
pub struct Answer(Vec<u8>);

impl Answer {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn wide(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn word(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// struct fuse_write_out, which COPY_FILE_RANGE has as well.
    pub fn copied(bytes: usize) -> Self {
        Self::default().word(u32::try_from(bytes).unwrap_or(u32::MAX)).word(0)
    }

    /// struct fuse_ioctl_out, and what the command returns.
    pub fn ioctl(data: &[u8]) -> Self {
        let mut answer = Self::default().wide(0).wide(0);
        answer.0.extend_from_slice(data);
        answer
    }

    /// struct fuse_entry_out and fuse_open_out of a file that was created open.
    pub fn created(entry: &Entry) -> Self {
        let seconds = |timeout: Duration| timeout.as_secs();
        Self::default()
            .wide(entry.inode)
            .wide(entry.generation)
            .wide(seconds(entry.entry_timeout))
            .wide(seconds(entry.attr_timeout))
            .word(entry.entry_timeout.subsec_nanos())
            .word(entry.attr_timeout.subsec_nanos())
            .attributes(&entry.attr)
            .wide(0)
            .wide(0)
    }

    /// struct fuse_attr.
    fn attributes(self, attr: &stat64) -> Self {
        self.wide(attr.st_ino)
            .wide(attr.st_size as u64)
            .wide(attr.st_blocks as u64)
            .wide(attr.st_atime as u64)
            .wide(attr.st_mtime as u64)
            .wide(attr.st_ctime as u64)
            .word(attr.st_atime_nsec as u32)
            .word(attr.st_mtime_nsec as u32)
            .word(attr.st_ctime_nsec as u32)
            .word(attr.st_mode)
            .word(attr.st_nlink as u32)
            .word(attr.st_uid)
            .word(attr.st_gid)
            .word(attr.st_rdev as u32)
            .word(attr.st_blksize as u32)
            .word(0)
    }

    /// struct fuse_statx_out.
    pub fn statx(stat: &Statx, ino: u64, timeout: Duration) -> Self {
        let time = |answer: Self, time: &StatxTimestamp| answer.wide(time.tv_sec as u64).word(time.tv_nsec).word(0);
        let answer = Self::default().wide(timeout.as_secs()).word(timeout.subsec_nanos()).word(0).wide(0).wide(0);
        // struct fuse_statx
        let answer = answer
            .word(stat.stx_mask)
            .word(stat.stx_blksize)
            .wide(0)
            .word(stat.stx_nlink)
            .word(stat.stx_uid)
            .word(stat.stx_gid)
            .word(u32::from(stat.stx_mode))
            .wide(ino)
            .wide(stat.stx_size)
            .wide(stat.stx_blocks)
            .wide(0);
        let answer =
            [&stat.stx_atime, &stat.stx_btime, &stat.stx_ctime, &stat.stx_mtime].into_iter().fold(answer, time);
        let answer = answer.word(stat.stx_rdev_major).word(stat.stx_rdev_minor).wide(0);
        (0..14).fold(answer, |answer, _| answer.wide(0))
    }
}

/// Whether an extended attribute may be read and written by the guest: labels of the host's security modules may not, as they
/// mean something on the host only.
pub fn is_guests(name: &CStr) -> bool {
    let name = name.to_bytes();
    !name.starts_with(b"security.") || name == b"security.capability"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_body_is_parsed_or_refused(opcode in 20u32..60, body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = (Request::parse(opcode, &body, true), Request::parse(opcode, &body, false));
        }
    }

    #[test]
    fn answers_have_the_kernels_lengths() {
        assert_eq!(Answer::copied(1).bytes().len(), 8);
        assert_eq!(Answer::created(&Entry::default()).bytes().len(), 128 + 16);
        assert_eq!(Answer::ioctl(&[1; 4]).bytes().len(), 16 + 4);
        let stat = crate::attributes::examine(std::fs::File::open("/").unwrap()).unwrap();
        assert_eq!(Answer::statx(&stat, 1, Duration::ZERO).bytes().len(), MAX_ANSWER);
    }

    #[test]
    fn a_short_body_is_malformed() {
        for opcode in [21, 39, 47, 51, 52] {
            assert_eq!(Request::parse(opcode, &[0; 7], true), Some(None), "{opcode}");
        }
        assert_eq!(Request::parse(3, &[0; 16], true), None);
        assert_eq!(Request::parse(21, &[0; 16], false), None, "the crate knows the short form");
    }
}

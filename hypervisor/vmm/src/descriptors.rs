//! The descriptors that came with a packet. Each is used exactly once and only as what it is: a mistake in the parent
//! shows here, in words, and not later in the guest.

use std::{fs::File, os::fd::OwnedFd};

use caisson_protos::monitor::DescriptorIndex;
use rustix::{
    fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, seek},
    io::Errno,
    net::{AddressFamily, SocketType, sockopt},
};

use crate::virtio::net::tap::{self, TapInfo};

/// A descriptor that cannot be what the message says.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// There are fewer.
    #[error("{what}: descriptor index {index} out of range ({count} received)")]
    Missing {
        /// Its role.
        what: String,
        /// The index.
        index: u8,
        /// How many there are.
        count: usize,
    },
    /// It has a role already.
    #[error("{what}: descriptor {index} already in use")]
    Taken {
        /// Its role.
        what: String,
        /// The index.
        index: u8,
    },
    /// There are more.
    #[error("{0} descriptors of the packet unused by its message")]
    Left(usize),
    /// Not what is needed.
    #[error("{what}: the descriptor is not {needed}")]
    Wrong {
        /// Its role.
        what: String,
        /// What it should be.
        needed: &'static str,
    },
    /// It cannot be examined.
    #[error("{what}: {source}")]
    System {
        /// Its role.
        what: String,
        /// The system's answer.
        source: Errno,
    },
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Read and written.
    ReadWrite,
    /// Only written.
    Write,
}

/// The descriptors of one packet that have no role yet. Dropping it closes them.
#[derive(Debug)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// All that came, in order.
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// A regular file, and its size in bytes.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn file(&mut self, index: DescriptorIndex, what: &str, access: Access) -> Result<(File, u64), DescriptorError> {
        let fd = self.take(index, what)?;
        let stat = fstat(&fd).map_err(system(what))?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(wrong(what, "a regular file"));
        }
        check_access(&fd, what, access)?;
        Ok((fd.into(), u64::try_from(stat.st_size).unwrap_or(0)))
    }

    /// A regular file or block device, and its size in bytes. With O_APPEND Linux writes at the file's end whatever
    /// position is given, which destroys a disk; O_DIRECT wants buffers and positions aligned as no guest has to align them.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn disk(
        &mut self,
        index: DescriptorIndex,
        what: &str,
        access: Access,
    ) -> Result<(OwnedFd, u64), DescriptorError> {
        let fd = self.take(index, what)?;
        let kind = FileType::from_raw_mode(fstat(&fd).map_err(system(what))?.st_mode);
        if !kind.is_file() && !kind.is_block_device() {
            return Err(wrong(what, "a regular file or block device"));
        }
        check_access(&fd, what, access)?;
        let flags = fcntl_getfl(&fd).map_err(system(what))?;
        if flags.contains(OFlags::APPEND) && access != Access::Read {
            return Err(wrong(what, "open without O_APPEND"));
        }
        if flags.contains(OFlags::DIRECT) {
            return Err(wrong(what, "open without O_DIRECT"));
        }
        // Tells the size of both kinds; the position is of no use to us.
        let size = seek(&fd, SeekFrom::End(0)).map_err(system(what))?;
        Ok((fd, size))
    }

    /// Anything that can be written to.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn output(&mut self, index: DescriptorIndex, what: &str) -> Result<OwnedFd, DescriptorError> {
        let fd = self.take(index, what)?;
        check_access(&fd, what, Access::Write)?;
        Ok(fd)
    }

    /// A listening Unix stream socket.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn listener(&mut self, index: DescriptorIndex, what: &str) -> Result<OwnedFd, DescriptorError> {
        let fd = self.take(index, what)?;
        let listens = is_unix(&fd, SocketType::STREAM) && sockopt::socket_acceptconn(&fd) == Ok(true);
        if listens { Ok(fd) } else { Err(wrong(what, "a listening SOCK_STREAM Unix socket")) }
    }

    /// A Unix packet socket.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn packet_socket(&mut self, index: DescriptorIndex, what: &str) -> Result<OwnedFd, DescriptorError> {
        let fd = self.take(index, what)?;
        if is_unix(&fd, SocketType::SEQPACKET) { Ok(fd) } else { Err(wrong(what, "a SOCK_SEQPACKET Unix socket")) }
    }

    /// A queue of a tap with virtio headers, and what the kernel says of it.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn tap(&mut self, index: DescriptorIndex, what: &str) -> Result<(OwnedFd, TapInfo), DescriptorError> {
        let fd = self.take(index, what)?;
        let info = tap::describe(&fd);
        let info = info.ok_or_else(|| wrong(what, "an attached queue of a tap with IFF_VNET_HDR"))?;
        check_access(&fd, what, Access::ReadWrite)?;
        if !fcntl_getfl(&fd).map_err(system(what))?.contains(OFlags::NONBLOCK) {
            return Err(wrong(what, "non-blocking: set O_NONBLOCK on it"));
        }
        Ok((fd, info))
    }

    /// Checks that every descriptor got a role.
    ///
    /// # Errors
    /// [`DescriptorError::Left`].
    pub fn finish(self) -> Result<(), DescriptorError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            left => Err(DescriptorError::Left(left)),
        }
    }

    fn take(&mut self, DescriptorIndex(index): DescriptorIndex, what: &str) -> Result<OwnedFd, DescriptorError> {
        let count = self.0.len();
        match self.0.get_mut(usize::from(index)) {
            None => Err(DescriptorError::Missing { what: what.to_owned(), index, count }),
            Some(slot) => slot.take().ok_or_else(|| DescriptorError::Taken { what: what.to_owned(), index }),
        }
    }
}

fn is_unix(fd: &OwnedFd, kind: SocketType) -> bool {
    sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX) && sockopt::socket_type(fd) == Ok(kind)
}

fn check_access(fd: &OwnedFd, what: &str, access: Access) -> Result<(), DescriptorError> {
    let flags = fcntl_getfl(fd).map_err(system(what))?;
    let (readable, writable) = match flags & OFlags::RWMODE {
        OFlags::RDONLY => (true, false),
        OFlags::WRONLY => (false, true),
        _ => (true, true),
    };
    // A path descriptor says "read-only" but can do nothing.
    let path = flags.contains(OFlags::PATH);
    match access {
        _ if path => Err(wrong(what, "open for reading or writing (it is a path only)")),
        Access::Read if !readable => Err(wrong(what, "open for reading")),
        Access::Write if !writable => Err(wrong(what, "open for writing")),
        Access::ReadWrite if !readable || !writable => Err(wrong(what, "open for reading and writing")),
        _ => Ok(()),
    }
}

fn wrong(what: &str, needed: &'static str) -> DescriptorError {
    DescriptorError::Wrong { what: what.to_owned(), needed }
}

fn system(what: &str) -> impl Fn(Errno) -> DescriptorError {
    move |source| DescriptorError::System { what: what.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    const FIRST: DescriptorIndex = DescriptorIndex(0);

    fn one(fd: impl Into<OwnedFd>) -> Descriptors {
        Descriptors::new(vec![fd.into()])
    }

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn each_descriptor_is_used_once() {
        let mut descriptors = one(tempfile::tempfile().unwrap());
        assert!(descriptors.file(FIRST, "kernel", Access::Read).is_ok());
        let again = descriptors.file(FIRST, "initramfs", Access::Read).unwrap_err();
        assert_eq!(again.to_string(), "initramfs: descriptor 0 already in use");
        let beyond = descriptors.file(DescriptorIndex(1), "disk 0", Access::Read).unwrap_err();
        assert_eq!(beyond.to_string(), "disk 0: descriptor index 1 out of range (1 received)");
        assert!(descriptors.finish().is_ok());
        assert!(matches!(one(null()).finish(), Err(DescriptorError::Left(1))));
    }

    #[test]
    fn each_descriptor_is_what_it_should_be() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(one(null()).file(FIRST, "kernel", Access::Read).is_err());
        assert!(one(null()).disk(FIRST, "disk", Access::Read).is_err());
        assert!(one(null()).listener(FIRST, "vsock").is_err());
        assert!(one(null()).tap(FIRST, "network 0").is_err());
        assert!(one(null()).output(FIRST, "console").is_err(), "open for reading only");
        assert!(one(stream.try_clone().unwrap()).listener(FIRST, "vsock").is_err());
        assert!(one(stream).packet_socket(FIRST, "share").is_err());
        assert!(one(listener).listener(FIRST, "vsock").is_ok());
    }

    #[test]
    fn the_open_mode_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(file.path()).unwrap();
        assert!(one(read_only.try_clone().unwrap()).disk(FIRST, "disk", Access::Read).is_ok());
        assert!(one(read_only).disk(FIRST, "disk", Access::ReadWrite).is_err());
        let write_only = File::options().write(true).open(file.path()).unwrap();
        assert!(one(write_only).file(FIRST, "kernel", Access::Read).is_err());
        let path_only = rustix::fs::open(file.path(), OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        assert!(one(path_only).file(FIRST, "kernel", Access::Read).is_err());
    }

    #[test]
    fn a_disk_whose_flags_would_change_what_its_writes_mean_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let appending = || File::options().read(true).append(true).open(file.path()).unwrap();
        let refused = one(appending()).disk(FIRST, "disk 0", Access::ReadWrite).unwrap_err();
        assert_eq!(refused.to_string(), "disk 0: the descriptor is not open without O_APPEND");
        assert!(one(appending()).disk(FIRST, "disk 0", Access::Read).is_ok(), "nothing is written");
        // Where the file system of the temporary files has it.
        let flags = OFlags::RDWR | OFlags::DIRECT;
        if let Ok(direct) = rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()) {
            assert!(one(direct).disk(FIRST, "disk 0", Access::Read).unwrap_err().to_string().contains("O_DIRECT"));
        }
    }
}

//! One packet on a SOCK_SEQPACKET Unix socket: bytes, and descriptors beside them. Everything that arrives is owned
//! from the first moment, with close-on-exec set, so nothing leaks whatever the packet turns out to be.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use caisson_protos::monitor::{MAX_DESCRIPTORS, MAX_PACKET};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// A connected pair of SOCK_SEQPACKET sockets, blocking, close-on-exec.
///
/// # Errors
/// The error of socketpair(2), EMFILE for one.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one packet now, or not at all.
///
/// # Errors
/// `WouldBlock` if the socket's buffer is full, `BrokenPipe` if the other end is closed, `InvalidInput` with more than
/// [`MAX_DESCRIPTORS`] descriptors.
pub fn send(socket: &impl AsFd, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = fds.len() <= MAX_DESCRIPTORS && (fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    if !fits {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            sent => return sent.map(drop).map_err(Into::into),
        }
    }
}

/// Takes one packet now, into `buffer`: its length and descriptors. Length 0 is the end.
///
/// # Errors
/// `WouldBlock` if there is none; `InvalidData` if it is larger than `buffer` or carries more than [`MAX_DESCRIPTORS`]
/// descriptors; EMFILE if this process could not take all of them. In each case those that came are closed.
pub fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    // It owns what the kernel puts into it.
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) && descriptors.len() < MAX_DESCRIPTORS {
        return Err(Errno::MFILE.into());
    }
    let truncated = message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    // There is a little more room than was asked for, to align it.
    if truncated || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet larger than the protocol allows"));
    }
    Ok((message.bytes, descriptors))
}

/// Puts a descriptor into the current runtime's reactor.
///
/// # Errors
/// The error of epoll; EPERM for a regular file.
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives, always has the same number, and moves into the AsyncFd.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(Into::into)
}

/// A packet socket in the runtime's reactor.
#[derive(Debug)]
pub struct PacketSocket(AsyncFd<OwnedFd>);

impl PacketSocket {
    /// Registers `socket` with the current runtime.
    ///
    /// # Errors
    /// The error of epoll.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        register(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Sends one packet, waiting for room.
    ///
    /// # Errors
    /// As [`send`], except `WouldBlock`.
    pub async fn send(&self, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, |socket| send(socket, bytes, descriptors)).await
    }

    /// Waits for one packet of at most [`MAX_PACKET`] bytes; None when the other end has closed.
    ///
    /// # Errors
    /// As [`receive`], except `WouldBlock`. A reset connection counts as closed.
    pub async fn receive<'b>(&self, buffer: &'b mut Vec<u8>) -> io::Result<Option<(&'b [u8], Vec<OwnedFd>)>> {
        buffer.resize(MAX_PACKET, 0);
        match self.0.async_io(Interest::READABLE, |socket| receive(socket, buffer)).await {
            Ok((0, _)) => Ok(None),
            Ok((length, descriptors)) => Ok(buffer.get(..length).map(|bytes| (bytes, descriptors))),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Sends a packet with `count` descriptors of one file by hand, since [`send`] refuses more than may be.
    fn send_many(socket: &OwnedFd, count: usize, file: &File) {
        let fds = vec![file.as_fd(); count];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(socket, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    }

    /// How many descriptors of this process are open at `file`.
    fn open_at(file: &File) -> usize {
        use std::os::unix::fs::MetadataExt;
        let wanted = file.metadata().unwrap().ino();
        let entries = std::fs::read_dir("/proc/self/fd").unwrap();
        let inode = |entry: std::io::Result<std::fs::DirEntry>| Some(std::fs::metadata(entry.ok()?.path()).ok()?.ino());
        entries.filter_map(inode).filter(|inode| *inode == wanted).count()
    }

    #[test]
    fn descriptors_of_a_packet_that_carries_too_many_are_closed() {
        let path = std::env::temp_dir().join(format!("caisson-packet-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (near, far) = pair().unwrap();
        let mut buffer = [0; 8];
        for count in [MAX_DESCRIPTORS + 1, 253] {
            send_many(&far, count, &file);
            let refused = receive(&near, &mut buffer).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{count}");
            assert_eq!(open_at(&file), 1, "{count} were sent");
        }
        send_many(&far, MAX_DESCRIPTORS, &file);
        let (_, mut descriptors) = receive(&near, &mut buffer).unwrap();
        assert_eq!(descriptors.len(), MAX_DESCRIPTORS);
        descriptors.push(file.into());
        let refused = send(&far, b"x", &descriptors).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}

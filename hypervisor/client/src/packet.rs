//! One packet on a SOCK_SEQPACKET Unix socket: bytes, and descriptors beside them. Everything that arrives is owned
//! from the first moment, with close-on-exec set, so nothing leaks whatever the packet turns out to be.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use caisson_protos::monitor::{MAX_DESCRIPTORS, MAX_PACKET};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use tokio::io::{Interest, unix::AsyncFd};

/// A connected pair of SOCK_SEQPACKET sockets, blocking, close-on-exec.
///
/// # Errors
/// What the system says, EMFILE for one.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one packet now, or not at all.
///
/// # Errors
/// `WouldBlock` if the socket's buffer is full, `BrokenPipe` if the other end is closed.
pub fn send(socket: &impl AsRawFd, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    Ok(())
}

/// Takes one packet now, into `buffer`: its length and descriptors. Length 0 is the end.
///
/// # Errors
/// `WouldBlock` if there is none; `InvalidData` if it is larger than `buffer` or carries too many descriptors.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut bytes = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut bytes, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just installed these descriptors in this process, for this message alone.
            descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet larger than the protocol allows"));
    }
    Ok((message.bytes, descriptors))
}

/// Puts a descriptor into the current runtime's reactor.
///
/// # Errors
/// What epoll says; EPERM for a regular file.
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
    /// What epoll says.
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

//! The control socket: one packet in or out at a time, with its descriptors. What it says is
//! [`caisson_protos::monitor`]'s; this is only how it travels.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use caisson_protos::monitor::{CodecError, Command, Event, MAX_DESCRIPTORS, MAX_PACKET, decode, encode};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendFlags, SocketType, recvmsg, sendmsg, sockopt,
    },
};

use crate::descriptors::Descriptors;

/// What came in.
#[derive(Debug)]
pub enum Received {
    /// A command with its descriptors.
    Command(Command, Descriptors),
    /// A packet that is not a command, dropped with its descriptors. What comes after it cannot be trusted either.
    Malformed(MalformedPacket),
    /// The parent has gone.
    Closed,
}

/// Why a packet was dropped.
#[derive(Debug, thiserror::Error)]
pub enum MalformedPacket {
    /// It does not decode.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Larger than a packet may be.
    #[error("control packet exceeds {MAX_PACKET} bytes")]
    TooLong,
    /// More descriptors than a packet may carry, or than this process may open.
    #[error(
        "control packet carries more than {MAX_DESCRIPTORS} descriptors, or more than the limit of open files allows"
    )]
    TooManyDescriptors,
}

/// The socket itself is unusable.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not what the parent should have left there.
    #[error("descriptor 3 is not a SOCK_SEQPACKET Unix socket: caisson-vmm is started by its shim, not by hand")]
    NotASocket,
    /// A call failed.
    #[error("control socket: {0}")]
    System(#[from] Errno),
    /// An answer that does not fit into a packet.
    #[error("control socket: {0}")]
    Codec(#[from] CodecError),
}

/// Our end of the control socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

impl Control {
    /// Takes the socket over.
    ///
    /// # Errors
    /// [`ControlError::NotASocket`].
    pub fn new(socket: OwnedFd) -> Result<Self, ControlError> {
        let domain = sockopt::socket_domain(&socket).map_err(|_| ControlError::NotASocket)?;
        if domain != AddressFamily::UNIX || sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
            return Err(ControlError::NotASocket);
        }
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Self { socket })
    }

    /// Waits for the next packet.
    ///
    /// # Errors
    /// Only what makes the socket useless.
    pub fn receive(&self) -> Result<Received, ControlError> {
        // One more byte than a packet may have, so that a longer one shows.
        let mut bytes = vec![0; MAX_PACKET + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(Received::Closed),
                result => break result?,
            }
        };
        // Whatever happens below, the descriptors are ours now, and owned means closed if not used.
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.extend(rights);
            }
        }
        // There is a little more room than was asked for, to align it.
        if message.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
            return Ok(Received::Malformed(MalformedPacket::TooManyDescriptors));
        }
        if message.bytes > MAX_PACKET || message.flags.contains(ReturnFlags::TRUNC) {
            return Ok(Received::Malformed(MalformedPacket::TooLong));
        }
        match bytes.get(..message.bytes) {
            // An empty packet and the end of the stream look the same; no command is empty.
            None | Some([]) => Ok(Received::Closed),
            Some(packet) => Ok(match decode(packet) {
                Ok(command) => Received::Command(command, Descriptors::new(descriptors)),
                Err(error) => Received::Malformed(error.into()),
            }),
        }
    }

    /// Sends an answer or the exit notice. A parent that has gone does not matter: the next receive reports it.
    ///
    /// # Errors
    /// What the parent cannot be blamed for.
    pub fn send(&self, event: &Event) -> Result<(), ControlError> {
        let packet = encode(event)?;
        loop {
            let parts = [IoSlice::new(&packet)];
            match sendmsg(&self.socket, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(()),
                result => return result.map(drop).map_err(Into::into),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

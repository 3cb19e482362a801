//! Sockets: a request and its acknowledgement, a dump of a table, and a subscription to what changes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_sys::SocketAddr;

use crate::{
    message::{HEADER, Message, Received, attributes, received, text, u32_at},
    uapi::NLMSGERR_ATTR_MSG,
};

/// Room for a datagram: the kernel fills it with entries of a dump as far as they fit.
const ROOM: usize = 32 * 1024;
/// How often a dump is read that changes while it is read.
const TRIES: usize = 32;
/// `i32` and the header of the request, before the attributes of an error.
const ERROR_HEADER: usize = 4 + HEADER;

/// The kernel's answer to a request that it refuses.
#[derive(Debug, thiserror::Error)]
#[error("{error}{}", note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default())]
pub struct Refused {
    /// Why.
    pub error: io::Error,
    /// The kernel's own explanation, if it gave one.
    pub note: Option<String>,
}

impl Refused {
    /// Whether the error has this number.
    #[must_use]
    pub fn is(&self, errno: i32) -> bool {
        self.error.raw_os_error() == Some(errno)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { error, note: None }
    }
}

/// A socket for requests, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
}

impl Socket {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// The system call's.
    pub fn open() -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(libc::NETLINK_ROUTE as isize)?;
        socket.bind_auto()?;
        // An error without the request that it answers, and with an explanation. An old kernel has neither.
        let _ = socket.set_cap_ack(true).and_then(|()| socket.set_ext_ack(true));
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits for the kernel to carry it out.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn request(&mut self, message: &Message) -> Result<(), Refused> {
        let sequence = self.send(message, libc::NLM_F_ACK)?;
        loop {
            let datagram = self.receive()?;
            if let Some(answer) = received(&datagram).find(|answer| answer.sequence == sequence)
                && answer.kind == libc::NLMSG_ERROR as u16
            {
                return outcome(answer);
            }
        }
    }

    /// The payloads of all entries of a table. `message` is a request of type RTM_GET*.
    ///
    /// # Errors
    /// What the kernel says; or that the table changed every time that it was read.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Vec<u8>>, Refused> {
        for _ in 0..TRIES {
            if let Some(entries) = self.dump_once(message)? {
                return Ok(entries);
            }
        }
        Err(io::Error::other("the table changes faster than it can be read").into())
    }

    /// None if the table changed meanwhile: entries may be missing or there twice.
    fn dump_once(&mut self, message: &Message) -> Result<Option<Vec<Vec<u8>>>, Refused> {
        let sequence = self.send(message, libc::NLM_F_DUMP)?;
        let (mut entries, mut whole) = (Vec::new(), true);
        loop {
            let datagram = self.receive()?;
            for answer in received(&datagram).filter(|answer| answer.sequence == sequence) {
                whole &= i32::from(answer.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(answer.kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        outcome(answer)?;
                        return Ok(whole.then_some(entries));
                    }
                    _ => entries.push(answer.payload.to_vec()),
                }
            }
        }
    }

    fn send(&mut self, message: &Message, flags: i32) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let encoded = message.encode(flags | libc::NLM_F_REQUEST, self.sequence);
        let encoded = encoded.ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        self.socket.send_to(&encoded, &SocketAddr::new(0, 0), 0)?;
        Ok(self.sequence)
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(datagram) = from_kernel(&self.socket)? {
                return Ok(datagram);
            }
        }
    }
}

/// The next datagram, or None if it came from another process, of which there may be some with CAP_NET_ADMIN in the namespace.
fn from_kernel(socket: &netlink_sys::Socket) -> io::Result<Option<Vec<u8>>> {
    let mut datagram = Vec::with_capacity(ROOM);
    let (length, sender) = loop {
        match socket.recv_from(&mut datagram, libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if length > ROOM {
        return Err(io::Error::other(format!("a netlink message of {length} bytes does not fit")));
    }
    Ok((sender.port_number() == 0).then_some(datagram))
}

/// What NLMSG_ERROR and NLMSG_DONE say: 0 or a negative errno first, an explanation among the attributes.
fn outcome(answer: Received<'_>) -> Result<(), Refused> {
    let code = u32_at(answer.payload, 0).map(u32::cast_signed);
    match code {
        Some(0) => Ok(()),
        // The length of what was dumped, not an error.
        Some(code) if code > 0 => Ok(()),
        Some(code) => {
            let header = if i32::from(answer.kind) == libc::NLMSG_DONE { 4 } else { ERROR_HEADER };
            let explained = i32::from(answer.flags) & libc::NLM_F_ACK_TLVS != 0;
            let mut notes = attributes(answer.payload, header).filter(|_| explained);
            let note = notes.find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, note)| text(note));
            Err(Refused { error: io::Error::from_raw_os_error(code.saturating_neg()), note })
        }
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

/// Notifications of what changes in the network namespace of the thread that opened it. Readable (poll(2), epoll(7)) when there
/// are some.
#[derive(Debug)]
pub struct Subscription {
    socket: netlink_sys::Socket,
}

impl Subscription {
    /// Subscribes to `groups` (RTNLGRP_*) in the calling thread's network namespace. What changes from here on is reported.
    ///
    /// # Errors
    /// The system call's.
    pub fn open(groups: &[u32]) -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(libc::NETLINK_ROUTE as isize)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Self { socket })
    }

    /// Reads what there is without waiting and shows each notification's type and payload to `relevant`. Whether one of them was
    /// relevant, or some were lost.
    ///
    /// # Errors
    /// The system call's.
    pub fn drain(&self, mut relevant: impl FnMut(u16, &[u8]) -> bool) -> io::Result<bool> {
        let mut any = false;
        loop {
            match from_kernel(&self.socket) {
                Ok(datagram) => {
                    let datagram = datagram.unwrap_or_default();
                    any |= received(&datagram).any(|one| relevant(one.kind, one.payload));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Subscription {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Subscription {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

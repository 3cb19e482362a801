//! The host end of a stream: a non-blocking Unix socket, and the bytes from the guest that it could not take yet.
//!
//! Sockets are watched edge-triggered. A device that has no buffer of the guest to read into, or no credit, just leaves
//! the socket readable: the event has passed and will not come again and again. What it must do in return is to remember
//! that there is something to read ([`HostEnd::is_readable`]). The wish to write is watched for only while bytes wait,
//! else each read of the other end would wake the device.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{SendFlags, Shutdown},
};

use super::super::{Buffers, Poll, PollToken};

/// Whoever holds the other end does not read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deaf;

/// What came out of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The end of the stream.
    End,
}

/// The events that every socket of a stream is watched for.
pub const READ_EVENTS: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

/// The host end of one stream.
#[derive(Debug)]
pub struct HostEnd {
    /// None when both directions are over.
    socket: Option<OwnedFd>,
    watched: bool,
    token: PollToken,
    spill: Spill,
    watches_write: bool,
    readable: bool,
    /// The other end has finished or closed: what can be read now is all, and then comes the end.
    finishing: bool,
    closed: bool,
    write_shut: bool,
    read_shut: bool,
    /// When the guest must have answered at the latest.
    pub deadline: Option<Instant>,
}

impl HostEnd {
    /// Takes a non-blocking stream socket; `watched` if it is watched under some token already.
    pub fn new(socket: OwnedFd, watched: bool, deadline: Option<Instant>) -> Self {
        Self {
            socket: Some(socket),
            watched,
            token: 0,
            spill: Spill::default(),
            watches_write: false,
            readable: false,
            finishing: false,
            closed: false,
            write_shut: false,
            read_shut: false,
            deadline,
        }
    }

    /// Watches the socket under `token`.
    ///
    /// # Errors
    /// The system call's.
    pub fn watch(&mut self, token: PollToken, poll: &mut dyn Poll) -> io::Result<()> {
        self.token = token;
        let Some(socket) = &self.socket else { return Ok(()) };
        let fd = socket.as_raw_fd();
        // A change of the watch repeats the events that hold.
        if std::mem::replace(&mut self.watched, true) {
            poll.modify(fd, token, READ_EVENTS)
        } else {
            poll.add(fd, token, READ_EVENTS).inspect_err(|_| self.watched = false)
        }
    }

    /// Takes in that `events` came for the socket.
    pub fn note(&mut self, events: EventSet) {
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= !self.read_shut && events.intersects(EventSet::IN | ends);
        self.finishing |= events.intersects(ends);
        self.closed |= events.intersects(EventSet::HANG_UP | EventSet::ERROR);
    }

    /// Whether a read may give something.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether the other end was closed altogether: it will not read what comes now.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether bytes wait for the socket.
    pub fn has_spill(&self) -> bool {
        !self.spill.is_empty()
    }

    /// Reads up to `len` bytes into the guest's buffers from byte `offset` on.
    pub fn receive(&mut self, into: &Buffers, offset: usize, len: usize) -> Incoming {
        let Some(socket) = &self.socket else { return Incoming::Nothing };
        loop {
            return match into.read_from(socket.as_fd(), None, offset, len) {
                Ok(0) => self.end(),
                Ok(n) => {
                    // Less than there was room for is all there was, and whatever comes later comes with an event.
                    self.readable = n == len || self.finishing;
                    Incoming::Bytes(n)
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        Incoming::Nothing
                    }
                    // The other end was closed before it had read everything.
                    _ => {
                        self.closed = true;
                        self.end()
                    }
                },
            };
        }
    }

    fn end(&mut self) -> Incoming {
        self.readable = false;
        self.read_shut = true;
        Incoming::End
    }

    /// Writes `len` bytes of the guest's buffers from byte `offset` on, and keeps what the socket does not take. Returns
    /// how many it took.
    ///
    /// # Errors
    /// [`Deaf`]; then nothing is kept.
    pub fn deliver(&mut self, from: &Buffers, offset: usize, len: usize, poll: &mut dyn Poll) -> Result<usize, Deaf> {
        let socket = self.socket.as_ref().ok_or(Deaf)?;
        let mut taken = 0;
        if self.spill.is_empty() {
            taken = match from.write_to(socket.as_fd(), None, offset, len) {
                Ok(n) => n,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                Err(_) => return Err(self.deafen()),
            };
        }
        if taken < len {
            self.spill.push(from, offset.saturating_add(taken), len - taken);
            self.watch_write(true, poll);
        }
        Ok(taken)
    }

    /// Writes what waits. Returns how many bytes the socket took.
    ///
    /// # Errors
    /// [`Deaf`]; then nothing waits any more.
    pub fn flush(&mut self, poll: &mut dyn Poll) -> Result<usize, Deaf> {
        let socket = self.socket.as_ref().ok_or(Deaf)?;
        let mut taken = 0;
        while !self.spill.is_empty() {
            match rustix::net::send(socket, self.spill.waiting(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => {
                    self.spill.drop_front(n);
                    taken += n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(taken),
                Err(_) => return Err(self.deafen()),
            }
        }
        self.watch_write(false, poll);
        Ok(taken)
    }

    /// Writes a few bytes to a socket that was not written to before.
    ///
    /// # Errors
    /// [`Deaf`], also if a socket that is still empty does not take all.
    pub fn greet(&mut self, line: &[u8]) -> Result<(), Deaf> {
        let socket = self.socket.as_ref().ok_or(Deaf)?;
        match rustix::net::send(socket, line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == line.len() => Ok(()),
            _ => Err(self.deafen()),
        }
    }

    fn deafen(&mut self) -> Deaf {
        self.spill = Spill::default();
        self.write_shut = true;
        Deaf
    }

    /// What waits will never be read: forget it.
    pub fn drop_spill(&mut self) {
        self.deafen();
    }

    /// The guest will send no more, and everything was delivered: the other end reads its end of file.
    pub fn shut_write(&mut self) {
        if let Some(socket) = &self.socket
            && !std::mem::replace(&mut self.write_shut, true)
        {
            // Fails only for a socket whose other end is gone.
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    /// The guest will receive no more: a write of the other end fails.
    pub fn shut_read(&mut self) {
        self.readable = false;
        if let Some(socket) = &self.socket
            && !std::mem::replace(&mut self.read_shut, true)
        {
            let _ = rustix::net::shutdown(socket, Shutdown::Read);
        }
    }

    /// Ends both directions.
    pub fn close(&mut self, poll: &mut dyn Poll) {
        self.readable = false;
        self.spill = Spill::default();
        if let Some(socket) = self.socket.take()
            && std::mem::take(&mut self.watched)
        {
            poll.remove(socket.as_raw_fd());
        }
    }

    fn watch_write(&mut self, wanted: bool, poll: &mut dyn Poll) {
        if let Some(socket) = &self.socket
            && self.watches_write != wanted
        {
            let events = if wanted { READ_EVENTS | EventSet::OUT } else { READ_EVENTS };
            // A change of a watch that exists needs no memory of the kernel and cannot fail.
            self.watches_write = poll.modify(socket.as_raw_fd(), self.token, events).is_ok() == wanted;
        }
    }
}

/// Bytes that wait for a socket. The connection's credit bounds them.
#[derive(Debug, Default)]
struct Spill {
    bytes: Vec<u8>,
    /// The first byte that waits.
    start: usize,
}

impl Spill {
    fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    fn waiting(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    fn push(&mut self, from: &Buffers, offset: usize, len: usize) {
        // Moves each byte at most once for each byte that was dropped, and keeps at most twice what waits.
        if self.start >= self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + len, 0);
        if let Some(room) = self.bytes.get_mut(end..)
            && from.read(offset, room).is_err()
        {
            // The caller has checked the chain's length.
            self.bytes.truncate(end);
        }
    }

    fn drop_front(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.bytes.len());
        if self.is_empty() {
            // A burst must not hold its memory for the life of the stream.
            *self = Self::default();
        }
    }
}

//! The host end of a stream: a non-blocking Unix socket, and the bytes from the guest that it could not take yet.
//!
//! Sockets are watched edge-triggered. A device that has no buffer of the guest to read into, or no credit, just leaves
//! the socket readable: the event has passed and will not come again and again. What it must do in return is to remember
//! that there is something to read ([`HostEnd::is_readable`]). The wish to write is watched for only while bytes wait,
//! else each read of the other end would wake the device.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown},
};

use super::super::{Buffers, Poll, PollToken};

/// The holder of the other end does not read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadClosed;

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

/// The most that is read and thrown away when a client is refused, bytes: what a socket holds by default.
const MAX_DISCARDED: usize = 256 * 1024;

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
    /// It was found that the end does not come next, and nothing was read since.
    end_is_far: bool,
    closed: bool,
    write_shut: bool,
    read_shut: bool,
    /// The guest's acceptance was reported to the client, or no client waits for it.
    accepted: bool,
    /// When the guest must have answered at the latest: to a REQUEST, or to the end of both directions.
    pub deadline: Option<Instant>,
}

impl HostEnd {
    /// Takes a non-blocking stream socket; `watched` if it is watched under some token already. With a `deadline` it is that
    /// of a client that waits for the guest to accept.
    pub fn new(socket: OwnedFd, watched: bool, deadline: Option<Instant>) -> Self {
        Self {
            socket: Some(socket),
            watched,
            token: 0,
            spill: Spill::default(),
            watches_write: false,
            readable: false,
            finishing: false,
            end_is_far: false,
            closed: false,
            write_shut: false,
            read_shut: false,
            accepted: deadline.is_none(),
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

    /// Whether [`Self::look_for_end`] may find it.
    pub fn may_be_at_end(&self) -> bool {
        self.readable && self.finishing && !self.end_is_far
    }

    /// Looks whether the end of the stream comes next, for a guest that has no room for what may come before it.
    pub fn look_for_end(&mut self) -> Incoming {
        let Some(socket) = &self.socket else { return Incoming::Nothing };
        match rustix::net::recv(socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.end(),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {
                self.end_is_far = true;
                Incoming::Nothing
            }
            Err(_) => {
                self.closed = true;
                self.end()
            }
        }
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
                    // Less than there was room for is mostly all there was, and whatever comes later comes with an event.
                    // But Linux also stops behind bytes that carried descriptors, and before urgent ones.
                    let more = || rustix::io::ioctl_fionread(socket).is_ok_and(|bytes| bytes > 0);
                    self.readable = n == len || self.finishing || more();
                    self.end_is_far = false;
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
    /// [`ReadClosed`]; then nothing is kept.
    pub fn deliver(
        &mut self,
        from: &Buffers,
        offset: usize,
        len: usize,
        poll: &mut dyn Poll,
    ) -> Result<usize, ReadClosed> {
        let socket = self.socket.as_ref().ok_or(ReadClosed)?;
        let mut taken = 0;
        if self.spill.is_empty() {
            taken = match from.write_to(socket.as_fd(), None, offset, len) {
                Ok(n) => n,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                Err(_) => return Err(self.stop_writing()),
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
    /// [`ReadClosed`]; then nothing waits any more.
    pub fn flush(&mut self, poll: &mut dyn Poll) -> Result<usize, ReadClosed> {
        let socket = self.socket.as_ref().ok_or(ReadClosed)?;
        let mut taken = 0;
        while !self.spill.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(socket, &self.spill.waiting(), &mut SendAncillaryBuffer::default(), flags) {
                Ok(n) => {
                    self.spill.drop_front(n);
                    taken += n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(taken),
                Err(_) => return Err(self.stop_writing()),
            }
        }
        self.watch_write(false, poll);
        Ok(taken)
    }

    /// Reports to the client by `line` that the guest has accepted.
    ///
    /// # Errors
    /// [`ReadClosed`], also if a socket that is still empty does not take all.
    pub fn accept(&mut self, line: &[u8]) -> Result<(), ReadClosed> {
        (self.accepted, self.deadline) = (true, None);
        let socket = self.socket.as_ref().ok_or(ReadClosed)?;
        match rustix::net::send(socket, line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == line.len() => Ok(()),
            _ => Err(self.stop_writing()),
        }
    }

    fn stop_writing(&mut self) -> ReadClosed {
        self.spill = Spill::default();
        self.write_shut = true;
        ReadClosed
    }

    /// What waits will never be read: forget it.
    pub fn drop_spill(&mut self) {
        self.stop_writing();
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

    /// Ends both directions. A client that was refused reads the end of file. One that was accepted reads ECONNRESET in its
    /// place if the guest did not take all that it has sent.
    pub fn close(&mut self, poll: &mut dyn Poll) {
        self.readable = false;
        self.spill = Spill::default();
        if let Some(socket) = self.socket.take() {
            if std::mem::take(&mut self.watched) {
                poll.remove(socket.as_raw_fd());
            }
            if !self.accepted {
                discard_unread(&socket);
            }
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

/// Before the socket of a refused client is closed: with unread bytes its other end would read ECONNRESET and not the end of file.
/// More cannot come once the direction is shut down.
pub fn discard_unread(socket: &OwnedFd) {
    let _ = rustix::net::shutdown(socket, Shutdown::Read);
    let mut bytes = [0; 16 * 1024];
    for _ in 0..MAX_DISCARDED / bytes.len() {
        if !matches!(rustix::net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT), Ok((_, 1..))) {
            return;
        }
    }
}

/// Bytes that wait for a socket, in chunks of one size: whatever comes and goes, it takes no more memory than waits and two chunks.
/// The connection's credit bounds what waits.
#[derive(Debug, Default)]
struct Spill {
    /// None is empty.
    chunks: VecDeque<Vec<u8>>,
    /// The first byte that waits in the first chunk.
    start: usize,
}

impl Spill {
    const CHUNK: usize = 8 * 1024;
    /// Chunks written in one call.
    const BATCH: usize = 64;

    fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The first of what waits.
    fn waiting(&self) -> Vec<IoSlice<'_>> {
        let starts = std::iter::once(self.start).chain(std::iter::repeat(0));
        let chunks = self.chunks.iter().zip(starts).take(Self::BATCH);
        chunks.map(|(chunk, start)| IoSlice::new(chunk.get(start..).unwrap_or_default())).collect()
    }

    fn push(&mut self, from: &Buffers, offset: usize, len: usize) {
        let mut done = 0;
        while done < len {
            let Some(chunk) = self.chunks.back_mut().filter(|chunk| chunk.len() < Self::CHUNK) else {
                self.chunks.push_back(Vec::with_capacity(Self::CHUNK));
                continue;
            };
            let end = chunk.len();
            let count = (Self::CHUNK - end).min(len - done);
            chunk.resize(end + count, 0);
            // The caller has checked the chain's length.
            let Some(room) = chunk.get_mut(end..) else { return };
            if from.read(offset.saturating_add(done), room).is_err() {
                return;
            }
            done += count;
        }
    }

    fn drop_front(&mut self, count: usize) {
        let mut start = self.start.saturating_add(count);
        while let Some(first) = self.chunks.front().map(Vec::len).filter(|len| start >= *len) {
            start -= first;
            self.chunks.pop_front();
        }
        self.start = start;
        if self.chunks.is_empty() {
            // A burst must not hold its memory for the life of the stream.
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::virtio::GuestMemory;

    proptest! {
        #[test]
        fn what_waits_keeps_its_order_and_takes_little_more_memory_than_it_has_bytes(
            steps in proptest::collection::vec((0..20_000usize, 0..30_000usize), 1..40),
        ) {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
            let bytes: Vec<u8> = (0..1 << 16).map(|i: u32| (i / 3) as u8 ^ (i >> 8) as u8).collect();
            memory.write_slice(&bytes, GuestAddress(0)).unwrap();
            let mut from = Buffers::default();
            for slice in GuestMemoryBackend::get_slices(&memory, GuestAddress(0), 1 << 16) {
                prop_assert!(from.push(slice.unwrap()));
            }
            let (mut spill, mut model) = (Spill::default(), Vec::new());
            for (pushed, dropped) in steps {
                spill.push(&from, pushed, pushed);
                model.extend_from_slice(&bytes[pushed..pushed * 2]);
                let waiting: Vec<u8> = spill.waiting().iter().flat_map(|slice| slice.to_vec()).collect();
                prop_assert!(model.starts_with(&waiting));
                prop_assert_eq!(waiting.is_empty(), model.is_empty());
                let dropped = dropped.min(waiting.len());
                spill.drop_front(dropped);
                model.drain(..dropped);
                prop_assert_eq!(spill.is_empty(), model.is_empty());
                let memory: usize = spill.chunks.iter().map(Vec::capacity).sum();
                prop_assert!(memory <= model.len() + 2 * Spill::CHUNK, "{} bytes for {}", memory, model.len());
            }
        }
    }
}

//! The listening Unix socket for streams to the guest, and the clients that have not finished their CONNECT line.
//!
//! ```text
//!   client:  connect(2)   "CONNECT 1024\n"  ……………………………… "OK 1073741824\n"   or end of file: refused
//!                │               │                              ▲
//!   monitor:   accept        read the line ── REQUEST ─► guest ─┘ RESPONSE
//! ```
//!
//! A client that closes its socket before it has read the answer has given up: its stream is reset, whatever it sent.
//!
//! The line is looked at without being taken from the socket until it is complete, so nothing of it is stored here,
//! and what the client sends right behind it stays where the stream will read it. A client has to be quick: when
//! too many have not finished their line, the oldest is dropped, and none has longer than the device's time limit.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{RecvFlags, SocketFlags},
};

use super::{
    super::Poll,
    Source,
    host::{READ_EVENTS, discard_unread},
};

/// Clients accepted in one go.
const MAX_ACCEPTS: usize = 32;
/// The longest line: the word, a space, ten digits, a line feed.
const MAX_LINE: usize = "CONNECT 4294967295\n".len();
const VERB: &[u8] = b"CONNECT ";

/// What a client has sent so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Not enough, but nothing wrong.
    Partial,
    /// It wants to that port of the guest; the line has `len` bytes.
    Connect {
        /// The guest's port.
        port: u32,
        /// Bytes up to and including the line feed.
        len: usize,
    },
    /// Not the protocol.
    Malformed,
}

/// Reads a client's line out of the first bytes that it sent.
pub fn parse_line(bytes: &[u8]) -> Line {
    let Some(end) = bytes.iter().take(MAX_LINE).position(|&byte| byte == b'\n') else {
        let expected = bytes.iter().zip(VERB).all(|(byte, verb)| byte == verb)
            && bytes.iter().skip(VERB.len()).all(u8::is_ascii_digit);
        return if expected && bytes.len() < MAX_LINE { Line::Partial } else { Line::Malformed };
    };
    let digits = bytes.get(..end).and_then(|line| line.strip_prefix(VERB)).unwrap_or_default();
    let port = digits.iter().try_fold(0u32, |port, byte| {
        let digit = char::from(*byte).to_digit(10)?;
        port.checked_mul(10)?.checked_add(digit)
    });
    match port {
        Some(port) if !digits.is_empty() => Line::Connect { port, len: end + 1 },
        _ => Line::Malformed,
    }
}

/// A client that has not finished its line.
#[derive(Debug)]
struct Greeting {
    number: u32,
    socket: OwnedFd,
    deadline: Instant,
}

/// A client that has.
#[derive(Debug)]
pub struct Caller {
    /// Its socket.
    pub socket: OwnedFd,
    /// The guest's port.
    pub port: u32,
    /// Whether the socket is watched, under its greeting's token.
    pub watched: bool,
}

/// The listening socket and its clients.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    greetings: VecDeque<Greeting>,
    limit: usize,
    next_number: u32,
    watched: bool,
    /// Not watched before this time, because the process had no descriptor for another client.
    rests_until: Option<Instant>,
}

impl Listener {
    /// Takes a listening stream socket; `limit` clients may be unfinished.
    ///
    /// # Errors
    /// If it cannot be made non-blocking.
    pub fn new(socket: OwnedFd, limit: usize) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, greetings: VecDeque::new(), limit, next_number: 0, watched: false, rests_until: None })
    }

    /// Begins to listen, if it does not and does not rest.
    ///
    /// # Errors
    /// The system call's.
    pub fn watch(&mut self, now: Instant, poll: &mut dyn Poll) -> io::Result<()> {
        if self.rests_until.is_some_and(|until| now < until) {
            return Ok(());
        }
        self.rests_until = None;
        if !self.watched {
            poll.add(self.socket.as_raw_fd(), Source::Listener.token(), EventSet::IN)?;
            self.watched = true;
        }
        Ok(())
    }

    /// Does not listen before `until`; clients wait in the kernel.
    pub fn rest(&mut self, until: Instant, poll: &mut dyn Poll) {
        self.rests_until = Some(until);
        self.unwatch(poll);
    }

    /// When it wants to listen again.
    pub fn rests_until(&self) -> Option<Instant> {
        self.rests_until
    }

    fn unwatch(&mut self, poll: &mut dyn Poll) {
        if std::mem::take(&mut self.watched) {
            poll.remove(self.socket.as_raw_fd());
        }
    }

    /// Stops to listen and drops the unfinished clients.
    pub fn reset(&mut self, poll: &mut dyn Poll) {
        self.rests_until = None;
        self.unwatch(poll);
        for greeting in std::mem::take(&mut self.greetings) {
            poll.remove(greeting.socket.as_raw_fd());
        }
    }

    /// Accepts who waits, up to a limit (the socket stays ready then). Returns those whose line is there already, as
    /// it often is.
    ///
    /// # Errors
    /// When the process or the system has no descriptors or memory left: the listener should rest for a while.
    pub fn accept(&mut self, deadline: Instant, poll: &mut dyn Poll) -> io::Result<Vec<Caller>> {
        let mut callers = Vec::new();
        for _ in 0..MAX_ACCEPTS {
            let socket = match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                // Clients that came before are served first; the next call meets the error again.
                Err(_) if !callers.is_empty() => break,
                Err(error) => return Err(error.into()),
            };
            match take_line(socket.as_fd()) {
                Line::Connect { port, .. } => callers.push(Caller { socket, port, watched: false }),
                Line::Partial => match self.greet(socket, deadline, poll) {
                    Ok(()) => {}
                    // As above. The client itself is lost: it cannot be watched.
                    Err(_) if !callers.is_empty() => break,
                    Err(error) => return Err(error),
                },
                Line::Malformed => discard_unread(&socket),
            }
        }
        Ok(callers)
    }

    fn greet(&mut self, socket: OwnedFd, deadline: Instant, poll: &mut dyn Poll) -> io::Result<()> {
        let number = self.next_number;
        self.next_number = Source::next_greeting(number);
        poll.add(socket.as_raw_fd(), Source::Greeting(number).token(), READ_EVENTS)
            .inspect_err(|_| discard_unread(&socket))?;
        self.greetings.push_back(Greeting { number, socket, deadline });
        if self.greetings.len() > self.limit
            && let Some(oldest) = self.greetings.pop_front()
        {
            refuse(&oldest, poll);
        }
        Ok(())
    }

    /// Reads the line of a greeting's client; gives it out if the line is complete. `ended` says that it will
    /// send no more.
    pub fn read_line(&mut self, number: u32, ended: bool, poll: &mut dyn Poll) -> Option<Caller> {
        let index = self.greetings.iter().position(|greeting| greeting.number == number)?;
        let line = self.greetings.get(index).map(|greeting| take_line(greeting.socket.as_fd()))?;
        if line == Line::Partial && !ended {
            return None;
        }
        let greeting = self.greetings.remove(index)?;
        match line {
            Line::Connect { port, .. } => Some(Caller { socket: greeting.socket, port, watched: true }),
            Line::Partial | Line::Malformed => {
                refuse(&greeting, poll);
                None
            }
        }
    }

    /// Drops who has been unfinished for too long. Returns the next such time.
    pub fn expire(&mut self, now: Instant, poll: &mut dyn Poll) -> Option<Instant> {
        while let Some(oldest) = self.greetings.front() {
            if oldest.deadline > now {
                return Some(oldest.deadline);
            }
            refuse(oldest, poll);
            self.greetings.pop_front();
        }
        None
    }
}

/// Before a greeting is dropped.
fn refuse(greeting: &Greeting, poll: &mut dyn Poll) {
    poll.remove(greeting.socket.as_raw_fd());
    discard_unread(&greeting.socket);
}

/// Takes a complete line out of the socket, and nothing else.
fn take_line(socket: BorrowedFd) -> Line {
    let mut bytes = [0; MAX_LINE];
    let seen = match rustix::net::recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, seen)) => bytes.get(..seen).unwrap_or_default(),
        Err(Errno::AGAIN | Errno::INTR) => return Line::Partial,
        Err(_) => return Line::Malformed,
    };
    if seen.is_empty() {
        return Line::Malformed;
    }
    let line = parse_line(seen);
    if let Line::Connect { len, .. } = line {
        let taken = rustix::net::recv(socket, bytes.get_mut(..len).unwrap_or_default(), RecvFlags::DONTWAIT);
        if !matches!(taken, Ok((_, taken)) if taken == len) {
            return Line::Malformed;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_names_a_port() {
        assert_eq!(parse_line(b"CONNECT 1024\n"), Line::Connect { port: 1024, len: 13 });
        assert_eq!(parse_line(b"CONNECT 4294967295\nmore"), Line::Connect { port: u32::MAX, len: 19 });
        assert_eq!(parse_line(b"CONNECT 7\nCONNECT 8\n"), Line::Connect { port: 7, len: 10 });
    }

    #[test]
    fn garbage_is_refused_as_soon_as_it_shows() {
        for bytes in [
            b"GET / HTTP/1.1\r\n".as_slice(),
            b"X",
            b"connect 1\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 00000000001\n",
            b"CONNECT 00000000001",
            b"\n",
        ] {
            assert_eq!(parse_line(bytes), Line::Malformed, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn every_port_is_understood_at_its_last_byte_and_not_before(port: u32, behind: Vec<u8>) {
            let line = format!("CONNECT {port}\n").into_bytes();
            for len in 0..line.len() {
                prop_assert_eq!(parse_line(&line[..len]), Line::Partial);
            }
            let whole = [line.clone(), behind].concat();
            prop_assert_eq!(parse_line(&whole), Line::Connect { port, len: line.len() });
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_never_wait_past_the_longest_line(bytes: Vec<u8>) {
            let line = parse_line(&bytes);
            prop_assert!(line != Line::Partial || bytes.len() < MAX_LINE);
        }
    }
}

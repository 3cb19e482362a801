//! One stream between a host socket and a guest socket, as a state machine without I/O.
//!
//! A stream is named by two ports and runs over packets in both directions. The side that opens it sends REQUEST; the other
//! side answers RESPONSE, or RST to refuse. Then both send data (RW) until each direction is over:
//!
//! ```text
//!   a host client connected                         the guest sent REQUEST
//!             │                                                │ owes RESPONSE
//!             ▼ owes REQUEST                                   ▼
//!       ┌────────────┐           RESPONSE came            ┌────────┐
//!       │ Requesting ├───────────────────────────────────►│  Open  │ data and SHUTDOWNs both ways
//!       └─┬────┬─────┘                                    └─┬────┬─┘
//!  RST    │    │ no answer in time,      SHUTDOWN of both,  │    │ RST
//!  came   │    │ anything but RESPONSE         a violation  │    │ came
//!         │    └───────────────►┌───────────┐◄──────────────┘    │
//!         │                     │ Resetting │ owes RST           │
//!         │                     └─────┬─────┘                    │
//!         │                  RST sent ▼ or came                  │
//!         └────────────────────►┌───────────┐◄───────────────────┘
//!                               │   Gone    │ the guest knows nothing of it any more
//!                               └─────┬─────┘
//!                                     ▼ what the guest had sent has reached the host socket
//!                                    over
//! ```
//!
//! *Half-close.* SHUTDOWN says that its sender will send no more, receive no more, or both; bits add up. The host's end
//! of file becomes SHUTDOWN(send), and the guest's SHUTDOWN(send) becomes shutdown(2) of the host socket, but only when
//! every byte before it was delivered. When the guest has shut both directions it waits for our RST as an acknowledgement;
//! when the host has, the guest owes the RST, and is not waited for without end.
//!
//! *Credit.* Each side tells in every packet how large its buffer is (`buf_alloc`) and how many bytes left it so far
//! (`fwd_cnt`, modulo 2^32). The other may have at most `buf_alloc - (sent - fwd_cnt)` further bytes on the way. So
//! a host program that reads slowly stops only its own stream, and the guest cannot make us keep more than `buf_alloc`.

use super::packet::{Header, Op, Shutdown, TYPE_STREAM};

/// What the owner of a connection has to do about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing: the connection has noted it.
    Noted,
    /// Tell the host client that the guest has accepted.
    Accepted,
    /// Deliver so many bytes of payload: each is either passed on ([`Connection::delivered`]) or kept until it can be.
    Data(u32),
}

/// How a guest broke the protocol. The stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A packet that has no meaning in this state.
    #[error("operation {0} does not fit the state of its stream")]
    State(u16),
    /// More data than the buffer that we announced can hold.
    #[error("{len} bytes exceed the announced credit of {credit}")]
    Credit {
        /// Bytes in the packet.
        len: u32,
        /// Bytes that the guest was allowed.
        credit: u32,
    },
    /// Data after SHUTDOWN(send).
    #[error("data after the end of its stream")]
    AfterEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requesting,
    Open,
    Resetting,
    Gone,
}

/// The protocol state of one stream. Counters of bytes are modulo 2^32, as in the packets.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    /// REQUEST (while Requesting) or RESPONSE (while Open) is still to be sent.
    owes_opening: bool,
    owes_credit_update: bool,
    owes_credit_request: bool,
    /// A CREDIT_REQUEST was made and the guest's buffer has not been half free since: do not ask for every crumb.
    asked_for_credit: bool,

    /// Size of the buffer that we announce, bytes.
    window: u32,
    /// Bytes that the guest has sent.
    received: u32,
    /// Of these, bytes that reached the host socket (or that nobody wants).
    forwarded: u32,
    /// `forwarded`, as last sent to the guest.
    reported: u32,

    /// Size of the guest's buffer, bytes.
    peer_window: u32,
    /// Bytes that we have sent.
    sent: u32,
    /// Of these, bytes that the guest's application has taken.
    peer_forwarded: u32,

    /// Directions that are over by the guest's word.
    guest_over: Shutdown,
    /// Directions that are over on the host's side.
    host_over: Shutdown,
    /// `host_over`, as last sent to the guest.
    reported_over: Shutdown,
}

impl Connection {
    /// A stream that a host client wants; owes REQUEST. `window` is the buffer that the guest may fill, bytes.
    pub fn from_host(window: u32) -> Self {
        Self {
            phase: Phase::Requesting,
            owes_opening: true,
            owes_credit_update: false,
            owes_credit_request: false,
            asked_for_credit: false,
            window,
            received: 0,
            forwarded: 0,
            reported: 0,
            peer_window: 0,
            sent: 0,
            peer_forwarded: 0,
            guest_over: Shutdown::default(),
            host_over: Shutdown::default(),
            reported_over: Shutdown::default(),
        }
    }

    /// A stream that the guest opened by `request` and that the host takes; owes RESPONSE.
    pub fn from_guest(window: u32, request: &Header) -> Self {
        let mut connection = Self::from_host(window);
        connection.phase = Phase::Open;
        connection.learn_credit(request);
        connection
    }

    /// Takes in a packet of this stream.
    ///
    /// # Errors
    /// What the guest did wrong; the connection owes RST then.
    pub fn receive(&mut self, header: &Header) -> Result<Received, Violation> {
        let op = Op::from_number(header.op);
        match (self.phase, op) {
            (Phase::Gone, _) => return Ok(Received::Noted),
            // An RST is never answered, not even by the one that we owe.
            (_, Some(Op::Reset)) => {
                self.end(Phase::Gone);
                return Ok(Received::Noted);
            }
            // It crosses our RST.
            (Phase::Resetting, _) => return Ok(Received::Noted),
            _ => self.learn_credit(header),
        }
        let violation = match (self.phase, op) {
            (Phase::Requesting, Some(Op::Response)) if !self.owes_opening => {
                self.phase = Phase::Open;
                return Ok(Received::Accepted);
            }
            (Phase::Open, Some(Op::Data)) => match self.receive_data(header.len) {
                Ok(received) => return Ok(received),
                Err(violation) => violation,
            },
            (Phase::Open, Some(Op::CreditUpdate)) => return Ok(Received::Noted),
            (Phase::Open, Some(Op::CreditRequest)) => {
                self.owes_credit_update = true;
                return Ok(Received::Noted);
            }
            (Phase::Open, Some(Op::Shutdown)) => {
                self.guest_over = self.guest_over.union(Shutdown::from_flags(header.flags));
                if self.guest_over.is_both() {
                    self.end(Phase::Resetting);
                }
                return Ok(Received::Noted);
            }
            _ => Violation::State(header.op),
        };
        self.end(Phase::Resetting);
        Err(violation)
    }

    fn receive_data(&mut self, len: u32) -> Result<Received, Violation> {
        if self.guest_over.send {
            return Err(Violation::AfterEnd);
        }
        // As last sent to the guest, which is never more than there is room for.
        let credit = self.window.saturating_sub(self.received.wrapping_sub(self.reported));
        if len > credit {
            return Err(Violation::Credit { len, credit });
        }
        self.received = self.received.wrapping_add(len);
        if self.host_over.receive {
            self.forwarded = self.received;
            return Ok(Received::Noted);
        }
        Ok(Received::Data(len))
    }

    /// Takes in the credit fields. A count that runs backwards, or past what was sent, is not believed: packets of one
    /// stream may be built by several of the guest's processors and then be queued in another order.
    fn learn_credit(&mut self, header: &Header) {
        self.peer_window = header.buf_alloc;
        if header.fwd_cnt.wrapping_sub(self.peer_forwarded) <= self.in_flight() {
            self.peer_forwarded = header.fwd_cnt;
        }
        if self.credit() >= self.peer_window.div_ceil(2).max(1) {
            self.asked_for_credit = false;
            self.owes_credit_request = false;
        }
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }

    fn credit(&self) -> u32 {
        self.peer_window.saturating_sub(self.in_flight())
    }

    fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.guest_over = Shutdown { receive: true, send: true };
    }

    /// Bytes from the guest that were not delivered yet; never more than the window.
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// So many bytes of payload reached the host socket.
    pub fn delivered(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.buffered()));
        // Half of the window at a time: often enough that a guest which sends steadily never stops, rarely enough
        // that most packets carry the news for free.
        let news = self.forwarded.wrapping_sub(self.reported);
        self.owes_credit_update |= !self.guest_over.send && news >= self.window.div_ceil(2).max(1);
    }

    /// Whether bytes from the host, or their end, are still to be sent to the guest.
    pub fn wants_host_data(&self) -> bool {
        self.phase == Phase::Open && !self.guest_over.receive && !self.host_over.send
    }

    /// How many bytes from the host may be sent to the guest now.
    pub fn sendable(&self) -> u32 {
        if self.wants_host_data() { self.credit() } else { 0 }
    }

    /// The header for `len` bytes of data, at most [`Self::sendable`], which are thereby sent.
    pub fn data_packet(&mut self, len: u32) -> Header {
        self.sent = self.sent.wrapping_add(len);
        if self.credit() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owes_credit_request = true;
        }
        Header { len, ..self.packet(Op::Data) }
    }

    /// The host will send no more: its end of file was read.
    pub fn host_finished(&mut self) {
        self.host_over.send = true;
    }

    /// The host will receive no more: what is buffered and what may still come is dropped.
    pub fn host_read_closed(&mut self) {
        self.host_over.receive = true;
        self.forwarded = self.received;
    }

    /// The time for the guest's answer is over: to REQUEST, or to the SHUTDOWN of both directions. Without meaning when
    /// neither is awaited.
    pub fn expire(&mut self) {
        if self.phase == Phase::Requesting {
            // A guest that never saw the REQUEST needs no RST.
            self.end(if self.owes_opening { Phase::Gone } else { Phase::Resetting });
        } else if self.awaits_reset() {
            self.end(Phase::Resetting);
        }
    }

    /// Whether SHUTDOWN of both directions was sent to the guest and it has not answered with RST yet. Linux does so only when its
    /// program has read everything or closed its socket.
    pub fn awaits_reset(&self) -> bool {
        self.phase == Phase::Open && self.reported_over.is_both()
    }

    /// Whether the guest's answer is awaited.
    pub fn is_requesting(&self) -> bool {
        self.phase == Phase::Requesting
    }

    /// Whether the guest has forgotten the stream, so that its ports may name another.
    pub fn is_gone(&self) -> bool {
        self.phase == Phase::Gone
    }

    /// Whether nothing more can go to the host socket. It must see the end of the stream then.
    pub fn guest_to_host_over(&self) -> bool {
        self.host_over.receive || (self.guest_over.send && self.buffered() == 0)
    }

    /// Whether nothing more is wanted from the host socket.
    pub fn host_to_guest_over(&self) -> bool {
        self.host_over.send || self.guest_over.receive
    }

    /// Whether nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.is_gone() && self.guest_to_host_over()
    }

    /// Whether [`Self::next_control`] has a packet.
    pub fn owes_control(&self) -> bool {
        self.owed().is_some()
    }

    fn owed(&self) -> Option<Op> {
        let news = self.host_over.union(self.reported_over) != self.reported_over;
        match self.phase {
            Phase::Gone => None,
            Phase::Resetting => Some(Op::Reset),
            Phase::Requesting => self.owes_opening.then_some(Op::Request),
            Phase::Open if self.owes_opening => Some(Op::Response),
            Phase::Open if news => Some(Op::Shutdown),
            Phase::Open if self.owes_credit_update => Some(Op::CreditUpdate),
            Phase::Open if self.owes_credit_request => Some(Op::CreditRequest),
            Phase::Open => None,
        }
    }

    /// The next packet without payload that is due; it counts as sent.
    pub fn next_control(&mut self) -> Option<Header> {
        let op = self.owed()?;
        let mut header = self.packet(op);
        match op {
            Op::Reset => self.end(Phase::Gone),
            Op::Request | Op::Response => self.owes_opening = false,
            Op::Shutdown => {
                self.reported_over = self.host_over;
                header.flags = self.reported_over.to_flags();
            }
            Op::CreditRequest => self.owes_credit_request = false,
            // The packet itself carries the credit.
            Op::CreditUpdate | Op::Data => {}
        }
        Some(header)
    }

    /// A packet of this stream with the news about our buffer; the addresses are the caller's.
    fn packet(&mut self, op: Op) -> Header {
        self.reported = self.forwarded;
        self.owes_credit_update = false;
        Header {
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

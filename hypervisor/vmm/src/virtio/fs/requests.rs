//! The way of a request from the driver to the file server.
//!
//! ```text
//!               ┌─ answered here: malformed, INTERRUPT, or the server is gone
//!  pop ─ check ─┼─ sent: in the table of requests in flight until its reply comes
//!               ├─ large, while enough large ones are in flight ─┬─► waiting, in order
//!               ├─ the host has no memory for the packet ────────┘
//!               └─ the socket is full: back into the ring
//! ```
//!
//! The socket is one queue for all programs of the guest. So that a program that writes much does not put its data before
//! every lookup of the others, only [`FsDevice::large_limit`] bytes of large requests are in flight at a time; small
//! requests pass those that wait. FUSE gives requests no order, a driver that needs one waits for the reply.

use std::os::fd::AsFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use slog::warn;

use super::{
    Alarm, FsDevice, Link, QUEUE_SIZES, TURN, answer,
    slots::{InFlight, Slots},
    wire::{Kind, REQUEST_HEADER, Reply, Request},
};
use crate::virtio::{Chain, Context, DeviceError, Served};

/// A request and the room for its reply together, bytes: above this it is a large one.
pub(super) const SMALL: usize = 8 << 10;

/// The most bytes of large requests and of room for their replies in flight. Some ten of the greatest size keep the server
/// busy; a lookup behind them waits for well under a millisecond of copying.
const LARGE_IN_FLIGHT: usize = 1 << 20;

/// A request that was taken from its queue and is not sent yet: its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The queue that it came by.
    pub queue: u16,
    /// Its chain.
    pub head: u16,
}

/// What trying to send a request came to.
enum Outcome {
    /// The server has it and will answer.
    Sent,
    /// It is complete with this reply; with nothing if the chain has no room for one.
    Answered(Reply),
    /// It is complete without a reply.
    Forgotten,
    /// The socket is full.
    Full,
    /// It has to wait for others or for memory.
    Wait,
}

/// What became of a chain.
enum Forwarded {
    /// Sent or completed.
    Done,
    /// Still the caller's: the socket is full.
    Full,
    /// Still the caller's: to be tried again when a reply or the alarm comes.
    Wait,
}

impl FsDevice {
    /// Forwards what the driver made available in all queues.
    pub(super) fn forward_queues(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        (0..QUEUE_SIZES.len()).try_for_each(|queue| self.forward_queue(context, queue))
    }

    /// Forwards what the driver made available in one queue, until it is empty, the socket full or a batch done.
    pub(super) fn forward_queue(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        if let Some(ring) = context.queues.get_mut(queue) {
            ring.disable_notification(context.memory)?;
        }
        crate::virtio::serve(context, queue, TURN, |context, chain| {
            // The driver need not notify while the socket is full: both queues are looked at again when there is room.
            if self.link == Link::Full {
                return Ok(Served::Refused);
            }
            // A large request goes behind those that wait already.
            if large_bytes(chain) > 0 && !self.state.waiting.is_empty() {
                self.wait(context, queue, chain)?;
                return Ok(Served::Taken);
            }
            match self.forward(context, queue, chain)? {
                Forwarded::Done => Ok(Served::Taken),
                Forwarded::Wait => self.wait(context, queue, chain).map(|()| Served::Taken),
                Forwarded::Full => Ok(Served::Refused),
            }
        })?;
        Ok(())
    }

    /// Sends what waits, as far as it goes: after replies, when there is room in the socket, and when the alarm fires.
    pub(super) fn send_waiting(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        while self.link == Link::Open && self.alarm != Alarm::Retry {
            let Some(waiting) = self.state.waiting.pop_front() else { break };
            let queue = usize::from(waiting.queue);
            let Some(ring) = context.queues.get(queue) else { continue };
            let chain = ring.chain(context.memory, waiting.head)?;
            if !matches!(self.forward(context, queue, &chain)?, Forwarded::Done) {
                self.state.waiting.push_front(waiting);
                break;
            }
        }
        Ok(())
    }

    /// Answers what waits, now that there is no server. Each is answered, whatever is wrong with another.
    pub(super) fn fail_waiting(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for waiting in std::mem::take(&mut self.state.waiting) {
            let queue = usize::from(waiting.queue);
            let Some(ring) = context.queues.get(queue) else { continue };
            let failed = match ring.chain(context.memory, waiting.head) {
                Ok(chain) => self.forward(context, queue, &chain).map(drop),
                Err(error) => Err(error.into()),
            };
            result = result.and(failed);
        }
        result
    }

    /// Enters a chain into the queue of those that wait; a small one, for which there was no memory, comes first.
    fn wait(&mut self, context: &mut Context, queue: usize, chain: &Chain) -> Result<(), DeviceError> {
        // More than both queues have descriptors: the driver made one chain available twice.
        if self.state.waiting.len() >= Slots::MAX {
            *context.guest_faults += 1;
            let unique = chain.readable.read_obj(8).unwrap_or(0);
            return answer(context, queue, chain, Reply::error(unique, libc::EIO));
        }
        let waiting = Waiting { queue: queue as u16, head: chain.head };
        if large_bytes(chain) > 0 {
            self.state.waiting.push_back(waiting);
        } else {
            self.state.waiting.push_front(waiting);
        }
        Ok(())
    }

    fn forward(&mut self, context: &mut Context, queue: usize, chain: &Chain) -> Result<Forwarded, DeviceError> {
        match self.try_send(context, queue, chain)? {
            Outcome::Sent => {}
            Outcome::Answered(reply) => answer(context, queue, chain, reply)?,
            Outcome::Forgotten => context.complete(queue, chain.head, 0)?,
            Outcome::Wait => return Ok(Forwarded::Wait),
            Outcome::Full => {
                self.link = Link::Full;
                self.watch(context.poll)?;
                return Ok(Forwarded::Full);
            }
        }
        Ok(Forwarded::Done)
    }

    fn try_send(&mut self, context: &mut Context, queue: usize, chain: &Chain) -> Result<Outcome, DeviceError> {
        let mut header = [0; REQUEST_HEADER];
        if chain.readable.read(0, &mut header).is_err() {
            *context.guest_faults += 1;
            return Ok(Outcome::Forgotten);
        }
        let request = Request::new(header);
        let refuse = |errno| Ok(Outcome::Answered(Reply::error(request.unique(), errno)));
        let Ok(kind) = request.check(chain.readable.len(), chain.writable.len()) else {
            *context.guest_faults += 1;
            return refuse(libc::EINVAL);
        };
        if self.link == Link::Closed {
            return refuse(libc::ENOTCONN);
        }
        let large = large_bytes(chain);
        let number = match kind {
            // It names a request by the driver's number, which the server never sees, and no request is interruptible there.
            Kind::Interrupt => return refuse(libc::ENOSYS),
            // Not answered, so not entered.
            Kind::Forget => None,
            Kind::Init | Kind::Other => {
                let in_flight = self.state.slots.large();
                if large > 0 && in_flight > 0 && in_flight.saturating_add(large) > self.large_limit() {
                    return Ok(Outcome::Wait);
                }
                let (unique, opcode) = (request.unique(), request.opcode());
                match self.state.slots.insert(InFlight { queue: queue as u16, head: chain.head, unique, opcode, large })
                {
                    Some(number) => Some(number),
                    None => {
                        *context.guest_faults += 1;
                        return refuse(libc::EIO);
                    }
                }
            }
        };
        let sent = self.send(chain, &request.renumbered(number.unwrap_or(0)));
        if let (Err(_), Some(number)) = (sent, number) {
            self.state.slots.take(number);
        }
        match sent {
            Ok(()) if number.is_none() => Ok(Outcome::Forgotten),
            Ok(()) => {
                self.expect_progress()?;
                Ok(Outcome::Sent)
            }
            Err(Errno::AGAIN) => Ok(Outcome::Full),
            // The socket stays writable, so only time can tell when there is memory again. An error would be worse than the wait:
            // the guest's write-back drops the data, and a FORGET that is not sent pins a file in the server for ever.
            Err(Errno::NOBUFS | Errno::NOMEM) => {
                self.memory_failures += 1;
                if self.memory_failures.is_power_of_two() {
                    warn!(self.log, "the host has no memory for a request to the file server, trying again";
                        "bytes" => chain.readable.len(), "so_far" => self.memory_failures);
                }
                self.arm(Alarm::Retry)?;
                Ok(Outcome::Wait)
            }
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                self.receive_rest(context)?;
                refuse(libc::ENOTCONN)
            }
            // Longer than the send buffer, or in more pieces than Linux takes: the driver kept to no limit.
            Err(errno) => {
                *context.guest_faults += 1;
                refuse(errno.raw_os_error())
            }
        }
    }

    /// With a small send buffer, several large requests still have to fit: Linux reports room below a quarter of it.
    fn large_limit(&self) -> usize {
        LARGE_IN_FLIGHT.min(self.send_buffer / 4)
    }

    fn send(&mut self, chain: &Chain, header: &[u8; REQUEST_HEADER]) -> Result<(), Errno> {
        #[cfg(test)]
        if let Some(errno) = self.send_failures.pop_front() {
            return Err(errno);
        }
        loop {
            let sent = chain.readable.send_packet(self.socket.as_fd(), header);
            match sent.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL)) {
                Err(Errno::INTR) => {}
                done => return done,
            }
        }
    }
}

/// What a request counts against the limit of large ones, bytes; 0 for a small one.
fn large_bytes(chain: &Chain) -> usize {
    let bytes = chain.readable.len().saturating_add(chain.writable.len());
    if bytes > SMALL { bytes } else { 0 }
}

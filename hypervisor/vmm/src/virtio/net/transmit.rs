//! From the guest to the tap: each chain is a header and a frame, and is completed at once, whether the frame was sent or
//! dropped.
//!
//! What is looked at is copied first and sent from the copy: a guest that changes a frame while it is checked changes nothing.

use std::{os::fd::BorrowedFd, time::Duration};

use super::{
    super::{Chain, Context, DeviceError, Served, Turn, serve},
    Net,
    header::{Cost, ETHERNET, HEADER, Header},
    sources::LOOKED_AT,
};

/// What is sent before others on the device thread have their turn.
const TURN: Turn = Turn { chains: 64, bytes: 512 << 10 };
/// Bytes of a packet that are copied before they are sent: a small one whole.
const COPIED: usize = HEADER + LOOKED_AT;

/// Why a frame was not sent.
enum Drop {
    /// The guest must not send it.
    Refused,
    /// It claims another's address.
    Spoofed,
    /// The host did not take it, as any network may.
    Lost,
}

impl Net {
    /// Sends what the driver has put into the transmit queue of a pair.
    ///
    /// # Errors
    /// The device then needs a reset.
    pub(super) fn transmit(&mut self, context: &mut Context, pair: usize) -> Result<(), DeviceError> {
        if self.send_timer.is_running() {
            return Ok(());
        }
        let queue = transmit_queue(pair);
        if let Some(ring) = context.queues.get_mut(queue) {
            ring.disable_notification(context.memory)?;
        }
        let mut wait = None;
        serve(context, queue, TURN, |context, chain| {
            let now = self.now(self.state.send.is_unlimited());
            if let Err(time) = self.state.send.ready(now) {
                wait = Some(time);
                return Ok(Served::Refused);
            }
            self.send(context, pair, chain);
            Ok(Served::Written(0))
        })?;
        match wait {
            Some(time) => self.send_timer.start(time),
            None => Ok(()),
        }
    }

    /// The limit lets packets pass again.
    ///
    /// # Errors
    /// The device then needs a reset.
    pub(super) fn transmit_again(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.send_timer.stop();
        (0..self.pairs.len()).try_for_each(|pair| self.transmit(context, pair))
    }

    fn send(&mut self, context: &mut Context, pair: usize, chain: &Chain) {
        if !chain.writable.is_empty() {
            *context.guest_faults += 1;
        }
        match self.try_send(context.features, pair, chain) {
            Ok((frame, cost)) => {
                self.state.send.take(cost.bytes, cost.packets);
                self.stats.sent_packets += cost.packets;
                self.stats.sent_bytes += frame as u64;
            }
            Err(reason) => {
                self.stats.send_dropped += 1;
                match reason {
                    Drop::Refused => *context.guest_faults += 1,
                    Drop::Spoofed => self.stats.spoofed += 1,
                    Drop::Lost => {}
                }
            }
        }
    }

    /// Gives the frame's length and what it costs.
    fn try_send(&self, features: u64, pair: usize, chain: &Chain) -> Result<(usize, Cost), Drop> {
        let frame = chain.readable.len().checked_sub(HEADER).ok_or(Drop::Refused)?;
        let mut copy = [0; COPIED];
        let copy = copy.get_mut(..chain.readable.len().min(COPIED)).ok_or(Drop::Refused)?;
        chain.readable.read(0, copy).map_err(|_| Drop::Refused)?;
        let (header, start) = copy.split_first_chunk_mut().ok_or(Drop::Refused)?;
        let (checked, cost) = Header::parse(header).for_tap(frame, features).map_err(|_| Drop::Refused)?;
        *header = checked.bytes();
        if let Some(sources) = &self.sources {
            sources.check(start).map_err(|_| Drop::Spoofed)?;
        }
        let fd = self.attached(pair).ok_or(Drop::Refused)?;
        chain.readable.write_packet(fd, copy).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput => Drop::Refused,
            _ => Drop::Lost,
        })?;
        Ok((frame, cost))
    }

    /// The descriptor of a pair that the driver uses.
    fn attached(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.pairs.get(pair).filter(|pair| pair.attached).map(|pair| pair.backend.fd())
    }

    /// The time for a limiter, which need not know it if there is no limit.
    pub(super) fn now(&self, unlimited: bool) -> Duration {
        if unlimited { Duration::ZERO } else { self.started.elapsed() }
    }
}

/// The index of a pair's transmit queue (5.1.2).
pub fn transmit_queue(pair: usize) -> usize {
    pair * 2 + 1
}

const _: () = assert!(LOOKED_AT > ETHERNET);

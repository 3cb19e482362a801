//! The way of a reply from the file server to the driver.
//!
//! Whose reply comes next is known only with one request in flight, so there are three ways, the cheapest that fits is taken:
//!
//! - *One request:* the packet is received straight into its chain, and the number is checked afterwards. The body of a packet
//!   under a wrong number is in the chain of a request that still waits then. That is harmless: the server may write any
//!   reply there, and the driver reads none of it before the request is complete.
//! - *Only small requests:* no reply is longer than [`SMALL`](super::requests::SMALL), so the packet is received here and copied: a few hundred
//!   bytes mostly, which costs less than a second call.
//! - *Else* a look at the header comes first.

use std::os::fd::AsFd;

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use slog::warn;

use super::{
    BATCH, BATCH_BYTES, FsDevice, answer,
    slots::InFlight,
    wire::{self, REPLY_HEADER, Reply},
};
use crate::virtio::{Chain, Context, DeviceError};

impl FsDevice {
    /// Delivers what the server sent, a batch at most: the socket stays ready while there is more.
    pub(super) fn receive(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let mut bytes = 0;
        for _ in 0..BATCH {
            let Some(len) = self.receive_one(context)? else { break };
            bytes += len;
            // With nothing in flight the next look would most likely find nothing.
            if bytes >= BATCH_BYTES || len > 0 && self.state.slots.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// The server closed its end: delivers what it sent before, then fails the rest.
    pub(super) fn receive_rest(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        while self.receive_one(context)?.is_some() {}
        self.close(context)
    }

    /// Delivers the next packet and returns its length (0 if there may be one at the next try); `None` if there is none now.
    fn receive_one(&mut self, context: &mut Context) -> Result<Option<usize>, DeviceError> {
        let only = match self.state.slots.only() {
            Some(request) => self.chain_of(context, request)?,
            None => None,
        };
        let small = self.state.slots.large() == 0;
        let mut header = [0; REPLY_HEADER];
        let received = match &only {
            Some(chain) => chain
                .writable
                .receive_packet(self.socket.as_fd(), &mut header)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            None => {
                let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
                if small {
                    recv(&self.socket, self.small_reply.as_mut_slice(), flags).map(|(_, len)| {
                        header = self.small_reply.first_chunk().copied().unwrap_or_default();
                        len
                    })
                } else {
                    recv(&self.socket, &mut header, flags | RecvFlags::PEEK).map(|(_, len)| len)
                }
            }
        };
        let len = match received {
            Err(Errno::AGAIN) => return Ok(None),
            // The server closed its end with requests unread. The error is reported once; replies may still lie behind it.
            Err(Errno::INTR | Errno::CONNRESET) => return Ok(Some(0)),
            // An empty packet and the end look alike; no server sends the former.
            Err(_) | Ok(0) => {
                self.close(context)?;
                return Ok(None);
            }
            Ok(len) => len,
        };
        let request = if len < REPLY_HEADER { None } else { self.state.slots.take(Reply::parse(&header).unique) };
        match (request, &only) {
            (Some(request), Some(chain)) => self.finish(context, request, chain, Reply::parse(&header), len)?,
            (Some(request), None) if small => self.copy(context, request, len)?,
            (Some(request), None) => self.deliver(context, request)?,
            (None, received) => {
                if received.is_none() && !small {
                    self.discard_packet();
                }
                self.count_strange(len, &header);
            }
        }
        Ok(Some(len))
    }

    /// Copies a small reply of `len` bytes into the chain of its request. One that is longer than what it was received into
    /// breaks the protocol, which [`Self::finish`] sees.
    fn copy(&self, context: &mut Context, request: InFlight, len: usize) -> Result<(), DeviceError> {
        let Some(ring) = context.queues.get(usize::from(request.queue)) else { return Ok(()) };
        let chain = ring.chain(context.memory, request.head)?;
        let room = chain.writable.len();
        if room < REPLY_HEADER {
            // The driver changed its descriptors meanwhile.
            *context.guest_faults += 1;
        }
        if let Some(body) = self.small_reply.get(REPLY_HEADER..len.min(room)) {
            chain.writable.write(REPLY_HEADER, body)?;
        }
        let header = self.small_reply.first_chunk().copied().unwrap_or_default();
        self.finish(context, request, &chain, Reply::parse(&header), len)
    }

    /// The chain of a request, if a reply can be received into it.
    fn chain_of<'m>(&self, context: &Context<'m>, request: InFlight) -> Result<Option<Chain<'m>>, DeviceError> {
        let Some(ring) = context.queues.get(usize::from(request.queue)) else { return Ok(None) };
        let chain = ring.chain(context.memory, request.head)?;
        // The driver may have changed its descriptors meanwhile.
        Ok((chain.writable.len() >= REPLY_HEADER).then_some(chain))
    }

    /// Receives the packet that comes next into the chain of its request.
    fn deliver(&mut self, context: &mut Context, request: InFlight) -> Result<(), DeviceError> {
        let queue = usize::from(request.queue);
        let Some(ring) = context.queues.get(queue) else { return Ok(()) };
        let chain = ring.chain(context.memory, request.head)?;
        let mut header = [0; REPLY_HEADER];
        match chain.writable.receive_packet(self.socket.as_fd(), &mut header) {
            Ok(len) => self.finish(context, request, &chain, Reply::parse(&header), len),
            Err(error) => {
                // The driver changed its descriptors meanwhile and left no room for a header.
                if error.kind() == std::io::ErrorKind::InvalidInput {
                    *context.guest_faults += 1;
                    self.discard_packet();
                }
                answer(context, queue, &chain, Reply::error(request.unique, libc::EIO))
            }
        }
    }

    /// Completes a request whose reply of `len` bytes was received into its chain.
    fn finish(
        &self,
        context: &mut Context,
        request: InFlight,
        chain: &Chain,
        reply: Reply,
        len: usize,
    ) -> Result<(), DeviceError> {
        let reply = reply.settle(len, chain.writable.len(), request.unique);
        if request.opcode == wire::OPCODE_INIT && reply.error == 0 {
            self.lower_limits(chain, reply.len);
        }
        answer(context, usize::from(request.queue), chain, reply)
    }

    /// Lowers the size of requests in INIT's answer to what our end of the socket sends well.
    fn lower_limits(&self, chain: &Chain, len: usize) {
        let (bytes, pages) = wire::init::limits(self.send_buffer);
        let room = &chain.writable;
        if len >= wire::init::MAX_WRITE + size_of_val(&bytes)
            && room.read_obj::<u32>(wire::init::MAX_WRITE).is_ok_and(|offered| offered > bytes)
        {
            let _ = room.write(wire::init::MAX_WRITE, &bytes.to_le_bytes());
        }
        if len >= wire::init::MAX_PAGES + size_of_val(&pages)
            && room.read_obj::<u16>(wire::init::MAX_PAGES).is_ok_and(|offered| offered > pages)
        {
            let _ = room.write(wire::init::MAX_PAGES, &pages.to_le_bytes());
        }
    }

    /// A packet was dropped whose number belongs to no request.
    fn count_strange(&mut self, len: usize, header: &[u8; REPLY_HEADER]) {
        self.strange_packets += 1;
        if self.strange_packets.is_power_of_two() {
            warn!(self.log, "the file server sent a reply to no request"; "bytes" => len,
                "number" => Reply::parse(header).unique, "so_far" => self.strange_packets);
        }
    }

    fn discard_packet(&self) {
        let _ = recv(&self.socket, &mut [0; 1], RecvFlags::DONTWAIT);
    }
}

//! The device's side towards the guest: packets out of the transmit queue, packets into the receive queue.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Instant,
};

use caisson_protos::monitor::{GuestStream, encode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{
    super::{Buffers, Chain, Context, DeviceError, Poll, Served, Turn, TurnEnd, serve},
    EVENT, MAX_BYTES, MAX_CHAINS, QUIET_CHAINS, RX, Restored, Source, TX, Vsock,
    connection::Received,
    host::{HostEnd, Incoming, ReadClosed},
    packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM},
    streams::{Ports, StreamId},
};

/// The most payload in a packet to the guest, bytes (what Linux takes at most, VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const MAX_PAYLOAD: usize = 64 * 1024;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

impl Vsock {
    /// Takes what the guest has sent, and sends what there is for it.
    pub(super) fn take_packets(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.restored.is_some() {
            return Ok(());
        }
        let turn = Turn { chains: MAX_CHAINS, bytes: MAX_BYTES };
        let end = serve(context, TX, turn, |context, chain| {
            if !self.streams.has_room_for_refusal() {
                self.send_packets(context)?;
                if !self.streams.has_room_for_refusal() {
                    // The driver neglects its receive queue: its packets wait until it posts buffers there.
                    return Ok(Served::Refused);
                }
            }
            self.take_packet(&chain.readable, context);
            self.complete_transmitted(context, chain.head)?;
            Ok(Served::Taken)
        })?;
        if end == TurnEnd::Refused { Ok(()) } else { self.send_packets(context) }
    }

    /// Returns a transmitted chain. An interrupt for it alone would stop the guest, often wake it, and cost it two
    /// exits, only to let it free a buffer; mostly there is soon one for a packet to it. All queues share one interrupt.
    fn complete_transmitted(&mut self, context: &mut Context, head: u16) -> Result<(), DeviceError> {
        let Some(queue) = context.queues.get_mut(TX) else { return Ok(()) };
        queue.complete_quietly(context.memory, head, 0)?;
        self.quiet_chains += 1;
        match self.quiet_chains {
            1 => self.signal_by = Some(Instant::now() + self.limits.quiet),
            QUIET_CHAINS.. => self.signal_transmitted(context),
            _ => {}
        }
        Ok(())
    }

    /// Reports all transmitted chains to the driver.
    pub(super) fn signal_transmitted(&mut self, context: &mut Context) {
        self.signal_by = None;
        if std::mem::take(&mut self.quiet_chains) > 0
            && let Some(queue) = context.queues.get_mut(TX)
        {
            queue.signal_completed();
        }
    }

    fn take_packet(&mut self, chain: &Buffers, context: &mut Context) {
        let mut bytes = [0; HEADER_LEN];
        let complete = chain.read(0, &mut bytes).is_ok();
        let header = Header::from_bytes(&bytes);
        // A malformed packet or one with a false sender cannot be answered.
        if !complete
            || header.src_cid != self.state.guest_cid
            || header.len as usize > chain.len().saturating_sub(HEADER_LEN)
        {
            *context.guest_faults += 1;
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        match self.streams.find(ports).filter(|_| known) {
            Some(id) => self.take_packet_of(id, &header, chain, context),
            None if known && header.op == Op::Request as u16 => self.open_from_guest(ports, &header, context.poll),
            None if header.op == Op::Reset as u16 => {}
            None => self.streams.refuse(&header),
        }
    }

    fn take_packet_of(&mut self, id: StreamId, header: &Header, chain: &Buffers, context: &mut Context) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        match stream.connection.receive(header) {
            Ok(Received::Noted) => {}
            Ok(Received::Accepted) => {
                let line = format!("OK {}\n", stream.ports.host);
                if stream.host.accept(line.as_bytes()) == Err(ReadClosed) {
                    stream.connection.host_read_closed();
                }
            }
            Ok(Received::Data(len)) => match stream.host.deliver(chain, HEADER_LEN, len as usize, context.poll) {
                Ok(taken) => stream.connection.delivered(u32::try_from(taken).unwrap_or(u32::MAX)),
                Err(ReadClosed) => stream.connection.host_read_closed(),
            },
            Err(violation) => {
                *context.guest_faults += 1;
                slog::debug!(self.log, "vsock stream reset"; "reason" => %violation, "host_port" => header.dst_port,
                    "guest_port" => header.src_port);
            }
        }
        self.settle(id, context.poll);
    }

    /// Opens the stream that the guest requests, or refuses it.
    fn open_from_guest(&mut self, ports: Ports, request: &Header, poll: &mut dyn Poll) {
        match self.try_open_from_guest(ports, request, poll) {
            Ok(id) => self.settle(id, poll),
            Err(error) => {
                // The guest can bring this about as often as it likes, so it is no warning.
                slog::debug!(self.log, "vsock stream of the guest refused"; "host_port" => ports.host, "error" => %error);
                self.streams.refuse(request);
            }
        }
    }

    fn try_open_from_guest(&mut self, ports: Ports, request: &Header, poll: &mut dyn Poll) -> io::Result<StreamId> {
        if self.streams.is_full_for_guest() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let host = HostEnd::new(self.announce(ports)?, false, None);
        let id = self
            .streams
            .open_from_guest(ports, request, host)
            .map_err(|_| io::Error::from(io::ErrorKind::AddrInUse))?;
        if let Some(stream) = self.streams.get_mut(id)
            && let Err(error) = stream.host.watch(Source::Stream(id).token(), poll)
        {
            self.streams.remove(id);
            return Err(error);
        }
        Ok(id)
    }

    /// Sends the far end of a new socket pair to the parent and returns the near one.
    fn announce(&self, ports: Ports) -> io::Result<OwnedFd> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        let packet =
            encode(&GuestStream { host_port: ports.host, guest_port: ports.guest }).map_err(io::Error::other)?;
        let descriptors = [far.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.guest_streams, &[IoSlice::new(&packet)], &mut control, flags)?;
        Ok(near.into())
    }

    /// Fills the guest's receive buffers with what streams have for it, in turns, until one of the two runs out.
    pub(super) fn send_packets(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.restored.is_some() {
            return Ok(());
        }
        let (mut chains, mut bytes, mut completed) = (0, 0, false);
        while self.streams.has_turns() {
            if chains == MAX_CHAINS || bytes >= MAX_BYTES {
                if let Some(queue) = context.queues.get_mut(RX) {
                    queue.call_again();
                }
                break;
            }
            chains += 1;
            let Some(chain) = context.pop(RX)? else {
                self.awaits_buffers = true;
                if await_driver(context, RX)? {
                    continue;
                }
                break;
            };
            if std::mem::take(&mut self.awaits_buffers)
                && let Some(queue) = context.queues.get_mut(RX)
            {
                queue.disable_notification(context.memory)?;
            }
            let written = if chain.writable.len() > HEADER_LEN {
                self.fill(&chain, context.poll)?
            } else {
                *context.guest_faults += 1;
                Some(0)
            };
            match written {
                Some(written) => {
                    (bytes, completed) = (bytes + written, true);
                    context.complete(RX, chain.head, written)?;
                }
                // Nobody had anything after all.
                None => {
                    if let Some(queue) = context.queues.get_mut(RX) {
                        queue.unpop();
                    }
                }
            }
        }
        if completed {
            self.signal_transmitted(context);
        }
        Ok(())
    }

    /// Writes the next packet into a chain with room for a header and more; returns its length.
    fn fill(&mut self, chain: &Chain, poll: &mut dyn Poll) -> Result<Option<usize>, DeviceError> {
        if let Some(refusal) = self.streams.next_refusal() {
            chain.writable.write(0, &refusal.to_bytes())?;
            return Ok(Some(HEADER_LEN));
        }
        while let Some(id) = self.streams.next_turn() {
            let Some(stream) = self.streams.get_mut(id) else { continue };
            let mut header = stream.connection.next_control();
            let room = (chain.writable.len() - HEADER_LEN).min(stream.connection.sendable() as usize).min(MAX_PAYLOAD);
            if header.is_none() && stream.host.is_readable() && stream.connection.wants_host_data() {
                let incoming = match room {
                    // No credit. The end needs none.
                    0 if stream.host.may_be_at_end() => stream.host.look_for_end(),
                    0 => Incoming::Nothing,
                    _ => stream.host.receive(&chain.writable, HEADER_LEN, room),
                };
                match incoming {
                    // At most `room`, which fits.
                    Incoming::Bytes(n) => header = Some(stream.connection.data_packet(n as u32)),
                    Incoming::Nothing => {}
                    Incoming::End => {
                        stream.connection.host_finished();
                        if stream.host.is_closed() {
                            stream.connection.host_read_closed();
                        }
                        header = stream.connection.next_control();
                    }
                }
            }
            let ports = stream.ports;
            self.settle(id, poll);
            if let Some(header) = header {
                let header = Header {
                    src_cid: HOST_CID,
                    dst_cid: self.state.guest_cid,
                    src_port: ports.host,
                    dst_port: ports.guest,
                    ..header
                };
                chain.writable.write(0, &header.to_bytes())?;
                return Ok(Some(HEADER_LEN + header.len as usize));
            }
        }
        Ok(None)
    }

    /// Sends the guest after a restore the event that its streams are gone. Linux does so to every stream that it has when it comes to
    /// handle the event, so none may be opened before: nothing is taken and nothing sent until it has posted the event's
    /// buffer again.
    pub(super) fn announce_reset(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        while self.state.owes_transport_reset {
            let Some(queue) = context.queues.get_mut(EVENT) else { break };
            let posted = queue.await_advance(context.memory)?;
            let Some(chain) = context.pop(EVENT)? else {
                if await_driver(context, EVENT)? {
                    continue;
                }
                break;
            };
            let event = TRANSPORT_RESET.to_le_bytes();
            let written = if chain.writable.write(0, &event).is_ok() {
                self.state.owes_transport_reset = false;
                self.restored = self.restored.take().map(|restored| Restored { posted: Some(posted), ..restored });
                event.len()
            } else {
                *context.guest_faults += 1;
                0
            };
            context.complete(EVENT, chain.head, written)?;
        }
        let Some(Restored { posted: Some(posted), .. }) = self.restored else { return Ok(()) };
        let Some(queue) = context.queues.get_mut(EVENT) else { return Ok(()) };
        if queue.await_advance(context.memory)? != posted { self.go_on(context) } else { Ok(()) }
    }

    /// The guest has reset its streams, or has had time enough for it: new ones may come.
    pub(super) fn go_on(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.restored = None;
        self.take_packets(context)
    }
}

/// Asks the driver to notify when it adds a chain to an empty queue; true if it just did, so that the queue is not empty.
fn await_driver(context: &mut Context, queue: usize) -> Result<bool, DeviceError> {
    match context.queues.get_mut(queue) {
        Some(queue) => Ok(queue.enable_notification(context.memory)?),
        None => Ok(false),
    }
}

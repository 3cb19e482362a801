//! From the tap to the guest. A packet is read straight into the driver's buffers. How large it is shows only then, so
//! as many buffers are taken as the packet before it needed, and what goes beyond them is read into a buffer of the device and
//! copied.
//!
//! ```text
//!   tap ─ readv ─► [ header, first bytes ][ driver's buffers, taken from the queue ][ rest ]
//!                    checked, then written   ▲                                         │
//!                    to the first buffer     └─────────── further buffers ◄────────────┘
//! ```
//!
//! A packet for which there are not enough buffers is held until there are, and the tap is not read any more: what comes then waits
//! in the tap's own queue, which drops what it has no room for. So nobody who floods the tap gets more than that queue, one packet
//! for each pair of queues, and a turn of limited length on the device thread.

use std::{collections::VecDeque, io, time::Duration};

use caisson_protos::monitor::NetworkStats;
use event_manager::EventSet;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::{
    super::{Buffers, Chain, Context, DeviceError, Poll, PollToken, Received},
    Backend, Net, NetState,
    filter::Mac,
    header::{ETHERNET, HEADER, Header, MAX_FRAME},
};

/// What is received before others on the device thread have their turn.
const MAX_PACKETS: usize = 64;
const MAX_BYTES: usize = 512 << 10;
/// Header and Ethernet header: all that is looked at.
const HEAD: usize = HEADER + ETHERNET;
/// The largest packet, and the size of the buffer for what does not fit into the driver's.
pub const MAX_PACKET: usize = HEADER + MAX_FRAME;
/// Buffers for at least so many bytes are taken for a packet.
const LEAST_EXPECTED: usize = 1500;

/// One queue pair.
pub struct Pair {
    /// The host's end.
    pub backend: Box<dyn Backend>,
    /// The driver uses it, and the host sends to it.
    pub attached: bool,
    watch: Watch,
    /// A packet that waits for buffers.
    pub(super) held: Option<Vec<u8>>,
    /// How large the next packet will be, from the one before.
    expected: usize,
}

/// Whether the tap is watched for packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Never,
    Resting,
    Watching,
}

impl Pair {
    /// Not in use.
    pub fn new(backend: Box<dyn Backend>, attached: bool) -> Self {
        Self { backend, attached, watch: Watch::Never, held: None, expected: 0 }
    }

    fn raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.backend.fd())
    }

    /// Begins to watch the tap.
    pub fn watch(&mut self, token: PollToken, poll: &mut dyn Poll) -> Result<(), DeviceError> {
        self.set_watch(Watch::Watching, token, poll)
    }

    /// Ends the watch; a packet that waits is forgotten.
    pub fn unwatch(&mut self, poll: &mut dyn Poll) {
        if self.watch != Watch::Never {
            poll.remove(self.raw_fd());
        }
        (self.watch, self.held) = (Watch::Never, None);
    }

    fn set_watch(&mut self, watch: Watch, token: PollToken, poll: &mut dyn Poll) -> Result<(), DeviceError> {
        let fd = self.raw_fd();
        let events = if watch == Watch::Watching { EventSet::IN } else { EventSet::empty() };
        let result = match (self.watch, watch) {
            (before, after) if before == after => return Ok(()),
            (Watch::Never, _) => poll.add(fd, token, events),
            _ => poll.modify(fd, token, events),
        };
        self.watch = watch;
        result.map_err(|source| DeviceError::Host { what: "watching a tap", source })
    }
}

/// Chains that were taken for packets.
#[derive(Default)]
struct Room<'m> {
    chains: VecDeque<Chain<'m>>,
    len: usize,
}

impl<'m> Room<'m> {
    /// Takes chains until there is room for `len` bytes; false if the queue has not so many.
    fn take(&mut self, context: &mut Context<'m>, queue: usize, len: usize) -> Result<bool, DeviceError> {
        while self.len < len || self.chains.is_empty() {
            let Some(chain) = context.pop(queue)? else { return Ok(false) };
            self.len += chain.writable.len();
            self.chains.push_back(chain);
        }
        Ok(true)
    }

    /// The first chain, or all of them, as one.
    fn buffers(&self, all: bool) -> Buffers<'m> {
        let mut buffers = Buffers::default();
        let count = if all { self.chains.len() } else { 1 };
        // 4 GiB are more than any packet needs.
        let _ = self.chains.iter().take(count).all(|chain| buffers.append(&chain.writable));
        buffers
    }

    /// Returns the chains that a packet of `len` bytes lies in.
    fn complete(&mut self, context: &mut Context, queue: usize, len: usize) -> Result<(), DeviceError> {
        let (mut rest, mut done) = (len, Vec::new());
        while rest > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let size = chain.writable.len();
            if size < HEADER || !chain.readable.is_empty() {
                *context.guest_faults += 1;
            }
            self.len -= size;
            let written = rest.min(size);
            rest -= written;
            done.push((chain.head, u32::try_from(written).unwrap_or(u32::MAX)));
        }
        match context.queues.get_mut(queue) {
            Some(ring) => Ok(ring.complete_all(context.memory, &done)?),
            None => Ok(()),
        }
    }

    /// How many chains a packet of `len` bytes takes.
    fn count(&self, len: usize) -> usize {
        let (mut rest, mut count) = (len, 0);
        for chain in &self.chains {
            if rest == 0 {
                break;
            }
            rest = rest.saturating_sub(chain.writable.len());
            count += 1;
        }
        count
    }

    /// Puts all chains back into the queue.
    fn give_back(self, context: &mut Context, queue: usize) {
        if let Some(ring) = context.queues.get_mut(queue) {
            self.chains.iter().for_each(|_| ring.unpop());
        }
    }
}

/// What came of an attempt to receive one packet.
enum Step {
    /// It has so many bytes; it was delivered, or nobody wants it.
    Done(usize),
    /// There is none.
    Nothing,
    /// The driver has not enough buffers.
    NoRoom,
    /// The tap is gone.
    Gone(io::Error),
}

/// Why a turn has ended.
enum End {
    Limit,
    Nothing,
    NoRoom,
    Wait(Duration),
    Gone(io::Error),
}

impl Net {
    /// Receives what the tap of a pair has.
    ///
    /// # Errors
    /// The device then needs a reset.
    pub(super) fn receive(&mut self, context: &mut Context, index: usize) -> Result<(), DeviceError> {
        let queue = receive_queue(index);
        let usable = context.queues.get(queue).is_some_and(|ring| ring.is_used());
        if self.gone || self.pairs.get(index).is_none_or(|pair| !pair.attached) {
            return Ok(());
        }
        if !usable {
            return self.set_watch(context, index, Watch::Resting);
        }
        let mut room = Room::default();
        let end = self.fill(context, index, &mut room)?;
        room.give_back(context, queue);
        let watch = match end {
            End::Limit | End::Nothing => Watch::Watching,
            End::NoRoom => Watch::Resting,
            End::Wait(time) => {
                self.receive_timer.start(time)?;
                Watch::Resting
            }
            End::Gone(error) => {
                slog::warn!(self.log, "the tap is gone, the network device is without a link"; "error" => %error);
                self.gone = true;
                self.update_config();
                self.pairs.iter_mut().for_each(|pair| pair.unwatch(context.poll));
                return Ok(());
            }
        };
        self.set_watch(context, index, watch)
    }

    fn set_watch(&mut self, context: &mut Context, index: usize, watch: Watch) -> Result<(), DeviceError> {
        match self.pairs.get_mut(index) {
            Some(pair) => pair.set_watch(watch, token(index), context.poll),
            None => Ok(()),
        }
    }

    /// The limit lets packets pass again.
    ///
    /// # Errors
    /// The device then needs a reset.
    pub(super) fn receive_again(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.receive_timer.stop();
        (0..self.pairs.len()).try_for_each(|pair| self.receive(context, pair))
    }

    fn fill<'m>(&mut self, context: &mut Context<'m>, index: usize, room: &mut Room<'m>) -> Result<End, DeviceError> {
        let queue = receive_queue(index);
        let (mut packets, mut bytes) = (0, 0);
        if let Some(ring) = context.queues.get_mut(queue) {
            ring.disable_notification(context.memory)?;
        }
        while packets < MAX_PACKETS && bytes < MAX_BYTES {
            let now = self.now(self.state.receive.is_unlimited());
            if let Err(time) = self.state.receive.ready(now) {
                return Ok(End::Wait(time));
            }
            let Self { pairs, state, stats, rest, .. } = self;
            let Some(pair) = pairs.get_mut(index) else { break };
            let mut receiver = Receiver { pair, state, stats, rest, queue };
            match receiver.receive_one(context, room)? {
                Step::Done(len) => (packets, bytes) = (packets + 1, bytes + len),
                Step::Nothing => return Ok(End::Nothing),
                Step::Gone(error) => return Ok(End::Gone(error)),
                Step::NoRoom => {
                    let Some(ring) = context.queues.get_mut(queue) else { break };
                    if !ring.enable_notification(context.memory)? {
                        return Ok(End::NoRoom);
                    }
                    // Another try counts, or a driver that adds one buffer at a time could hold the thread.
                    packets += 1;
                }
            }
        }
        // A packet that is held is in no tap that could report it.
        if self.pairs.get(index).is_some_and(|pair| pair.held.is_some()) {
            context.queues.get_mut(queue).into_iter().for_each(|ring| ring.call_again());
        }
        Ok(End::Limit)
    }
}

/// What the reception of one packet needs.
struct Receiver<'a> {
    pair: &'a mut Pair,
    state: &'a mut NetState,
    stats: &'a mut NetworkStats,
    rest: &'a mut [u8],
    queue: usize,
}

impl Receiver<'_> {
    fn receive_one<'m>(&mut self, context: &mut Context<'m>, room: &mut Room<'m>) -> Result<Step, DeviceError> {
        let mergeable = context.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        if let Some(packet) = self.pair.held.take() {
            return self.deliver_held(context, room, packet);
        }
        let expected = if mergeable { self.pair.expected.max(LEAST_EXPECTED) } else { 0 };
        room.take(context, self.queue, expected)?;
        if room.chains.is_empty() {
            return Ok(Step::NoRoom);
        }
        let buffers = room.buffers(mergeable);
        let mut head = [0; HEAD];
        let Received { len, in_chain } = loop {
            match buffers.read_packet(self.pair.backend.fd(), &mut head, self.rest) {
                Ok(received) if received.len > 0 => break received,
                Ok(_) => return Ok(Step::Gone(io::ErrorKind::UnexpectedEof.into())),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
                    _ => return Ok(Step::Gone(error)),
                },
            }
        };
        self.pair.expected = len;
        let Some((header, cost)) = self.wanted(context.features, &head, len) else { return Ok(Step::Done(len)) };
        let rest = self.rest.get(..len.saturating_sub(in_chain)).unwrap_or_default();
        if !mergeable && room.chains.front().is_none_or(|chain| chain.writable.len() < len) {
            // A driver that cannot join buffers must have large ones (5.1.6.3.1).
            self.stats.receive_dropped += 1;
            return Ok(Step::Done(len));
        }
        if !room.take(context, self.queue, len)? {
            if Self::never_fits(context, self.queue, room) {
                self.stats.receive_dropped += 1;
                *context.guest_faults += 1;
                return Ok(Step::Done(len));
            }
            let mut packet = vec![0; len];
            if let Some((start, end)) = packet.split_at_mut_checked(in_chain) {
                end.copy_from_slice(rest);
                if let Some((first, middle)) = start.split_first_chunk_mut::<HEAD>() {
                    *first = head;
                    // The buffers may be shorter than the head alone.
                    if !middle.is_empty() {
                        buffers.read(HEAD, middle)?;
                    }
                }
            }
            self.pair.held = Some(packet);
            return Ok(Step::NoRoom);
        }
        let buffers = room.buffers(mergeable);
        buffers.write(in_chain, rest)?;
        // From the copy that was looked at.
        if let Some((_, ethernet)) = head.split_first_chunk::<HEADER>() {
            buffers.write(HEADER, ethernet)?;
        }
        self.finish(context, room, &buffers, len, header, cost)
    }

    fn deliver_held<'m>(
        &mut self,
        context: &mut Context<'m>,
        room: &mut Room<'m>,
        packet: Vec<u8>,
    ) -> Result<Step, DeviceError> {
        let len = packet.len();
        let head = packet.first_chunk::<HEAD>();
        let Some((header, cost)) = head.and_then(|head| self.wanted(context.features, head, len)) else {
            return Ok(Step::Done(len));
        };
        if !room.take(context, self.queue, len)? {
            if Self::never_fits(context, self.queue, room) {
                self.stats.receive_dropped += 1;
                *context.guest_faults += 1;
                return Ok(Step::Done(len));
            }
            self.pair.held = Some(packet);
            return Ok(Step::NoRoom);
        }
        let buffers = room.buffers(true);
        buffers.write(0, &packet)?;
        self.finish(context, room, &buffers, len, header, cost)
    }

    /// Whether all buffers that the queue can have at a time are too few.
    fn never_fits(context: &Context, queue: usize, room: &Room) -> bool {
        context.queues.get(queue).is_none_or(|ring| room.chains.len() >= ring.size())
    }

    /// The header for the guest and what the packet costs, if the driver wants it.
    fn wanted(&mut self, features: u64, head: &[u8; HEAD], len: usize) -> Option<(Header, super::header::Cost)> {
        let (header, ethernet) = head.split_first_chunk::<HEADER>()?;
        let destination: Mac = *ethernet.first_chunk()?;
        let fits = (HEAD..=MAX_PACKET).contains(&len);
        let header = Header::parse(header).for_driver(len.saturating_sub(HEADER), features).filter(|_| fits);
        if header.is_none() {
            self.stats.receive_dropped += 1;
            return None;
        }
        if !self.state.filter.accepts(self.state.mac, destination) {
            self.stats.receive_filtered += 1;
            return None;
        }
        header
    }

    fn finish(
        &mut self,
        context: &mut Context,
        room: &mut Room,
        buffers: &Buffers,
        len: usize,
        mut header: Header,
        cost: super::header::Cost,
    ) -> Result<Step, DeviceError> {
        header.num_buffers = u16::try_from(room.count(len)).unwrap_or(u16::MAX);
        buffers.write(0, &header.bytes())?;
        room.complete(context, self.queue, len)?;
        self.state.receive.take(cost.bytes, cost.packets);
        self.stats.received_packets += cost.packets;
        self.stats.received_bytes += len.saturating_sub(HEADER) as u64;
        Ok(Step::Done(len))
    }
}

/// The index of a pair's receive queue (5.1.2).
pub fn receive_queue(pair: usize) -> usize {
    pair * 2
}

/// The token by which a pair's tap is watched.
pub fn token(pair: usize) -> PollToken {
    PollToken::try_from(pair).unwrap_or(PollToken::MAX)
}

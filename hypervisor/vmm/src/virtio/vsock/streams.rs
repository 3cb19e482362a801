//! All streams of a device: their names, their ports, and whose turn it is to send to the guest. No I/O.
//!
//! ```text
//!            by_ports                    slots                       turns
//!   (host port, guest port) ──► [ stream | stream | free | … ] ◄── [ 3, 0, 7 ]   one place each, round and round
//! ```
//!
//! *Fairness.* A stream that has something for the guest waits in one line, once. At its turn it sends one packet and
//! goes to the end of the line if it has more: no stream can starve another, however much it has to say.
//!
//! *Bounds.* The number of streams is limited (and more so for those that the guest opens: it must not be able to take the
//! last place from the host's own clients), and so is the sum of the buffers that they announce: the first streams get
//! large windows, later ones small windows. What a stream owes the guest besides data is kept as flags in its connection. Only
//! refusals of packets that belong to no stream are queued; when that queue is full, the device stops to take packets.

use std::collections::{HashMap, VecDeque};

use super::{connection::Connection, packet::Header};

/// Ports from here on name host ends of streams that host clients open. Services on the host have smaller numbers.
pub const FIRST_HOST_PORT: u32 = 0x4000_0000;
/// Refusals that may wait for the guest to post a buffer.
const MAX_REFUSALS: usize = 256;
/// The window of a stream while large ones last, bytes (Linux's own default for its sockets is the same).
const LARGE_WINDOW: u32 = 256 * 1024;
/// How much may be promised in windows before streams get small ones, bytes.
const LARGE_WINDOWS: u64 = 32 * 1024 * 1024;
/// The window of every further stream, bytes. 1024 of these are 32 MiB.
const SMALL_WINDOW: u32 = 32 * 1024;

/// The two ports that name a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

/// The name of a stream inside the monitor: its slot (low [`StreamId::SLOT_BITS`] bits) and how often the slot was used
/// before, so that a late event for an ended stream does not reach the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId(u32);

impl StreamId {
    /// All ids fit into so many bits.
    pub const BITS: u32 = 30;
    const SLOT_BITS: u32 = 12;
    const SLOT_MASK: u32 = (1 << Self::SLOT_BITS) - 1;

    /// The id with that number; bits beyond [`Self::BITS`] are dropped.
    pub fn from_number(number: u32) -> Self {
        Self(number & ((1 << Self::BITS) - 1))
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0
    }

    fn slot(self) -> usize {
        (self.0 & Self::SLOT_MASK) as usize
    }

    fn next_generation(self) -> Self {
        Self::from_number(self.0.wrapping_add(1 << Self::SLOT_BITS))
    }
}

/// One stream; `H` is its host end.
#[derive(Debug)]
pub struct Stream<H> {
    /// Its name on the wire.
    pub ports: Ports,
    /// Its protocol state.
    pub connection: Connection,
    /// Its host end.
    pub host: H,
    window: u32,
    from_guest: bool,
    is_queued: bool,
}

#[derive(Debug)]
struct Slot<H> {
    id: StreamId,
    stream: Option<Stream<H>>,
}

/// The table.
#[derive(Debug)]
pub struct Streams<H> {
    slots: Vec<Slot<H>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, StreamId>,
    turns: VecDeque<StreamId>,
    refusals: VecDeque<Header>,
    limit: usize,
    guest_limit: usize,
    from_guest: usize,
    promised: u64,
    next_host_port: u32,
}

impl<H> Streams<H> {
    /// An empty table of at most `limit` streams (up to 4096), of which the guest may open `guest_limit`.
    pub fn new(limit: usize, guest_limit: usize, next_host_port: u32) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            refusals: VecDeque::new(),
            limit: limit.min(1 << StreamId::SLOT_BITS),
            guest_limit,
            from_guest: 0,
            promised: 0,
            next_host_port: next_host_port.max(FIRST_HOST_PORT),
        }
    }

    /// Streams, including those that only deliver their last bytes.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Whether another stream of the guest would be refused.
    pub fn is_full_for_guest(&self) -> bool {
        self.is_full() || self.from_guest >= self.guest_limit
    }

    /// The port from which the search for the next host port begins.
    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Adds a stream that a host client opens to `guest_port`; its host port is chosen here.
    ///
    /// # Errors
    /// Gives the host end back when the table is full.
    pub fn open_from_host(&mut self, guest_port: u32, host: H) -> Result<StreamId, H> {
        // There are fewer streams than ports to try, so the search ends.
        let ports = loop {
            let ports = Ports { host: self.next_host_port, guest: guest_port };
            // VMADDR_PORT_ANY (u32::MAX) names no port.
            let next = self.next_host_port.wrapping_add(1);
            self.next_host_port = if next == u32::MAX { FIRST_HOST_PORT } else { next.max(FIRST_HOST_PORT) };
            if !self.host_port_in_use(ports.host) {
                break ports;
            }
        };
        let window = self.window();
        self.insert(ports, Connection::from_host(window), window, host, false)
    }

    /// Adds the stream that the guest opened by `request` under `ports`.
    ///
    /// # Errors
    /// Gives the host end back when the table is full for guests or knows these ports.
    pub fn open_from_guest(&mut self, ports: Ports, request: &Header, host: H) -> Result<StreamId, H> {
        if self.is_full_for_guest() {
            return Err(host);
        }
        let window = self.window();
        self.insert(ports, Connection::from_guest(window, request), window, host, true)
    }

    /// A host client learns its port as the name of its stream: no two live streams share it, even with different guest ports.
    /// Ports are given in turn, so one look at each slot (4096 at most, some microseconds) is nearly always all that a stream costs.
    fn host_port_in_use(&self, port: u32) -> bool {
        self.slots.iter().filter_map(|slot| slot.stream.as_ref()).any(|stream| stream.ports.host == port)
    }

    fn window(&self) -> u32 {
        if self.promised + u64::from(LARGE_WINDOW) <= LARGE_WINDOWS { LARGE_WINDOW } else { SMALL_WINDOW }
    }

    fn insert(
        &mut self,
        ports: Ports,
        connection: Connection,
        window: u32,
        host: H,
        from_guest: bool,
    ) -> Result<StreamId, H> {
        if self.is_full() || self.by_ports.contains_key(&ports) {
            return Err(host);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            // Fits: the limit is at most 2^SLOT_BITS.
            self.slots.push(Slot { id: StreamId(self.slots.len() as u32), stream: None });
            self.slots.len() - 1
        });
        let Some(slot) = self.slots.get_mut(index) else { return Err(host) };
        slot.stream = Some(Stream { ports, connection, host, window, from_guest, is_queued: false });
        self.by_ports.insert(ports, slot.id);
        self.from_guest += usize::from(from_guest);
        self.promised += u64::from(window);
        Ok(slot.id)
    }

    /// The stream with that id, if it still exists.
    pub fn get_mut(&mut self, id: StreamId) -> Option<&mut Stream<H>> {
        self.slots.get_mut(id.slot()).filter(|slot| slot.id == id)?.stream.as_mut()
    }

    /// The stream that the guest knows under `ports`.
    pub fn find(&self, ports: Ports) -> Option<StreamId> {
        self.by_ports.get(&ports).copied()
    }

    /// Makes the ports of a stream free, because the guest has forgotten it.
    pub fn forget_ports(&mut self, id: StreamId) {
        if let Some(ports) = self.get_mut(id).map(|stream| stream.ports)
            && self.by_ports.get(&ports) == Some(&id)
        {
            self.by_ports.remove(&ports);
        }
    }

    /// Ends a stream and gives its host end back.
    pub fn remove(&mut self, id: StreamId) -> Option<H> {
        self.forget_ports(id);
        let slot = self.slots.get_mut(id.slot()).filter(|slot| slot.id == id)?;
        let stream = slot.stream.take()?;
        slot.id = slot.id.next_generation();
        self.free.push(id.slot());
        self.promised -= u64::from(stream.window);
        self.from_guest -= usize::from(stream.from_guest);
        if stream.is_queued {
            self.turns.retain(|waiting| *waiting != id);
        }
        Some(stream.host)
    }

    /// Whether this holds for the host's end of a stream.
    pub fn any(&self, is: impl Fn(&H) -> bool) -> bool {
        self.slots.iter().filter_map(|slot| slot.stream.as_ref()).any(|stream| is(&stream.host))
    }

    /// Ids of all streams.
    pub fn ids(&self) -> Vec<StreamId> {
        self.slots.iter().filter(|slot| slot.stream.is_some()).map(|slot| slot.id).collect()
    }

    /// Puts a stream into the line of those that have something for the guest, if it does not stand there.
    pub fn enqueue(&mut self, id: StreamId) {
        if let Some(stream) = self.get_mut(id)
            && !std::mem::replace(&mut stream.is_queued, true)
        {
            self.turns.push_back(id);
        }
    }

    /// The stream whose turn it is; it leaves the line.
    pub fn next_turn(&mut self) -> Option<StreamId> {
        let id = self.turns.pop_front()?;
        if let Some(stream) = self.get_mut(id) {
            stream.is_queued = false;
        }
        Some(id)
    }

    /// Whether a refusal or a stream waits for its turn.
    pub fn has_turns(&self) -> bool {
        !self.refusals.is_empty() || !self.turns.is_empty()
    }

    /// Whether another refusal may be queued; while not, no packet may be taken from the guest.
    pub fn has_room_for_refusal(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Queues an RST that belongs to no stream.
    pub fn refuse(&mut self, packet: &Header) {
        if self.has_room_for_refusal() {
            self.refusals.push_back(packet.refusal());
        }
    }

    /// The next RST that belongs to no stream.
    pub fn next_refusal(&mut self) -> Option<Header> {
        self.refusals.pop_front()
    }

    /// Forgets everything except the port to continue with; returns the host ends.
    pub fn clear(&mut self) -> Vec<H> {
        self.turns.clear();
        self.refusals.clear();
        self.ids().into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

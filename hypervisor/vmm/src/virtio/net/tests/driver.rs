//! A driver of a network device: rings in guest memory, and on the host's side a packet socket for each queue of the tap.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{Arc, Mutex},
};

use caisson_protos::monitor::RateLimit;
use event_manager::EventSet;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType},
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::super::{Backend, Mac, Net, Settings};
use crate::virtio::{Context, DeviceError, GuestMemory, Poll, PollToken, VirtQueue, VirtioDevice};

pub const MAC: Mac = [2, 0, 0, 0, 0, 1];
pub const PEER: Mac = [2, 0, 0, 0, 0, 9];
const MEMORY: usize = 64 << 20;
/// Rings of queue q lie at `q * RINGS`.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;
const BUFFERS: u64 = 1 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A packet socket as a queue of a tap, with what the device has asked of it.
pub struct Socket {
    socket: OwnedFd,
    asked: Arc<Mutex<Vec<Asked>>>,
    queue: usize,
}

/// What a device asks of a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Offloads(u32),
    Attach(usize, bool),
}

impl Backend for Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.asked.lock().unwrap().push(Asked::Offloads(offloads));
        Ok(())
    }
    fn attach(&self, attached: bool) -> io::Result<()> {
        self.asked.lock().unwrap().push(Asked::Attach(self.queue, attached));
        Ok(())
    }
}

/// What the device watches.
#[derive(Default)]
pub struct Watched(pub BTreeMap<RawFd, (PollToken, EventSet)>);

impl Poll for Watched {
    fn add(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        assert!(self.0.insert(fd, (token, events)).is_none(), "watched twice");
        Ok(())
    }
    fn modify(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        assert!(self.0.insert(fd, (token, events)).is_some(), "not watched");
        Ok(())
    }
    fn remove(&mut self, fd: RawFd) {
        assert!(self.0.remove(&fd).is_some(), "not watched");
    }
}

#[derive(Default)]
struct Ring {
    next_descriptor: u16,
    offered: u16,
    taken: u16,
    pieces: BTreeMap<u16, Vec<(u64, usize)>>,
}

/// See the module's introduction.
pub struct Driver {
    pub net: Net,
    pub memory: GuestMemory,
    pub queues: Vec<VirtQueue>,
    pub poll: Watched,
    pub faults: u64,
    pub features: u64,
    /// Calls of the device.
    pub calls: usize,
    /// Interrupts that were due.
    pub interrupts: usize,
    /// The network's end of each queue.
    pub peers: Vec<OwnedFd>,
    asked: Arc<Mutex<Vec<Asked>>>,
    rings: Vec<Ring>,
    next_buffer: u64,
}

pub fn settings() -> Settings {
    Settings {
        mac: MAC,
        mtu: 1500,
        send_limit: RateLimit::default(),
        receive_limit: RateLimit::default(),
        sources: None,
        uso: true,
    }
}

impl Driver {
    /// A live driver that has accepted everything.
    pub fn new(pairs: usize, settings: Settings) -> Self {
        let mut driver = Self::quiet(pairs, settings, u64::MAX);
        driver.activate();
        driver
    }

    /// A driver with `features` at most, before DRIVER_OK.
    pub fn quiet(pairs: usize, settings: Settings, features: u64) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (mut backends, mut peers) = (Vec::<Box<dyn Backend>>::new(), Vec::new());
        for queue in 0..pairs {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (socket, peer) =
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            backends.push(Box::new(Socket { socket, asked: asked.clone(), queue }));
            peers.push(peer);
        }
        let mut driver = Self::on(backends, settings, features);
        (driver.peers, driver.asked) = (peers, asked);
        driver
    }

    /// A driver whose device has these backends, before DRIVER_OK.
    pub fn on(backends: Vec<Box<dyn Backend>>, settings: Settings, features: u64) -> Self {
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let net = Net::new(backends, settings, log).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let sizes = net.queue_sizes().to_vec();
        let features = features & (net.features() | 1 << 29);
        let queues = (0u64..).zip(&sizes).map(|(n, size)| queue(&memory, n * RINGS, *size, features)).collect();
        Self {
            net,
            memory,
            queues,
            poll: Watched::default(),
            faults: 0,
            features,
            calls: 0,
            interrupts: 0,
            peers: Vec::new(),
            asked: Arc::default(),
            rings: sizes.iter().map(|_| Ring::default()).collect(),
            next_buffer: BUFFERS,
        }
    }

    pub fn activate(&mut self) {
        self.call(|net, context| net.activate(context)).unwrap();
    }

    /// Resets the device; the queues stay as they are.
    pub fn reset(&mut self) {
        self.net.reset(&mut self.poll);
        assert!(self.poll.0.is_empty(), "a device that was reset watches nothing");
    }

    /// Resets the device and begins anew with empty queues.
    pub fn restart(&mut self, features: u64) {
        self.reset();
        self.memory.write_slice(&vec![0; BUFFERS as usize], GuestAddress(0)).unwrap();
        self.features = features & (self.net.features() | 1 << 29);
        let sizes = self.net.queue_sizes();
        self.queues =
            (0u64..).zip(sizes).map(|(n, size)| queue(&self.memory, n * RINGS, *size, self.features)).collect();
        self.rings.iter_mut().for_each(|ring| *ring = Ring::default());
        self.activate();
    }

    /// Whether the device asks for notifications, with a driver that knows no event indices.
    pub fn wants_notification(&self, queue: usize) -> bool {
        self.memory.read_obj::<u16>(GuestAddress(queue as u64 * RINGS + USED)).unwrap() == 0
    }

    /// What the device has asked of the tap since the last time.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    fn call(
        &mut self,
        call: impl FnOnce(&mut Net, &mut Context) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        self.calls += 1;
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            poll: &mut self.poll,
            features: self.features,
            guest_faults: &mut self.faults,
        };
        call(&mut self.net, &mut context)?;
        let due =
            self.queues.iter_mut().map(|queue| queue.take_signal(&self.memory).unwrap()).filter(|due| *due).count();
        self.interrupts += usize::from(due > 0);
        Ok(())
    }

    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.call(|net, context| net.queue_ready(context, queue))
    }

    /// One turn of the loop; false if there was nothing to do.
    pub fn turn(&mut self, timeout: Timespec) -> bool {
        self.try_turn(timeout).unwrap()
    }

    pub fn try_turn(&mut self, timeout: Timespec) -> Result<bool, DeviceError> {
        let again: Vec<usize> = (0..self.queues.len()).filter(|queue| self.queues[*queue].take_call_again()).collect();
        let timeout = if again.is_empty() { timeout } else { Timespec::default() };
        let watched: Vec<(RawFd, PollToken)> =
            self.poll.0.iter().filter(|(_, watch)| !watch.1.is_empty()).map(|(fd, watch)| (*fd, watch.0)).collect();
        // SAFETY: a device keeps what it watches open until it removes it.
        let fds: Vec<_> = watched.iter().map(|(fd, _)| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut polled, Some(&timeout)).unwrap();
        let ready = watched.iter().zip(&polled).filter(|(_, fd)| !fd.revents().is_empty());
        let tokens: Vec<PollToken> = ready.map(|((_, token), _)| *token).collect();
        for queue in &again {
            self.notify(*queue)?;
        }
        for token in &tokens {
            self.call(|net, context| net.descriptor_ready(context, *token, EventSet::IN))?;
        }
        Ok(!again.is_empty() || !tokens.is_empty())
    }

    /// Turns until there is nothing to do.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.turn(Timespec::default()) {
                return;
            }
        }
        panic!("the device is never at rest");
    }

    /// Turns until `done` gives something.
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        loop {
            if let Some(value) = done(self) {
                return value;
            }
            assert!(self.turn(PATIENCE), "nothing happened in {PATIENCE:?}");
        }
    }

    /// Makes a chain of readable pieces and writable room available.
    pub fn offer(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) {
        let readable = readable.iter().map(|bytes| (Some(*bytes), bytes.len()));
        let pieces: Vec<_> = readable.chain(writable.iter().map(|len| (None, *len))).collect();
        let (base, ring) = (queue as u64 * RINGS, &mut self.rings[queue]);
        let size = self.queues[queue].size() as u16;
        let head = ring.next_descriptor % size;
        let mut places = Vec::new();
        for (n, (bytes, len)) in pieces.iter().enumerate() {
            if self.next_buffer + *len as u64 > MEMORY as u64 {
                self.next_buffer = BUFFERS;
            }
            let flags = if bytes.is_none() { WRITE } else { 0 } | if n + 1 < pieces.len() { NEXT } else { 0 };
            self.memory.write_slice(bytes.unwrap_or_default(), GuestAddress(self.next_buffer)).unwrap();
            let at = base + u64::from(ring.next_descriptor % size) * 16;
            ring.next_descriptor = ring.next_descriptor.wrapping_add(1);
            let next = u64::from(ring.next_descriptor % size) << 48;
            self.memory.write_obj(self.next_buffer, GuestAddress(at)).unwrap();
            let rest = *len as u64 | u64::from(flags) << 32 | next;
            self.memory.write_obj(rest, GuestAddress(at + 8)).unwrap();
            if bytes.is_none() {
                places.push((self.next_buffer, *len));
            }
            self.next_buffer += *len as u64;
        }
        ring.pieces.insert(head, places);
        self.publish(queue, head);
    }

    /// Makes whatever is at `head` available.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let (available, ring) = (queue as u64 * RINGS + AVAILABLE, &mut self.rings[queue]);
        let slot = u64::from(ring.offered % self.queues[queue].size() as u16);
        self.memory.write_obj(head, GuestAddress(available + 4 + slot * 2)).unwrap();
        ring.offered = ring.offered.wrapping_add(1);
        self.memory.write_obj(ring.offered, GuestAddress(available + 2)).unwrap();
    }

    /// Where the descriptors of a queue are.
    pub fn table(queue: usize) -> GuestAddress {
        GuestAddress(queue as u64 * RINGS)
    }

    /// Receive buffers, and a notification if the device asked for one.
    pub fn post(&mut self, queue: usize, count: usize, len: usize) {
        (0..count).for_each(|_| self.offer(queue, &[], &[len]));
        self.notify(queue).unwrap();
    }

    /// Sends a frame.
    pub fn send(&mut self, queue: usize, header: &[u8], frame: &[u8]) {
        self.offer(queue, &[header, frame], &[]);
        self.notify(queue).unwrap();
    }

    /// Takes the next completed chain: its length and as many of its writable bytes.
    pub fn completed(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (used, ring) = (queue as u64 * RINGS + USED, &mut self.rings[queue]);
        if self.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap() == ring.taken {
            return None;
        }
        let slot = u64::from(ring.taken % self.queues[queue].size() as u16);
        let element: u64 = self.memory.read_obj(GuestAddress(used + 4 + slot * 8)).unwrap();
        ring.taken = ring.taken.wrapping_add(1);
        let mut bytes = Vec::new();
        for (address, len) in ring.pieces.remove(&(element as u16)).expect("a chain that was offered") {
            let mut piece = vec![0; len];
            self.memory.read_slice(&mut piece, GuestAddress(address)).unwrap();
            bytes.extend(piece);
        }
        bytes.truncate((element >> 32) as usize);
        Some(bytes)
    }

    /// Takes the next received packet, out of as many chains as its header says.
    pub fn received(&mut self, queue: usize) -> Option<Vec<u8>> {
        let mut packet = self.completed(queue)?;
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        assert!(count > 0);
        for _ in 1..count {
            packet.extend(self.completed(queue).expect("all chains of a packet at once"));
        }
        Some(packet)
    }

    /// Gives a command and takes the answer.
    pub fn command(&mut self, bytes: &[u8]) -> u8 {
        let queue = self.queues.len() - 1;
        self.offer(queue, &[bytes], &[1]);
        self.notify(queue).unwrap();
        let answer = self.completed(queue).expect("commands are answered at once");
        assert_eq!(answer.len(), 1);
        answer[0]
    }

    /// A packet comes from the network.
    pub fn deliver(&self, pair: usize, packet: &[u8]) -> Result<(), rustix::io::Errno> {
        rustix::net::send(&self.peers[pair], packet, rustix::net::SendFlags::NOSIGNAL).map(drop)
    }

    /// Takes a packet that the guest has sent.
    pub fn sent(&self, pair: usize) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let (len, _) = rustix::net::recv(&self.peers[pair], &mut packet[..], rustix::net::RecvFlags::DONTWAIT).ok()?;
        packet.truncate(len);
        Some(packet)
    }

    /// Whether the tap of a pair is watched for packets; None if it is not watched at all.
    pub fn is_watching(&self, pair: usize) -> Option<bool> {
        let fd = self.net.pairs[pair].backend.fd().as_raw_fd();
        self.poll.0.get(&fd).map(|watch| !watch.1.is_empty())
    }
}

fn queue(memory: &GuestMemory, base: u64, size: u16, features: u64) -> VirtQueue {
    let mut queue = VirtQueue::new(size).unwrap();
    let registers = queue.registers_mut();
    registers.try_set_desc_table_address(GuestAddress(base)).unwrap();
    registers.try_set_avail_ring_address(GuestAddress(base + AVAILABLE)).unwrap();
    registers.try_set_used_ring_address(GuestAddress(base + USED)).unwrap();
    registers.set_event_idx(features & 1 << 29 != 0);
    registers.set_ready(true);
    assert!(queue.is_usable(memory));
    queue
}

/// A frame from the peer to `destination`, with a payload that differs from others.
pub fn frame(destination: Mac, len: usize) -> Vec<u8> {
    let mut frame = [destination, PEER].concat();
    frame.extend([0x08, 0x00]);
    frame.extend((frame.len()..len).map(|n| (n % 251) as u8));
    frame
}

/// A frame with an empty header before it.
pub fn packet(destination: Mac, len: usize) -> Vec<u8> {
    [vec![0; 12], frame(destination, len)].concat()
}

//! A small driver for devices' own tests: it lays chains into guest memory, calls the device as the transport would,
//! and takes the completed chains back.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{BorrowedFd, RawFd},
};

use event_manager::EventSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::{Context, DeviceError, GuestMemory, Poll, PollToken, VirtQueue, VirtioDevice};

const MEMORY: usize = 16 << 20;
/// Each queue's rings lie in a window of this size, from 0 on.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;
/// From here on buffers are given out and never taken back.
const BUFFERS: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// See the module's introduction.
pub struct Driver {
    pub memory: GuestMemory,
    pub queues: Vec<VirtQueue>,
    pub guest_faults: u64,
    /// What the driver accepted.
    pub features: u64,
    device: Box<dyn VirtioDevice>,
    active: bool,
    watched: Watched,
    rings: Vec<Ring>,
    next_buffer: u64,
}

#[derive(Default)]
struct Ring {
    next_descriptor: u16,
    offered: u16,
    taken: u16,
    /// The writable pieces of each chain, by head.
    writable: std::collections::BTreeMap<u16, Vec<(u64, usize)>>,
}

/// How long a device may take until one of its descriptors is ready.
const LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// What the device watches.
#[derive(Default)]
pub struct Watched(BTreeMap<RawFd, PollToken>);

impl Watched {
    /// The watched descriptors that are ready; waits for one until `timeout`.
    pub fn ready(&self, timeout: Timespec) -> Vec<(RawFd, PollToken)> {
        // SAFETY: a device keeps what it watches open until it removes it.
        let borrow = |fd: &RawFd| unsafe { BorrowedFd::borrow_raw(*fd) };
        let fds: Vec<_> = self.0.keys().map(borrow).collect();
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut polled, Some(&timeout)).unwrap();
        self.0
            .iter()
            .zip(&polled)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|((fd, token), _)| (*fd, *token))
            .collect()
    }
}

impl Poll for Watched {
    fn add(&mut self, fd: RawFd, token: PollToken, _: EventSet) -> io::Result<()> {
        self.0.insert(fd, token);
        Ok(())
    }
    fn modify(&mut self, _: RawFd, _: PollToken, _: EventSet) -> io::Result<()> {
        Ok(())
    }
    fn remove(&mut self, fd: RawFd) {
        self.0.remove(&fd);
    }
}

/// Memory of a test machine, and a ready queue of `size` descriptors in its window number `window`.
pub fn queue_in(memory: &GuestMemory, window: usize, size: u16) -> VirtQueue {
    let base = window as u64 * RINGS;
    let mut queue = VirtQueue::new(size).unwrap();
    let registers = queue.registers_mut();
    registers.try_set_desc_table_address(GuestAddress(base)).unwrap();
    registers.try_set_avail_ring_address(GuestAddress(base + AVAILABLE)).unwrap();
    registers.try_set_used_ring_address(GuestAddress(base + USED)).unwrap();
    registers.set_ready(true);
    assert!(queue.is_usable(memory));
    queue
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let sizes = device.queue_sizes().to_vec();
        let queues = sizes.iter().enumerate().map(|(n, size)| queue_in(&memory, n, *size)).collect();
        let rings = sizes.iter().map(|_| Ring::default()).collect();
        let features = device.features();
        Self {
            memory,
            queues,
            guest_faults: 0,
            features,
            device,
            active: false,
            watched: Watched::default(),
            rings,
            next_buffer: BUFFERS,
        }
    }

    /// Makes one chain available: a readable piece (if not empty), then writable pieces of these lengths.
    pub fn offer(&mut self, queue: usize, readable: &[u8], writable: &[usize]) {
        let base = queue as u64 * RINGS;
        let mut pieces = Vec::new();
        if !readable.is_empty() {
            self.memory.write_slice(readable, GuestAddress(self.next_buffer)).unwrap();
            pieces.push((self.next_buffer, readable.len(), 0));
            self.next_buffer += readable.len() as u64;
        }
        for len in writable {
            pieces.push((self.next_buffer, *len, WRITE));
            self.next_buffer += *len as u64;
        }
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (n, (address, len, flags)) in pieces.iter().enumerate() {
            let next = if n + 1 < pieces.len() { NEXT } else { 0 };
            let at = base + u64::from(ring.next_descriptor) * 16;
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            self.memory.write_obj(*len as u32, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags | next, GuestAddress(at + 12)).unwrap();
            ring.next_descriptor += 1;
            self.memory.write_obj(ring.next_descriptor, GuestAddress(at + 14)).unwrap();
        }
        let available = base + AVAILABLE;
        self.memory.write_obj(head, GuestAddress(available + 4 + u64::from(ring.offered) * 2)).unwrap();
        ring.offered += 1;
        self.memory.write_obj(ring.offered, GuestAddress(available + 2)).unwrap();
        let writable = pieces.iter().filter(|piece| piece.2 == WRITE).map(|piece| (piece.0, piece.1)).collect();
        ring.writable.insert(head, writable);
    }

    /// Makes the chain `head` available once more.
    pub fn offer_again(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let available = queue as u64 * RINGS + AVAILABLE;
        self.memory.write_obj(head, GuestAddress(available + 4 + u64::from(ring.offered) * 2)).unwrap();
        ring.offered += 1;
        self.memory.write_obj(ring.offered, GuestAddress(available + 2)).unwrap();
    }

    /// Resets the device and its queues; chains that were offered stay where they are.
    pub fn reset(&mut self) {
        self.device.reset(&mut self.watched);
        self.active = false;
        assert!(self.watched.0.is_empty(), "a device that was reset watches nothing");
    }

    /// Where the bytes of the first chain are.
    pub fn first_buffer(&self) -> GuestAddress {
        GuestAddress(BUFFERS)
    }

    /// Notifies the device; the first time, it is activated before.
    pub fn run(&mut self, queue: usize) -> Result<(), DeviceError> {
        if !std::mem::replace(&mut self.active, true) {
            self.call(|device, context| device.activate(context))?;
        }
        self.call(|device, context| device.queue_ready(context, queue))
    }

    /// Waits until the device has something to do for itself, and lets it do that.
    pub fn wait(&mut self) -> Result<(), DeviceError> {
        let ready = self.watched.ready(LIMIT);
        assert!(!ready.is_empty(), "nothing happened in {LIMIT:?}");
        ready.into_iter().try_for_each(|(_, token)| {
            self.call(|device, context| device.descriptor_ready(context, token, EventSet::IN))
        })
    }

    /// Takes the next completed chain, and waits for it.
    pub fn wait_completed(&mut self, queue: usize) -> (u32, Vec<u8>) {
        loop {
            if let Some(completed) = self.completed(queue) {
                return completed;
            }
            self.wait().unwrap();
        }
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut dyn VirtioDevice, &mut Context) -> T) -> T {
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            poll: &mut self.watched,
            features: self.features,
            guest_faults: &mut self.guest_faults,
        };
        call(self.device.as_mut(), &mut context)
    }

    /// Takes the next completed chain: the length it was completed with, and all its writable bytes.
    pub fn completed(&mut self, queue: usize) -> Option<(u32, Vec<u8>)> {
        let used = queue as u64 * RINGS + USED;
        let ring = &mut self.rings[queue];
        if self.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap() == ring.taken {
            return None;
        }
        let at = used + 4 + u64::from(ring.taken) * 8;
        ring.taken += 1;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let written = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = Vec::new();
        for (address, len) in &ring.writable[&(head as u16)] {
            let mut piece = vec![0; *len];
            self.memory.read_slice(&mut piece, GuestAddress(*address)).unwrap();
            bytes.extend(piece);
        }
        Some((written, bytes))
    }
}

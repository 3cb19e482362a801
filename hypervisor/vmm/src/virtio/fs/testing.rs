//! The device between a driver and a server that this file plays: the driver over rings in real guest memory, the server
//! at the other end of the socket.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{OwnedFd, RawFd},
};

use event_manager::EventSet;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send as send_to, socketpair, sockopt,
};
use slog::{Logger, o};
use virtio_queue::{QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    wire::{REPLY_HEADER, REQUEST_HEADER},
    *,
};
use crate::virtio::VirtQueue;

pub(super) const SIZE: u16 = 512;
pub(super) const REQUESTS: usize = 1;

/// Remembers what is watched.
#[derive(Default)]
pub(super) struct Watches(pub(super) BTreeMap<RawFd, EventSet>);

impl Poll for Watches {
    fn add(&mut self, fd: RawFd, _: PollToken, events: EventSet) -> io::Result<()> {
        assert!(self.0.insert(fd, events).is_none(), "watched twice");
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, _: PollToken, events: EventSet) -> io::Result<()> {
        *self.0.get_mut(&fd).expect("not watched") = events;
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) {
        assert!(self.0.remove(&fd).is_some(), "not watched");
    }
}

/// A machine with nothing but this device.
pub(super) struct Machine {
    pub(super) memory: GuestMemoryMmap,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) watches: Watches,
    pub(super) device: FsDevice,
    pub(super) server: OwnedFd,
    pub(super) faults: u64,
    /// Of the request queue: the next entry of the available ring, and of the used ring.
    pub(super) available: u16,
    pub(super) used: u16,
}

/// One descriptor: address, length, writable by the device.
pub(super) type Piece = (u64, u32, bool);

pub(super) const TABLE: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x4000;
pub(super) const USED: u64 = 0x6000;
/// Where requests and replies of chain `head` lie in these tests.
pub(super) fn request_at(head: u16) -> u64 {
    0x10_0000 + u64::from(head) * 0x20_0000
}
pub(super) fn reply_at(head: u16) -> u64 {
    request_at(head) + 0x10_0000
}

impl Machine {
    pub(super) fn new() -> Self {
        Self::with_send_buffer(SEND_BUFFER)
    }

    pub(super) fn with_send_buffer(bytes: usize) -> Self {
        let (ours, server) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_send_buffer_size_force(&server, SEND_BUFFER).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let mut queues = vec![VirtQueue::new(SIZE).unwrap(), VirtQueue::new(SIZE).unwrap()];
        for (index, queue) in queues.iter_mut().enumerate() {
            let base = (1 - index as u32) * 0x8000;
            let registers = queue.registers_mut();
            registers.set_size(SIZE);
            registers.set_desc_table_address(Some(TABLE as u32 + base), Some(0));
            registers.set_avail_ring_address(Some(AVAILABLE as u32 + base), Some(0));
            registers.set_used_ring_address(Some(USED as u32 + base), Some(0));
            registers.set_ready(true);
        }
        let mut device = FsDevice::new("caisson", ours, Logger::root(slog::Discard, o!())).unwrap();
        assert_eq!(device.send_buffer, SEND_BUFFER, "these tests run as root");
        sockopt::set_socket_send_buffer_size_force(&device.socket, bytes / 2).unwrap();
        device.send_buffer = sockopt::socket_send_buffer_size(&device.socket).unwrap();
        assert!(device.send_buffer <= bytes);
        let watches = Watches::default();
        let mut machine = Self { memory, queues, watches, device, server, faults: 0, available: 0, used: 0 };
        machine.call(|device, context| device.activate(context)).unwrap();
        machine
    }

    pub(super) fn call<T>(&mut self, f: impl FnOnce(&mut FsDevice, &mut Context) -> T) -> T {
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            poll: &mut self.watches,
            features: 0,
            guest_faults: &mut self.faults,
        };
        f(&mut self.device, &mut context)
    }

    pub(super) fn describe(&self, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(TABLE + u64::from(index) * 16)).unwrap();
    }

    /// Lays a chain into consecutive descriptors from `head` on.
    pub(super) fn chain(&self, head: u16, pieces: &[Piece]) {
        for (i, &(address, len, writable)) in pieces.iter().enumerate() {
            let next = if i + 1 < pieces.len() { 1 } else { 0 };
            let flags = next | if writable { 2 } else { 0 };
            self.describe(head + i as u16, Descriptor::new(address, len, flags, head + i as u16 + 1));
        }
    }

    pub(super) fn make_available(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    pub(super) fn notify(&mut self) -> Result<(), DeviceError> {
        self.call(|device, context| device.queue_ready(context, REQUESTS))
    }

    pub(super) fn ready(&mut self, events: EventSet) -> Result<(), DeviceError> {
        self.call(|device, context| device.descriptor_ready(context, SERVER, events))
    }

    /// The timer fires.
    pub(super) fn alarm(&mut self) {
        self.call(|device, context| device.descriptor_ready(context, TIMER, EventSet::IN)).unwrap();
    }

    /// The server's process ends.
    pub(super) fn server_dies(&mut self) {
        let (_, closed) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        drop(std::mem::replace(&mut self.server, closed));
    }

    /// Sends a request with `body`, and `room` bytes for its reply, as chain `head` of two descriptors.
    pub(super) fn request(&mut self, head: u16, opcode: u32, unique: u64, body: &[u8], room: u32) {
        let bytes = message(opcode, unique, body);
        self.memory.write_slice(&bytes, GuestAddress(request_at(head))).unwrap();
        self.memory.write_slice(&[0xee; 256], GuestAddress(reply_at(head))).unwrap();
        let pieces = [(request_at(head), bytes.len() as u32, false), (reply_at(head), room, true)];
        self.chain(head, if room == 0 { &pieces[..1] } else { &pieces });
        self.make_available(head);
        self.notify().unwrap();
    }

    /// The next packet at the server, and its number.
    pub(super) fn server_gets(&self) -> (u64, Vec<u8>) {
        let mut packet = vec![0; 2 << 20];
        let (_, len) = recv(&self.server, &mut packet[..], RecvFlags::DONTWAIT).expect("a request at the server");
        packet.truncate(len);
        (u64::from_le_bytes(packet[8..16].try_into().unwrap()), packet)
    }

    pub(super) fn server_has_nothing(&self) -> bool {
        recv(&self.server, &mut [0; 1][..], RecvFlags::DONTWAIT) == Err(Errno::AGAIN)
    }

    pub(super) fn server_sends(&mut self, packet: &[u8]) {
        send_to(&self.server, packet, SendFlags::NOSIGNAL).unwrap();
        self.ready(EventSet::IN).unwrap();
    }

    /// The next completed chain of the request queue and the reply that its driver sees.
    pub(super) fn completed(&mut self) -> Option<(u16, Vec<u8>)> {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let entry = USED + 4 + u64::from(self.used % SIZE) * 8;
        let [head, written]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
        self.used = self.used.wrapping_add(1);
        let mut reply = vec![0; written as usize];
        self.memory.read_slice(&mut reply, GuestAddress(reply_at(head as u16))).unwrap();
        Some((head as u16, reply))
    }
}

pub(super) fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((REQUEST_HEADER + body.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend([0; 24]);
    bytes.extend(body);
    bytes
}

pub(super) fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Reply { len: REPLY_HEADER + body.len(), error, unique }.bytes().to_vec();
    bytes.extend(body);
    bytes
}

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const INIT: u32 = 26;

//! The device between a driver and a server that this file plays: the driver over rings in real guest memory, the server
//! at the other end of the socket.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use caisson_protos::monitor;
use event_manager::EventSet;
use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send as send_to, socketpair, sockopt,
};
use slog::{Logger, o};
use virtio_queue::{QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::VirtQueue;

const SIZE: u16 = 64;
const REQUESTS: usize = 1;

/// Remembers what is watched.
#[derive(Default)]
struct Watches(BTreeMap<RawFd, EventSet>);

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
struct Machine {
    memory: GuestMemoryMmap,
    queues: Vec<VirtQueue>,
    watches: Watches,
    device: FsDevice,
    server: OwnedFd,
    faults: u64,
    /// Of the request queue: the next entry of the available ring, and of the used ring.
    available: u16,
    used: u16,
}

/// One descriptor: address, length, writable by the device.
type Piece = (u64, u32, bool);

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where requests and replies of chain `head` lie in these tests.
fn request_at(head: u16) -> u64 {
    0x10_0000 + u64::from(head) * 0x20_0000
}
fn reply_at(head: u16) -> u64 {
    request_at(head) + 0x10_0000
}

impl Machine {
    fn new() -> Self {
        Self::with_send_buffer(SEND_BUFFER)
    }

    fn with_send_buffer(bytes: usize) -> Self {
        let (ours, server) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_send_buffer_size_force(&server, SEND_BUFFER).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
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

    fn call<T>(&mut self, f: impl FnOnce(&mut FsDevice, &mut Context) -> T) -> T {
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            poll: &mut self.watches,
            features: 0,
            guest_faults: &mut self.faults,
        };
        f(&mut self.device, &mut context)
    }

    fn describe(&self, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(TABLE + u64::from(index) * 16)).unwrap();
    }

    /// Lays a chain into consecutive descriptors from `head` on.
    fn chain(&self, head: u16, pieces: &[Piece]) {
        for (i, &(address, len, writable)) in pieces.iter().enumerate() {
            let next = if i + 1 < pieces.len() { 1 } else { 0 };
            let flags = next | if writable { 2 } else { 0 };
            self.describe(head + i as u16, Descriptor::new(address, len, flags, head + i as u16 + 1));
        }
    }

    fn make_available(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn notify(&mut self) -> Result<(), DeviceError> {
        self.call(|device, context| device.queue_ready(context, REQUESTS))
    }

    fn ready(&mut self, events: EventSet) -> Result<(), DeviceError> {
        self.call(|device, context| device.descriptor_ready(context, SERVER, events))
    }

    /// Sends a request with `body`, and `room` bytes for its reply, as chain `head` of two descriptors.
    fn request(&mut self, head: u16, opcode: u32, unique: u64, body: &[u8], room: u32) {
        let bytes = message(opcode, unique, body);
        self.memory.write_slice(&bytes, GuestAddress(request_at(head))).unwrap();
        self.memory.write_slice(&[0xee; 256], GuestAddress(reply_at(head))).unwrap();
        let pieces = [(request_at(head), bytes.len() as u32, false), (reply_at(head), room, true)];
        self.chain(head, if room == 0 { &pieces[..1] } else { &pieces });
        self.make_available(head);
        self.notify().unwrap();
    }

    /// The next packet at the server, and its number.
    fn server_gets(&self) -> (u64, Vec<u8>) {
        let mut packet = vec![0; 2 << 20];
        let (_, len) = recv(&self.server, &mut packet[..], RecvFlags::DONTWAIT).expect("a request at the server");
        packet.truncate(len);
        (u64::from_le_bytes(packet[8..16].try_into().unwrap()), packet)
    }

    fn server_has_nothing(&self) -> bool {
        recv(&self.server, &mut [0; 1][..], RecvFlags::DONTWAIT) == Err(Errno::AGAIN)
    }

    fn server_sends(&mut self, packet: &[u8]) {
        send_to(&self.server, packet, SendFlags::NOSIGNAL).unwrap();
        self.ready(EventSet::IN).unwrap();
    }

    /// The next completed chain of the request queue and the reply that its driver sees.
    fn completed(&mut self) -> Option<(u16, Vec<u8>)> {
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

fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((REQUEST_HEADER + body.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend([0; 24]);
    bytes.extend(body);
    bytes
}

fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Reply { len: REPLY_HEADER + body.len(), error, unique }.bytes().to_vec();
    bytes.extend(body);
    bytes
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const INIT: u32 = 26;

#[test]
fn the_configuration_is_the_tag_and_one_request_queue() {
    let machine = Machine::new();
    let mut config = [0; 44];
    machine.device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"caisson\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_tag_has_1_to_36_bytes() {
    for (tag, good) in [("", false), ("a", true), (&"x".repeat(36), true), (&"x".repeat(37), false)] {
        let (ours, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        assert_eq!(FsDevice::new(tag, ours, Logger::root(slog::Discard, o!())).is_ok(), good, "{tag:?}");
    }
}

#[test]
fn a_request_and_its_reply_pass_under_another_number() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 77, b"etc\0", 200);
    let (number, packet) = machine.server_gets();
    assert_ne!(number, 77);
    assert_eq!(packet[REQUEST_HEADER..], *b"etc\0");
    assert_eq!(packet[..8], message(LOOKUP, 77, b"etc\0")[..8]);
    assert_eq!(machine.completed(), None);
    machine.server_sends(&reply(number, 0, b"entry"));
    assert_eq!(machine.completed(), Some((0, reply(77, 0, b"entry"))));
    assert_eq!(machine.device.in_flight(), 0);
}

#[test]
fn replies_find_their_requests_in_any_order() {
    let mut machine = Machine::new();
    for head in [0u16, 2, 4] {
        machine.request(head, LOOKUP, 5, &[head as u8], 100);
    }
    let numbers: Vec<(u64, u8)> = (0..3).map(|_| machine.server_gets()).map(|(n, p)| (n, p[REQUEST_HEADER])).collect();
    for (number, name) in numbers.iter().rev() {
        machine.server_sends(&reply(*number, 0, &[*name]));
        assert_eq!(machine.completed(), Some((u16::from(*name), reply(5, 0, &[*name]))));
    }
}

#[test]
fn a_mebibyte_passes_both_ways_scattered_over_pages() {
    let mut machine = Machine::new();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 7) as u8).collect();
    let bytes = message(16, 9, &data);
    // 40 bytes, then pages in falling order, through an indirect table.
    let mut pieces = vec![(request_at(0), 40, false)];
    machine.memory.write_slice(&bytes[..40], GuestAddress(request_at(0))).unwrap();
    for (i, page) in data.chunks(4096).enumerate() {
        let address = request_at(2) + (255 - i as u64) * 4096;
        machine.memory.write_slice(page, GuestAddress(address)).unwrap();
        pieces.push((address, 4096, false));
    }
    pieces.push((reply_at(0), 16 + (1 << 20), true));
    let table = 0x6_0000;
    for (i, &(address, len, writable)) in pieces.iter().enumerate() {
        let flags = u16::from(i + 1 < pieces.len()) | if writable { 2 } else { 0 };
        let descriptor = Descriptor::new(address, len, flags, i as u16 + 1);
        machine.memory.write_obj(descriptor, GuestAddress(table + i as u64 * 16)).unwrap();
    }
    machine.describe(0, Descriptor::new(table, pieces.len() as u32 * 16, 4, 0));
    machine.make_available(0);
    machine.notify().unwrap();
    let (number, packet) = machine.server_gets();
    assert!(packet[40..] == data, "the data arrives unchanged");
    machine.server_sends(&reply(number, 0, &data));
    let (_, seen) = machine.completed().unwrap();
    assert!(seen == reply(9, 0, &data), "the data returns unchanged");
}

#[test]
fn forget_completes_at_once_and_takes_no_slot() {
    let mut machine = Machine::new();
    machine.request(3, FORGET, 8, &[0; 8], 0);
    assert_eq!(machine.server_gets().1[REQUEST_HEADER..], [0; 8]);
    assert_eq!(machine.completed(), Some((3, vec![])));
    assert_eq!(machine.device.in_flight(), 0);
}

#[test]
fn the_hiprio_queue_is_served_the_same_way() {
    let mut machine = Machine::new();
    let bytes = message(FORGET, 1, &[0; 8]);
    machine.memory.write_slice(&bytes, GuestAddress(request_at(0))).unwrap();
    let base = 0x8000;
    let descriptor = Descriptor::new(request_at(0), bytes.len() as u32, 0, 0);
    machine.memory.write_obj(descriptor, GuestAddress(TABLE + base)).unwrap();
    machine.memory.write_obj(1u16, GuestAddress(AVAILABLE + base + 2)).unwrap();
    machine.call(|device, context| device.queue_ready(context, 0)).unwrap();
    machine.server_gets();
    assert_eq!(machine.memory.read_obj::<u16>(GuestAddress(USED + base + 2)).unwrap(), 1);
}

#[test]
fn a_request_that_lies_about_its_length_is_answered_with_einval() {
    let mut machine = Machine::new();
    for said in [0u32, 40, 43, 45, 0x7fff_ffff, u32::MAX] {
        let mut bytes = message(LOOKUP, 6, b"etc\0");
        bytes[..4].copy_from_slice(&said.to_le_bytes());
        machine.memory.write_slice(&bytes, GuestAddress(request_at(0))).unwrap();
        machine.chain(0, &[(request_at(0), bytes.len() as u32, false), (reply_at(0), 64, true)]);
        machine.make_available(0);
        machine.notify().unwrap();
        assert_eq!(machine.completed(), Some((0, reply(6, -libc::EINVAL, &[]))), "length {said}");
    }
    assert_eq!(machine.faults, 6);
    assert!(machine.server_has_nothing());
}

#[test]
fn a_request_beyond_the_greatest_length_is_answered_with_einval() {
    let mut machine = Machine::new();
    machine.request(0, 16, 6, &vec![0; wire::MAX_REQUEST - REQUEST_HEADER], 64);
    assert_eq!(machine.server_gets().1.len(), wire::MAX_REQUEST);
    // request_at and reply_at are 1 MiB apart: put the header of a longer one far below.
    let bytes = message(16, 6, &vec![0; wire::MAX_REQUEST - REQUEST_HEADER + 1]);
    machine.memory.write_slice(&bytes, GuestAddress(request_at(6))).unwrap();
    machine.chain(4, &[(request_at(6), bytes.len() as u32, false), (reply_at(4), 64, true)]);
    machine.make_available(4);
    machine.notify().unwrap();
    assert_eq!(machine.completed(), Some((4, reply(6, -libc::EINVAL, &[]))));
}

#[test]
fn a_request_too_short_or_without_room_for_a_reply_completes_empty() {
    let mut machine = Machine::new();
    machine.chain(0, &[(request_at(0), 39, false), (reply_at(0), 64, true)]);
    machine.make_available(0);
    machine.notify().unwrap();
    assert_eq!(machine.completed(), Some((0, vec![])));
    machine.request(2, LOOKUP, 1, b"a\0", 15);
    assert_eq!(machine.completed(), Some((2, vec![])));
    assert_eq!(machine.faults, 2);
    assert!(machine.server_has_nothing());
}

#[test]
fn what_the_server_makes_up_is_dropped() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let (number, _) = machine.server_gets();
    machine.server_sends(&reply(number + 1, 0, b"made up"));
    machine.server_sends(&reply(7, 0, b"the driver's own number"));
    machine.server_sends(&[1; 15]);
    machine.server_sends(&reply(0, 1, b"a notification"));
    assert_eq!(machine.completed(), None);
    machine.server_sends(&reply(number, 0, b"true"));
    machine.server_sends(&reply(number, 0, b"twice"));
    assert_eq!(machine.completed(), Some((0, reply(7, 0, b"true"))));
    assert_eq!(machine.completed(), None);
    assert_eq!(machine.device.strange_packets, 5);
}

#[test]
fn a_reply_that_breaks_the_protocol_becomes_eio() {
    let mut machine = Machine::new();
    let eio = reply(7, -libc::EIO, &[]);
    type Case = (&'static str, fn(u64) -> Vec<u8>);
    let cases: [Case; 5] = [
        ("longer than the room", |n| reply(n, 0, &[1; 49])),
        ("with a false length", |n| [reply(n, 0, b"abc"), vec![0]].concat()),
        ("with a positive error", |n| reply(n, 5, &[])),
        ("with an error that Linux does not know", |n| reply(n, -512, &[])),
        ("with an error and a body", |n| reply(n, -2, b"abc")),
    ];
    for (what, packet) in cases {
        machine.request(0, LOOKUP, 7, b"a\0", 64);
        let (number, _) = machine.server_gets();
        machine.server_sends(&packet(number));
        assert_eq!(machine.completed(), Some((0, eio.clone())), "a reply {what}");
        let after: u8 = machine.memory.read_obj(GuestAddress(reply_at(0) + 64)).unwrap();
        assert_eq!(after, 0xee, "a reply {what} wrote beyond its room");
    }
}

#[test]
fn a_driver_that_changes_its_descriptors_meanwhile_harms_only_itself() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let (number, _) = machine.server_gets();
    machine.chain(0, &[(request_at(0), 42, false), (reply_at(0), 8, true)]);
    machine.server_sends(&reply(number, 0, b"entry"));
    assert_eq!(machine.completed(), Some((0, vec![])));
    assert_eq!(machine.faults, 1);
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let (number, _) = machine.server_gets();
    machine.chain(0, &[(request_at(0), 42, false), (u64::MAX - 4, 64, true)]);
    send_to(&machine.server, &reply(number, 0, b"entry"), SendFlags::NOSIGNAL).unwrap();
    assert!(machine.ready(EventSet::IN).is_err(), "outside memory: the device needs a reset");
}

#[test]
fn a_full_socket_makes_requests_wait_and_loses_none() {
    let mut machine = Machine::new();
    let body = vec![7; 1 << 20];
    let mut sent = 0;
    let fd = machine.device.socket.as_raw_fd();
    while machine.device.link != Link::Full {
        // The same chain again and again: nothing here looks at its reply.
        machine.request(0, 16, sent, &body, 64);
        sent += 1;
        assert!(sent < 100, "the socket never fills");
    }
    assert_eq!(machine.watches.0[&fd], EventSet::IN | EventSet::OUT);
    assert_eq!(machine.device.in_flight(), sent as usize - 1);
    machine.notify().unwrap();
    assert_eq!(machine.device.in_flight(), sent as usize - 1, "nothing is sent before there is room");
    for _ in 0..sent - 1 {
        machine.server_gets();
    }
    machine.ready(EventSet::OUT).unwrap();
    machine.server_gets();
    assert!(machine.server_has_nothing());
    assert_eq!(machine.watches.0[&fd], EventSet::IN);
    assert_eq!(machine.device.in_flight(), sent as usize);
}

#[test]
fn when_the_server_dies_every_request_fails_now_and_later() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    machine.request(2, LOOKUP, 8, b"b\0", 64);
    let (_, closed) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    drop(std::mem::replace(&mut machine.server, closed));
    machine.ready(EventSet::IN | EventSet::HANG_UP).unwrap();
    let gone = |unique| reply(unique, -libc::ENOTCONN, &[]);
    assert_eq!(machine.completed(), Some((0, gone(7))));
    assert_eq!(machine.completed(), Some((2, gone(8))));
    assert!(machine.watches.0.is_empty());
    machine.request(4, LOOKUP, 9, b"c\0", 64);
    assert_eq!(machine.completed(), Some((4, gone(9))));
    machine.request(4, FORGET, 9, &[0; 8], 0);
    assert_eq!(machine.completed(), Some((4, vec![])));
}

#[test]
fn a_server_that_died_unnoticed_is_noticed_by_the_next_request() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let (_, closed) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    drop(std::mem::replace(&mut machine.server, closed));
    machine.request(2, LOOKUP, 8, b"b\0", 64);
    assert_eq!(machine.completed(), Some((0, reply(7, -libc::ENOTCONN, &[]))));
    assert_eq!(machine.completed(), Some((2, reply(8, -libc::ENOTCONN, &[]))));
}

#[test]
fn a_late_reply_touches_nothing_after_a_reset() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let (late, _) = machine.server_gets();
    let Machine { device, watches, .. } = &mut machine;
    device.reset(watches);
    assert!(watches.0.is_empty());
    machine.call(|device, context| device.activate(context)).unwrap();
    machine.request(0, LOOKUP, 8, b"b\0", 64);
    machine.server_sends(&reply(late, 0, b"late"));
    assert_eq!(machine.completed(), None);
    assert_eq!(machine.memory.read_obj::<u8>(GuestAddress(reply_at(0))).unwrap(), 0xee);
    let (number, _) = machine.server_gets();
    machine.server_sends(&reply(number, 0, b"new"));
    assert_eq!(machine.completed(), Some((0, reply(8, 0, b"new"))));
}

#[test]
fn requests_that_were_in_flight_at_a_save_fail_after_the_restore() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 7, b"a\0", 64);
    let saved: FsState = monitor::decode(&monitor::encode(machine.device.state()).unwrap()).unwrap();
    let mut restored = Machine::new();
    std::mem::swap(&mut restored.memory, &mut machine.memory);
    restored.device.restore(saved);
    restored.call(|device, context| device.activate(context)).unwrap();
    assert_eq!(restored.completed(), Some((0, reply(7, -libc::EIO, &[]))));
}

#[test]
fn init_is_told_the_size_that_the_socket_carries() {
    for (send_buffer, write, pages) in [(SEND_BUFFER, 1u32 << 20, 256u16), (425_984, 102 * 4096, 102)] {
        let mut machine = Machine::with_send_buffer(send_buffer);
        machine.request(0, INIT, 7, &[0; 64], 80);
        let (number, _) = machine.server_gets();
        let mut body = [0; 64];
        body[20..24].copy_from_slice(&(1u32 << 20).to_le_bytes());
        body[28..30].copy_from_slice(&256u16.to_le_bytes());
        machine.server_sends(&reply(number, 0, &body));
        body[20..24].copy_from_slice(&write.to_le_bytes());
        body[28..30].copy_from_slice(&pages.to_le_bytes());
        assert_eq!(machine.completed(), Some((0, reply(7, 0, &body))));
        // And what was promised fits.
        machine.request(2, 16, 8, &vec![1; write as usize + 40], 64);
        assert_eq!(machine.server_gets().1.len(), 40 + 40 + write as usize);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever descriptors, memory and packets there are, the device neither panics nor writes outside a chain.
    #[test]
    fn a_hostile_driver_and_a_hostile_server_are_survived(
        descriptors in prop::collection::vec((0u64..0x30_0000, 0u32..0x2000, 0u16..8, 0u16..SIZE + 2), SIZE as usize),
        heads in prop::collection::vec(0u16..SIZE + 2, 1..8),
        opcode in 0u32..48, len in 0u32..200,
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..64), 0..8),
    ) {
        let mut machine = Machine::new();
        // Everything that a chain may point to is a request header now, the guard behind it is not in any chain.
        let mut header = message(opcode, 3, &[]);
        header[..4].copy_from_slice(&len.to_le_bytes());
        for at in (0x10_0000..0x30_2000u64).step_by(0x1000) {
            machine.memory.write_slice(&header, GuestAddress(at)).unwrap();
        }
        machine.memory.write_slice(&[0xab; 4096], GuestAddress(0x31_0000)).unwrap();
        for (i, &(address, len, flags, next)) in descriptors.iter().enumerate() {
            machine.describe(i as u16, Descriptor::new(address | 0x10_0000, len, flags, next));
        }
        let mut broken = false;
        for head in heads {
            machine.make_available(head);
            broken |= machine.notify().is_err();
        }
        for packet in packets {
            send_to(&machine.server, &packet, SendFlags::NOSIGNAL).unwrap();
        }
        while let Ok((_, len)) = { let mut packet = [0; 64]; recv(&machine.server, &mut packet, RecvFlags::DONTWAIT)
            .map(|(got, len)| (send_to(&machine.server, &reply(u64::from_le_bytes(packet[8..16].try_into().unwrap()), 0, &packet[..got]), SendFlags::NOSIGNAL), len)) } {
            prop_assert!(len >= REQUEST_HEADER);
        }
        if !broken {
            let _ = machine.ready(EventSet::IN);
        }
        let mut guard = [0; 4096];
        machine.memory.read_slice(&mut guard, GuestAddress(0x31_0000)).unwrap();
        prop_assert!(guard.iter().all(|b| *b == 0xab));
        let Machine { device, watches, .. } = &mut machine;
        device.reset(watches);
        prop_assert_eq!(device.in_flight(), 0);
    }
}

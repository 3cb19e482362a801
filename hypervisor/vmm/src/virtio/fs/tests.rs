//! What drivers and servers that keep to the protocol see.

use caisson_protos::monitor;
use event_manager::EventSet;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use slog::{Logger, o};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::{testing::*, wire::REQUEST_HEADER, *};

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
fn a_full_socket_makes_requests_wait_and_loses_none() {
    let mut machine = Machine::new();
    // As large as a small request can be: these do not wait for each other.
    let body = vec![7; 8000];
    let mut sent = 0;
    let fd = machine.device.socket.as_raw_fd();
    while machine.device.link != Link::Full {
        // The same chain again and again: nothing here looks at its reply.
        machine.request(0, 16, sent, &body, 64);
        sent += 1;
        assert!(sent < 1000, "the socket never fills");
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
fn requests_that_wait_for_room_fail_when_the_server_dies() {
    let mut machine = Machine::new();
    // As large as a small request can be: these do not wait for each other.
    let body = vec![7; 8000];
    let mut sent = 0;
    while machine.device.link != Link::Full {
        machine.request(0, 16, sent, &body, 64);
        sent += 1;
        assert!(sent < 1000, "the socket never fills");
    }
    let (_, closed) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    drop(std::mem::replace(&mut machine.server, closed));
    machine.ready(EventSet::IN | EventSet::OUT | EventSet::HANG_UP).unwrap();
    let failed = std::iter::from_fn(|| machine.completed()).count();
    assert_eq!(failed as u64, sent, "the one that waited, too");
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
fn the_answer_to_init_has_the_size_that_the_socket_carries_well() {
    for (send_buffer, write, pages) in [(SEND_BUFFER, 24u32 * 4096, 24u16), (425_984, 12 * 4096, 12)] {
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

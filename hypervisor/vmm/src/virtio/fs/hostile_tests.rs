//! Drivers and servers that keep to no protocol.

use event_manager::EventSet;
use proptest::prelude::*;
use rustix::net::{RecvFlags, SendFlags, recv, send as send_to};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::{
    testing::{LOOKUP, Machine, SIZE, message, reply, reply_at, request_at},
    wire::{self, REQUEST_HEADER},
};
use crate::virtio::VirtioDevice;

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
        // The server also answers what reached it.
        let mut packet = [0; 4096];
        while let Ok((_, len)) = recv(&machine.server, &mut packet, RecvFlags::DONTWAIT) {
            prop_assert!(len >= REQUEST_HEADER);
            let number = u64::from_le_bytes(packet[8..16].try_into().unwrap());
            send_to(&machine.server, &reply(number, 0, &packet[..64]), SendFlags::NOSIGNAL).unwrap();
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

//! A host that is short of memory, a server that is slow or dies, and a driver that sends more than one should.

use caisson_protos::monitor;
use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{SendFlags, send as send_to},
};

use super::{testing::*, wire::REQUEST_HEADER, *};

const WRITE: u32 = 16;
const INTERRUPT: u32 = 36;
/// The data of the greatest request.
const DATA: usize = 24 * 4096;

#[test]
fn a_request_for_which_the_host_has_no_memory_is_sent_later() {
    for errno in [Errno::NOBUFS, Errno::NOMEM] {
        let mut machine = Machine::new();
        machine.device.send_failures.extend([errno; 3]);
        machine.request(0, WRITE, 5, &vec![7; DATA], 64);
        assert_eq!(machine.completed(), None, "neither sent nor failed");
        assert!(machine.server_has_nothing());
        machine.alarm();
        machine.alarm();
        assert!(machine.server_has_nothing());
        assert_eq!(machine.device.alarm, Alarm::Retry, "it is tried until there is memory");
        // Nor do those wait that need little.
        machine.request(2, LOOKUP, 6, b"a\0", 64);
        assert_eq!(machine.server_gets().1[REQUEST_HEADER..], *b"a\0");
        machine.alarm();
        let (number, packet) = machine.server_gets();
        assert_eq!(packet[REQUEST_HEADER..], vec![7; DATA]);
        machine.server_sends(&reply(number, 0, b"written"));
        assert_eq!(machine.completed(), Some((0, reply(5, 0, b"written"))));
        assert_eq!(machine.device.memory_failures, 3);
    }
}

#[test]
fn a_forget_is_not_complete_before_it_is_sent() {
    let mut machine = Machine::new();
    machine.device.send_failures.extend([Errno::NOBUFS; 2]);
    machine.request(0, FORGET, 5, &[0; 8], 0);
    assert_eq!(machine.completed(), None);
    machine.alarm();
    assert_eq!(machine.completed(), None);
    machine.alarm();
    assert_eq!(machine.server_gets().1.len(), REQUEST_HEADER + 8);
    assert_eq!(machine.completed(), Some((0, vec![])));
}

#[test]
fn small_requests_pass_large_ones() {
    let mut machine = Machine::new();
    for head in 0..15 {
        machine.request(head * 2, WRITE, u64::from(head), &[vec![head as u8], vec![7; DATA - 1]].concat(), 64);
    }
    let before = machine.device.in_flight();
    assert!((8..15).contains(&before), "{before} large requests in flight");
    machine.request(30, LOOKUP, 99, b"a\0", 64);
    let mut numbers = Vec::new();
    for n in 0..before {
        let (number, packet) = machine.server_gets();
        assert_eq!(usize::from(packet[REQUEST_HEADER]), n);
        numbers.push(number);
    }
    assert_eq!(machine.server_gets().1[REQUEST_HEADER..], *b"a\0", "it waits for those in flight and no others");
    assert!(machine.server_has_nothing());
    // Each reply lets the next one go, in the driver's order.
    for n in before..15 {
        machine.server_sends(&reply(numbers[n - before], 0, &[]));
        let (number, packet) = machine.server_gets();
        assert_eq!(usize::from(packet[REQUEST_HEADER]), n);
        numbers.push(number);
    }
    assert!(machine.device.state.waiting.is_empty());
}

#[test]
fn large_requests_that_wait_are_sent_after_a_restore() {
    let mut machine = Machine::new();
    for head in 0..12 {
        machine.request(head * 2, WRITE, u64::from(head), &vec![head as u8; DATA], 64);
    }
    let in_flight = machine.device.in_flight();
    assert!(in_flight < 12);
    let saved: FsState = monitor::decode(&monitor::encode(machine.device.state()).unwrap()).unwrap();
    let mut restored = Machine::new();
    std::mem::swap(&mut restored.memory, &mut machine.memory);
    std::mem::swap(&mut restored.queues, &mut machine.queues);
    restored.device.restore(saved);
    restored.call(|device, context| device.activate(context)).unwrap();
    for n in 0..in_flight as u64 {
        assert_eq!(restored.completed(), Some((n as u16 * 2, reply(n, -libc::EIO, &[]))));
    }
    for n in in_flight..12 {
        assert_eq!(usize::from(restored.server_gets().1[REQUEST_HEADER]), n);
    }
    assert!(restored.server_has_nothing());
}

#[test]
fn an_interrupt_is_answered_here() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 6, b"a\0", 64);
    let (number, _) = machine.server_gets();
    machine.request(2, INTERRUPT, 7, &6u64.to_le_bytes(), 64);
    assert_eq!(machine.completed(), Some((2, reply(7, -libc::ENOSYS, &[]))));
    machine.request(4, INTERRUPT, 7, &6u64.to_le_bytes(), 0);
    assert_eq!(machine.completed(), Some((4, vec![])));
    assert!(machine.server_has_nothing());
    assert_eq!((machine.device.in_flight(), machine.faults), (1, 0));
    machine.server_sends(&reply(number, 0, b"entry"));
    assert_eq!(machine.completed(), Some((0, reply(6, 0, b"entry"))));
}

#[test]
fn replies_from_before_the_servers_end_are_delivered() {
    // Noticed by the next request or by the socket; with and without a request that the server never read.
    for (unread, by_request) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut machine = Machine::new();
        machine.request(0, LOOKUP, 5, b"a\0", 64);
        machine.request(2, LOOKUP, 6, b"b\0", 64);
        for body in [b"first", b"other"] {
            let (number, _) = machine.server_gets();
            send_to(&machine.server, &reply(number, 0, body), SendFlags::NOSIGNAL).unwrap();
        }
        if unread {
            machine.request(4, LOOKUP, 7, b"c\0", 64);
        }
        machine.server_dies();
        if by_request {
            machine.request(6, LOOKUP, 8, b"d\0", 64);
        } else {
            while machine.device.link != Link::Closed {
                machine.ready(EventSet::IN | EventSet::HANG_UP).unwrap();
            }
        }
        assert_eq!(machine.completed(), Some((0, reply(5, 0, b"first"))), "{unread} {by_request}");
        assert_eq!(machine.completed(), Some((2, reply(6, 0, b"other"))), "{unread} {by_request}");
        let gone = |unique| reply(unique, -libc::ENOTCONN, &[]);
        if unread {
            assert_eq!(machine.completed(), Some((4, gone(7))));
        }
        if by_request {
            assert_eq!(machine.completed(), Some((6, gone(8))));
        }
        assert_eq!(machine.completed(), None);
    }
}

#[test]
fn one_broken_chain_does_not_keep_the_others_from_their_answer() {
    let mut machine = Machine::new();
    for head in [0, 2, 4] {
        machine.request(head, LOOKUP, u64::from(head), b"a\0", 64);
    }
    machine.chain(0, &[(u64::MAX - 4, 64, true)]);
    machine.server_dies();
    let mut result = Ok(());
    while machine.device.link != Link::Closed {
        result = machine.ready(EventSet::IN | EventSet::HANG_UP);
    }
    assert!(result.is_err(), "the device needs a reset");
    assert_eq!(machine.completed(), Some((2, reply(2, -libc::ENOTCONN, &[]))));
    assert_eq!(machine.completed(), Some((4, reply(4, -libc::ENOTCONN, &[]))));
}

#[test]
fn large_requests_that_wait_fail_when_the_server_dies() {
    let mut machine = Machine::new();
    for head in 0..15 {
        machine.request(head * 2, WRITE, u64::from(head), &vec![7; DATA], 64);
    }
    assert!(machine.device.in_flight() < 15);
    machine.server_dies();
    while machine.device.link != Link::Closed {
        machine.ready(EventSet::IN | EventSet::HANG_UP).unwrap();
    }
    let failed: Vec<_> = std::iter::from_fn(|| machine.completed()).collect();
    assert_eq!(failed.len(), 15);
    assert!(failed.iter().all(|(_, bytes)| bytes[4..8] == (-libc::ENOTCONN).to_le_bytes()));
}

#[test]
fn a_server_that_does_not_answer_is_noticed() {
    let mut machine = Machine::new();
    machine.request(0, LOOKUP, 5, b"a\0", 64);
    let (number, _) = machine.server_gets();
    assert_eq!(machine.device.alarm, Alarm::Progress);
    machine.alarm();
    machine.alarm();
    assert_eq!(machine.device.stalls, 2);
    machine.server_sends(&reply(number, 0, &[]));
    // One that is younger than the alarm does not count.
    machine.request(2, LOOKUP, 6, b"b\0", 64);
    machine.alarm();
    assert_eq!((machine.device.stalls, machine.device.alarm), (0, Alarm::Progress));
    let (number, _) = machine.server_gets();
    machine.server_sends(&reply(number, 0, &[]));
    machine.alarm();
    assert_eq!((machine.device.stalls, machine.device.alarm), (0, Alarm::Off), "an idle machine has no timer");
}

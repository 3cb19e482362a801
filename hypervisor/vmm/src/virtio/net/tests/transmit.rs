//! From the guest to the network.

use std::{collections::BTreeSet, net::Ipv4Addr};

use caisson_protos::monitor::{AllowedSources, RateLimit, TokenBucket};
use rustix::event::Timespec;

use super::{super::Settings, driver::*};

const TX: usize = 1;

#[test]
fn frames_of_all_sizes_and_in_any_number_of_pieces_are_sent_whole() {
    let mut driver = Driver::new(1, settings());
    for len in [14, 60, 255, 256, 257, 1514, 65_597] {
        let frame = frame(PEER, len);
        driver.send(TX, &[0; 12], &frame);
        assert_eq!(driver.sent(0), Some([vec![0; 12], frame].concat()), "{len}");
        assert_eq!(driver.completed(TX), Some(Vec::new()));
    }
    // The header in two pieces, the frame in many.
    let bytes = packet(PEER, 1000);
    let pieces: Vec<&[u8]> = bytes.chunks(7).collect();
    driver.offer(TX, &pieces, &[]);
    driver.notify(TX).unwrap();
    assert_eq!(driver.sent(0), Some(bytes.clone()));
    assert_eq!((driver.net.stats.sent_packets, driver.faults), (8, 0));
}

#[test]
fn what_means_nothing_in_a_header_is_not_passed_on() {
    let mut driver = Driver::new(1, settings());
    // Unknown flags, a length and a checksum that nothing asks for.
    driver.send(TX, &[0xfe, 0, 99, 0, 5, 0, 200, 0, 200, 0, 7, 0], &frame(PEER, 100));
    assert_eq!(driver.sent(0), Some(packet(PEER, 100)));
}

#[test]
fn a_limit_holds_the_guest_back_and_loses_nothing() {
    let bytes = Some(TokenBucket { rate: 1_000_000, burst: 3000 });
    let send_limit = RateLimit { bytes, operations: None };
    let mut driver = Driver::new(1, Settings { send_limit, ..settings() });
    for n in 0..10 {
        driver.offer(TX, &[&packet(PEER, 1000 + n)], &[]);
    }
    driver.notify(TX).unwrap();
    assert!(driver.net.send_timer.is_running());
    let calls = driver.calls;
    for n in 0..10 {
        let sent = driver.until(|driver| driver.sent(0));
        assert_eq!(sent, packet(PEER, 1000 + n));
    }
    assert!(driver.calls - calls <= 10, "a notification while the limit holds does not add to the turns");
}

#[test]
fn a_reset_does_not_fill_a_bucket() {
    let operations = Some(TokenBucket { rate: 1, burst: 2 });
    let send_limit = RateLimit { bytes: None, operations };
    let mut driver = Driver::new(1, Settings { send_limit, ..settings() });
    for _ in 0..2 {
        driver.send(TX, &[0; 12], &frame(PEER, 100));
    }
    let (before, started) = (driver.net.state.send.clone(), driver.net.started);
    driver.restart(u64::MAX);
    assert_eq!((&driver.net.state.send, driver.net.started), (&before, started));
}

#[test]
fn a_flood_of_the_guest_is_taken_in_turns() {
    let mut driver = Driver::new(1, settings());
    for _ in 0..200 {
        driver.offer(TX, &[&packet(PEER, 60)], &[]);
    }
    driver.notify(TX).unwrap();
    let first = driver.net.stats.sent_packets + driver.net.stats.send_dropped;
    assert_eq!(first, 64, "one turn");
    driver.settle();
    assert_eq!(driver.net.stats.sent_packets + driver.net.stats.send_dropped, 200, "all are taken");
    assert!(driver.interrupts <= 4, "one for each turn at most: {}", driver.interrupts);
    // Bytes bound a turn as well.
    let mut driver = Driver::new(1, settings());
    for _ in 0..20 {
        driver.offer(TX, &[&packet(PEER, 65_000)], &[]);
    }
    driver.notify(TX).unwrap();
    assert_eq!(driver.net.stats.sent_packets + driver.net.stats.send_dropped, 9, "512 KiB and a packet");
}

#[test]
fn a_bound_guest_sends_from_its_own_addresses_only() {
    let sources = Some(AllowedSources { ipv4: vec![Ipv4Addr::new(10, 0, 0, 2)], ipv6: Vec::new() });
    let mut driver = Driver::new(1, Settings { sources, ..settings() });
    let ip = |source: [u8; 4], mac: [u8; 6]| {
        let mut frame = [PEER, mac].concat();
        frame.extend([8, 0, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend(source);
        frame.extend([10, 0, 0, 1]);
        frame
    };
    driver.send(TX, &[0; 12], &ip([10, 0, 0, 2], MAC));
    assert!(driver.sent(0).is_some());
    for frame in [ip([10, 0, 0, 3], MAC), ip([10, 0, 0, 2], PEER)] {
        driver.send(TX, &[0; 12], &frame);
        assert_eq!(driver.sent(0), None);
    }
    assert_eq!((driver.net.stats.spoofed, driver.net.stats.send_dropped, driver.faults), (2, 2, 0));
    assert_eq!(driver.command(&[1, 1, 2, 0, 0, 0, 0, 7]), 1, "another MAC");
    assert_eq!(driver.command(&[&[1, 1][..], &MAC].concat()), 0, "its own");
}

#[test]
fn a_busy_guest_is_not_asked_to_notify() {
    // Without event indices, the flag in the used ring says whether a notification is wanted.
    let mut driver = Driver::quiet(1, settings(), !(1 << 29));
    driver.activate();
    for _ in 0..65 {
        driver.offer(TX, &[&packet(PEER, 60)], &[]);
    }
    driver.notify(TX).unwrap();
    assert!(!driver.wants_notification(TX), "one is left, and the device comes back by itself");
    driver.turn(Timespec::default());
    assert!(driver.wants_notification(TX));
}

#[test]
fn all_that_is_offered_is_completed_once() {
    let mut driver = Driver::new(1, settings());
    for _ in 0..3 {
        for n in 0..100 {
            driver.offer(TX, &[&packet(PEER, 60 + n)], &[]);
        }
        driver.notify(TX).unwrap();
        driver.settle();
        assert_eq!(std::iter::from_fn(|| driver.completed(TX)).count(), 100);
    }
    let kinds: BTreeSet<usize> = std::iter::from_fn(|| driver.sent(0)).map(|packet| packet.len()).collect();
    assert!(!kinds.is_empty());
}

//! From the network to the guest.

use caisson_protos::monitor::{RateLimit, TokenBucket};
use virtio_bindings::virtio_net::*;

use super::{super::Settings, driver::*};

const RX: usize = 0;

/// What a driver must find: the packet with the number of its buffers in the header.
fn expected(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

#[test]
fn packets_of_all_sizes_arrive_whole_in_as_few_buffers_as_they_need() {
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 200, 1536);
    for len in [14, 15, 60, 1514, 1524, 1525, 9000, 65_549, 20, 4000] {
        driver.deliver(0, &packet(MAC, len)).unwrap();
        driver.settle();
        let buffers = (len + 12).div_ceil(1536) as u16;
        assert_eq!(driver.received(RX), Some(expected(packet(MAC, len), buffers)), "{len}");
        assert_eq!(driver.completed(RX), None, "{len}: buffers that were not needed stay in the queue");
    }
    let stats = driver.net.stats;
    assert_eq!((stats.received_packets, stats.receive_dropped), (10, 0));
    assert_eq!(driver.faults, 0);
}

#[test]
fn the_length_that_was_expected_changes_nothing() {
    // The packet before decides how many buffers are taken in advance: small after large, large after small.
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 250, 700);
    for len in [60_000, 60, 60_000, 60_000, 60, 60, 3000, 1400] {
        driver.deliver(0, &packet(MAC, len)).unwrap();
        driver.settle();
    }
    for len in [60_000, 60] {
        assert_eq!(driver.received(RX), Some(expected(packet(MAC, len), (len + 12).div_ceil(700) as u16)), "{len}");
    }
    driver.post(RX, 90, 700);
    driver.settle();
    for len in [60_000, 60_000, 60, 60, 3000, 1400] {
        assert_eq!(driver.received(RX), Some(expected(packet(MAC, len), (len + 12).div_ceil(700) as u16)), "{len}");
    }
}

#[test]
fn a_packet_waits_for_buffers_and_the_tap_waits_with_it() {
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 3, 1000);
    driver.deliver(0, &packet(MAC, 5000)).unwrap();
    driver.deliver(0, &packet(MAC, 100)).unwrap();
    driver.settle();
    assert_eq!(driver.is_watching(0), Some(false));
    assert_eq!(driver.completed(RX), None);
    driver.post(RX, 2, 1000);
    assert_eq!(driver.completed(RX), None, "five buffers are one too few");
    driver.post(RX, 2, 1000);
    driver.settle();
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 5000), 6)));
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 100), 1)));
    // No buffer is left, and nothing came since.
    driver.deliver(0, &packet(MAC, 100)).unwrap();
    driver.settle();
    assert_eq!(driver.is_watching(0), Some(false));
    driver.post(RX, 2, 1000);
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 100), 1)));
    assert_eq!(driver.is_watching(0), Some(true));
}

#[test]
fn a_driver_without_mergeable_buffers_gets_what_fits_into_one() {
    let mut driver = Driver::quiet(1, settings(), !(1 << VIRTIO_NET_F_MRG_RXBUF));
    driver.activate();
    driver.post(RX, 4, 1526);
    driver.deliver(0, &packet(MAC, 1514)).unwrap();
    driver.deliver(0, &packet(MAC, 1515)).unwrap();
    driver.deliver(0, &packet(MAC, 14)).unwrap();
    driver.settle();
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 1514), 1)));
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 14), 1)));
    assert_eq!(driver.net.stats.receive_dropped, 1);
}

#[test]
fn a_header_goes_over_as_it_is_and_only_to_a_driver_that_knows_it() {
    // NEEDS_CSUM, TCPv4, 54 bytes of headers, 1000 to a segment, checksum at 34 + 16.
    let header = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0, 0, 0];
    let tcp = [&header[..], &frame(MAC, 5054)].concat();
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 20, 1536);
    driver.deliver(0, &tcp).unwrap();
    driver.settle();
    assert_eq!(driver.received(RX), Some(expected(tcp.clone(), 4)));
    assert_eq!(driver.net.stats.received_packets, 5, "segments");
    for missing in [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4] {
        let mut driver = Driver::quiet(1, settings(), !(1 << missing));
        driver.activate();
        driver.post(RX, 20, 1536);
        driver.deliver(0, &tcp).unwrap();
        driver.settle();
        assert_eq!((driver.received(RX), driver.net.stats.receive_dropped), (None, 1));
    }
    // A checksum that the host has verified is no news to a driver that does not ask.
    let valid = [&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], &frame(MAC, 100)].concat();
    let mut driver = Driver::quiet(1, settings(), !(1 << VIRTIO_NET_F_GUEST_CSUM));
    driver.activate();
    driver.post(RX, 1, 1536);
    driver.deliver(0, &valid).unwrap();
    driver.settle();
    assert_eq!(driver.received(RX).unwrap()[0], 0);
}

#[test]
fn what_the_driver_does_not_want_costs_no_buffer() {
    let mut driver = Driver::new(1, settings());
    assert_eq!(driver.command(&[0, 0, 0]), 0, "not promiscuous");
    driver.post(RX, 1, 1536);
    for _ in 0..5 {
        driver.deliver(0, &packet([2, 0, 0, 0, 0, 7], 100)).unwrap();
    }
    driver.deliver(0, &packet(MAC, 101)).unwrap();
    driver.settle();
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 101), 1)));
    assert_eq!(driver.net.stats.receive_filtered, 5);
}

#[test]
fn a_packet_in_many_buffers_appears_at_once_and_interrupts_once() {
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 100, 100);
    let before = driver.interrupts;
    driver.deliver(0, &packet(MAC, 5000)).unwrap();
    driver.settle();
    assert_eq!(driver.received(RX), Some(expected(packet(MAC, 5000), 51)));
    assert_eq!(driver.interrupts, before + 1);
}

#[test]
fn a_flood_is_taken_in_turns_and_without_an_interrupt_for_each_packet() {
    let mut driver = Driver::new(1, settings());
    let (mut sent, mut received, mut posted) = (0, 0, 0);
    while received < 3000 {
        while sent < 3000 && driver.deliver(0, &packet(MAC, 1000 + sent % 7)).is_ok() {
            sent += 1;
        }
        let before = driver.net.stats.received_packets;
        driver.post(RX, 128 + received - posted, 1536);
        posted = 128 + received;
        driver.turn(rustix::event::Timespec::default());
        assert!(driver.net.stats.received_packets - before <= 128, "two calls of 64 at most");
        while let Some(packet) = driver.received(RX) {
            assert_eq!(packet, expected(super::driver::packet(MAC, 1000 + received % 7), 1));
            received += 1;
        }
    }
    assert!(driver.net.pairs[0].held.is_none());
}

#[test]
fn a_limit_holds_the_network_back_and_loses_nothing() {
    let operations = Some(TokenBucket { rate: 1000, burst: 3 });
    let receive_limit = RateLimit { bytes: None, operations };
    let mut driver = Driver::new(1, Settings { receive_limit, ..settings() });
    driver.post(RX, 100, 1536);
    for n in 0..8 {
        driver.deliver(0, &packet(MAC, 100 + n)).unwrap();
    }
    driver.turn(rustix::event::Timespec::default());
    assert_eq!(driver.is_watching(0), Some(false), "the tap rests while the limit does");
    assert!(driver.net.receive_timer.is_running());
    for n in 0..8 {
        let packet = driver.until(|driver| driver.received(RX));
        assert_eq!(packet, expected(super::driver::packet(MAC, 100 + n), 1));
    }
}

#[test]
fn a_tap_that_disappears_takes_the_link_and_nothing_else() {
    let mut driver = Driver::new(1, settings());
    driver.post(RX, 4, 1536);
    assert_eq!(driver.net.config[6..8], [1, 0]);
    driver.peers.clear();
    driver.settle();
    assert_eq!(driver.is_watching(0), None);
    assert_eq!(driver.net.config[6..8], [0, 0]);
    driver.send(1, &[0; 12], &frame(PEER, 100));
    assert_eq!(driver.completed(1), Some(Vec::new()), "what is sent is dropped");
    assert_eq!(driver.net.stats.send_dropped, 1);
}

//! Drivers that break the rules.

use proptest::prelude::*;
use rustix::event::Timespec;
use virtio_bindings::virtio_net::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;

const RX: usize = 0;
const TX: usize = 1;

#[test]
fn frames_that_are_none_are_dropped_and_completed() {
    let mut driver = Driver::new(1, settings());
    let plain = [0; 12];
    let huge = vec![0; 65_598];
    let cases: [(&[u8], &[u8]); 8] = [
        (&[], &[]),
        (&plain[..5], &[]),
        (&plain, &[]),
        (&plain, &[1; 13]),
        (&plain, &huge),
        // Offloads that cannot be: an unknown kind, no segment size, a checksum outside.
        (&[1, 9, 0, 0, 0, 0, 14, 0, 0, 0, 0, 0], &[1; 100]),
        (&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &[1; 100]),
        (&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], &[1; 100]),
    ];
    for (header, frame) in cases {
        // A zero-length descriptor behind it changes nothing.
        driver.offer(TX, &[header, frame, &[]], &[]);
        driver.notify(TX).unwrap();
        assert_eq!(driver.completed(TX), Some(Vec::new()), "{header:?} {}", frame.len());
        assert_eq!(driver.sent(0), None);
    }
    assert_eq!((driver.net.stats.send_dropped, driver.faults), (8, 8));
    driver.send(TX, &plain, &frame(PEER, 60));
    assert!(driver.sent(0).is_some(), "and it goes on");
}

#[test]
fn a_frame_in_more_pieces_than_the_kernel_takes_at_once_is_dropped() {
    let mut driver = Driver::new(1, settings());
    let bytes = packet(PEER, 255 - 12);
    let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
    driver.offer(TX, &pieces, &[]);
    driver.notify(TX).unwrap();
    assert_eq!(driver.sent(0), Some(bytes), "as many as the queue has descriptors");
}

#[test]
fn receive_buffers_that_are_none_do_no_harm() {
    // Of no length, too small for a header, readable.
    let mut driver = Driver::new(1, settings());
    for _ in 0..3 {
        driver.offer(RX, &[], &[0]);
        driver.offer(RX, &[], &[5]);
        driver.offer(RX, &[b"what?"], &[]);
    }
    driver.deliver(0, &packet(MAC, 100)).unwrap();
    driver.notify(RX).unwrap();
    driver.settle();
    assert_eq!(driver.completed(RX), None);
    driver.post(RX, 1, 1536);
    driver.settle();
    let written: usize = std::iter::from_fn(|| driver.completed(RX)).map(|bytes| bytes.len()).sum();
    assert_eq!(written, 112);
    assert!(driver.faults > 0);
}

#[test]
fn a_queue_full_of_nothing_drops_packets_and_keeps_none() {
    let mut driver = Driver::new(1, settings());
    for _ in 0..256 {
        driver.offer(RX, &[], &[0]);
    }
    driver.notify(RX).unwrap();
    for _ in 0..5 {
        driver.deliver(0, &packet(MAC, 100)).unwrap();
    }
    driver.settle();
    assert_eq!(driver.net.stats.receive_dropped, 5);
    assert!(driver.net.pairs[0].held.is_none());
}

#[test]
fn a_driver_that_adds_one_buffer_at_a_time_does_not_hold_the_thread() {
    let mut driver = Driver::new(1, settings());
    driver.deliver(0, &packet(MAC, 60_000)).unwrap();
    for _ in 0..50 {
        let before = driver.calls;
        driver.post(RX, 1, 64);
        driver.turn(Timespec::default());
        assert!(driver.calls - before <= 3);
    }
    assert!(driver.net.pairs[0].held.is_some());
    driver.reset();
    assert!(driver.net.pairs[0].held.is_none(), "what waited for one driver is not for the next");
}

#[test]
fn a_ring_that_is_rewritten_stops_the_device_until_its_reset() {
    for queue in [RX, TX, 2] {
        let mut driver = Driver::new(1, settings());
        driver.offer(queue, &[b"x"], &[100]);
        driver.memory.write_obj(u64::MAX, Driver::table(queue)).unwrap();
        driver.deliver(0, &packet(MAC, 100)).unwrap();
        assert!(driver.notify(queue).is_err());
        driver.restart(u64::MAX);
        driver.settle();
    }
}

#[test]
fn a_command_without_a_place_for_its_answer_is_completed() {
    let mut driver = Driver::new(1, settings());
    driver.offer(2, &[&[0, 0, 0]], &[]);
    driver.notify(2).unwrap();
    assert_eq!(driver.completed(2), Some(Vec::new()));
}

#[derive(Clone, Debug)]
enum Step {
    Post(usize, usize),
    Send(Vec<u8>, usize),
    Command(Vec<u8>),
    Deliver(Vec<u8>, usize),
    Poke(u64, Vec<u8>),
    Publish(usize, u16),
    Notify(usize),
    Turn,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bytes = |len| proptest::collection::vec(any::<u8>(), 0..len);
    let small = |len| proptest::collection::vec(0u8..6, 0..len);
    let len = || prop_oneof![4 => 0usize..100, 2 => 0usize..3000, 1 => 60_000usize..69_000];
    let step = prop_oneof![
        6 => (0usize..4, len()).prop_map(|(count, len)| Step::Post(count, len)),
        6 => (small(13), len()).prop_map(|(header, len)| Step::Send(header, len)),
        4 => small(20).prop_map(Step::Command),
        6 => (bytes(13), len()).prop_map(|(header, len)| Step::Deliver(header, len)),
        2 => (0u64..0x30000, bytes(32)).prop_map(|(at, data)| Step::Poke(at, data)),
        2 => (0usize..5, 0u16..300).prop_map(|(queue, head)| Step::Publish(queue, head)),
        3 => (0usize..7).prop_map(Step::Notify),
        6 => Just(Step::Turn),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_anything_is_survived(steps in steps(), features: u64, mergeable: bool) {
        let features = if mergeable { features | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_CTRL_VQ } else { features };
        let mut driver = Driver::quiet(2, settings(), features);
        driver.activate();
        for step in steps {
            // An error stops the device, as the transport does.
            let result = match step {
                Step::Post(count, len) => {
                    (0..count).for_each(|_| driver.offer(RX, &[], &[len]));
                    driver.notify(RX)
                }
                Step::Send(header, len) => {
                    driver.offer(TX, &[&header, &vec![1; len]], &[]);
                    driver.notify(TX)
                }
                Step::Command(bytes) => {
                    driver.offer(4, &[&bytes], &[1]);
                    driver.notify(4)
                }
                Step::Deliver(header, len) => {
                    // An empty one would be the end of a socket.
                    let _ = driver.deliver(0, &[vec![0], header, vec![2; len]].concat());
                    Ok(())
                }
                Step::Poke(at, data) => {
                    driver.memory.write_slice(&data, GuestAddress(at)).unwrap();
                    Ok(())
                }
                Step::Publish(queue, head) => {
                    driver.publish(queue, head);
                    driver.notify(queue)
                }
                Step::Notify(queue) => driver.notify(queue),
                Step::Turn => driver.try_turn(Timespec::default()).map(drop),
                Step::Reset => {
                    driver.reset();
                    driver.activate();
                    Ok(())
                }
            };
            if result.is_err() {
                driver.restart(features);
            }
            while driver.sent(0).is_some() || driver.sent(1).is_some() {}
        }
        // Another driver finds a device that works.
        driver.restart(u64::MAX);
        loop {
            let before = driver.net.stats;
            driver.post(RX, 50, 1536);
            driver.settle();
            while driver.completed(RX).is_some() {}
            if before == driver.net.stats {
                break;
            }
        }
        driver.post(RX, 4, 1536);
        driver.deliver(0, &packet(MAC, 100)).unwrap();
        driver.settle();
        prop_assert_eq!(driver.received(RX).map(|packet| packet.len()), Some(112));
    }
}

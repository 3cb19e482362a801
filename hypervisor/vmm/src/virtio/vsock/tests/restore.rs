//! A device that was saved and restored: the guest resets its streams before it opens others, and loses no buffer.

use std::time::Duration;

use super::{
    driver::{Driver, PATIENCE, limits},
    guest::Guest,
};
use crate::virtio::vsock::{
    EVENT, Limits, TX,
    packet::{HOST_CID, Header, Op, TYPE_STREAM},
};

/// Linux posts as many.
const EVENTS: u16 = 8;

fn post_event(driver: &mut Driver, slot: u16) {
    driver.descriptor(EVENT, slot, 0x5_0000 + u64::from(slot) * 16, 4, 2, 0);
    driver.offer(EVENT, slot);
}

/// A guest with receive and event buffers, saved and restored.
fn restored(limits: Limits) -> Driver {
    let mut guest = Guest::new();
    (0..EVENTS).for_each(|slot| post_event(&mut guest.driver, slot));
    guest.driver.restored(limits)
}

fn request(driver: &mut Driver) {
    let header =
        Header { src_cid: 3, dst_cid: HOST_CID, kind: TYPE_STREAM, op: Op::Request as u16, ..Header::default() };
    driver.send(&Header { src_port: 9, dst_port: 1, buf_alloc: 1000, ..header }, &[]);
}

#[test]
fn what_was_transmitted_before_the_save_is_signalled_after_it() {
    let mut guest = Guest::new();
    let ports = guest.connect(1);
    while guest.driver.completed(TX).is_some() {}
    let before = guest.driver.interrupts;
    guest.write(ports, b"ready to be saved");
    assert_eq!(guest.driver.interrupts, before, "the driver does not know that its buffer is free");
    (0..EVENTS).for_each(|slot| post_event(&mut guest.driver, slot));
    let mut driver = guest.driver.restored(limits());
    assert!(driver.interrupts > 0);
    // The driver finds it, and buffers come back as before.
    assert!(driver.completed(TX).is_some());
    post_event(&mut driver, 0);
    driver.notify(EVENT).unwrap();
    let before = driver.interrupts;
    let stray = guest_packet();
    for _ in 0..40 {
        driver.send(&stray, &[]);
    }
    assert!(driver.interrupts > before);
}

/// A packet that is not even answered.
fn guest_packet() -> Header {
    Header { src_cid: 3, dst_cid: HOST_CID, kind: TYPE_STREAM, op: Op::Reset as u16, ..Header::default() }
}

#[test]
fn no_stream_is_opened_before_the_guest_has_reset_the_old_ones() {
    let mut driver = restored(limits());
    assert_eq!(driver.completed(EVENT), Some((0, 4)));
    let _client = driver.client(1024);
    while driver.dispatch(Duration::from_millis(20)) > 0 {}
    request(&mut driver);
    assert!(driver.receive().is_none() && driver.announced().is_none(), "the guest would reset both at once");
    assert_eq!(driver.device.streams.len(), 1);
    // The guest has handled the event.
    post_event(&mut driver, 0);
    assert!(driver.wants_notification(EVENT));
    driver.notify(EVENT).unwrap();
    let mut seen = Vec::new();
    while let Some((header, ..)) = driver.receive() {
        seen.push(header.op);
    }
    seen.sort_unstable();
    assert_eq!(seen, [Op::Request as u16, Op::Response as u16]);
    assert!(driver.announced().is_some());
}

#[test]
fn a_guest_that_does_not_handle_the_event_is_waited_for_only_so_long() {
    let mut driver = restored(Limits { restore: Duration::from_millis(20), ..limits() });
    let _client = driver.client(1024);
    let start = std::time::Instant::now();
    while driver.receive().is_none() {
        assert!(start.elapsed() < PATIENCE, "waited for the REQUEST");
        driver.dispatch(Duration::from_millis(10));
    }
}

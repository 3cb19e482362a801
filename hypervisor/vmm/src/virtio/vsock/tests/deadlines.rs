//! Ends of streams that one side does not bring about, or not in time, and what the device keeps for whom.

use std::{
    io::{IoSlice, Read, Write},
    net::Shutdown as Direction,
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use event_manager::EventSet;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{
    driver::{Driver, PATIENCE, limits, watched},
    guest::Guest,
};
use crate::virtio::{
    VirtioDevice,
    vsock::{
        Limits, Source, TX,
        packet::{Op, Shutdown},
        streams::Ports,
    },
};

const SEND: Shutdown = Shutdown { receive: false, send: true };
const BOTH: Shutdown = Shutdown { receive: true, send: true };

#[test]
fn the_number_of_streams_follows_from_the_number_of_descriptors() {
    for (descriptors, streams) in [(u64::MAX, 1024), (1 << 20, 1024), (1024, 640), (256, 64), (0, 64)] {
        assert_eq!(Limits::within(descriptors).streams, streams);
    }
    let limits = Limits::within(1 << 20);
    assert_eq!(limits.guest_streams, 768);
}

#[test]
fn a_guest_cannot_take_the_places_of_the_hosts_clients() {
    let mut guest = Guest::with(Limits { streams: 8, guest_streams: 6, ..limits() });
    let ports: Vec<_> = (0..8).map(|_| guest.connect(1)).collect();
    let established = ports.iter().filter(|ports| guest.sockets[ports].established).count();
    assert_eq!(established, 6);
    let clients = [guest.open(3), guest.open(3)];
    // What ends makes room for the same side.
    guest.close(ports[0]);
    let again = guest.connect(1);
    assert!(guest.socket(again).established);
    drop(clients);
}

#[test]
fn a_client_that_leaves_before_the_guest_answers_is_noticed() {
    let mut driver = Guest::new().driver;
    for sees_request in [true, false] {
        let client = driver.client(1);
        let mut seen = Vec::new();
        let mut run = |driver: &mut Driver, done: &dyn Fn(&Driver, &[u16]) -> bool| {
            let start = Instant::now();
            while !done(driver, &seen) {
                assert!(start.elapsed() < PATIENCE, "saw {seen:?}");
                driver.dispatch(Duration::from_millis(10));
                seen.extend(std::iter::from_fn(|| driver.receive()).map(|(header, ..)| header.op));
            }
        };
        if sees_request {
            run(&mut driver, &|_, seen| !seen.is_empty());
        }
        drop(client);
        run(&mut driver, &|driver, seen| seen.len() == 2 && driver.device.streams.len() == 0);
        assert_eq!(seen, [Op::Request as u16, Op::Reset as u16]);
        assert_eq!(watched(&driver), 0);
    }
}

#[test]
fn the_hosts_end_is_sent_to_a_guest_that_has_no_room() {
    for (closes, over) in [(false, SEND), (true, BOTH)] {
        let mut guest = Guest::new();
        guest.window = 10;
        let (mut client, ports) = guest.open(3);
        client.write_all(&[7; 10]).unwrap();
        guest.run_until("the window to be full", |guest| guest.socket(ports).inbox.len() == 10);
        client.shutdown(if closes { Direction::Both } else { Direction::Write }).unwrap();
        guest.run_until("the end", |guest| guest.socket(ports).host_over == over);
        assert_eq!(guest.read(ports, 100), [7; 10]);
    }
}

#[test]
fn the_hosts_end_comes_behind_bytes_for_which_the_guest_has_no_room() {
    let mut guest = Guest::new();
    guest.window = 10;
    let (mut client, ports) = guest.open(3);
    client.write_all(&[7; 25]).unwrap();
    client.shutdown(Direction::Write).unwrap();
    let mut got = Vec::new();
    while got.len() < 25 {
        guest.run_until("bytes", |guest| !guest.socket(ports).inbox.is_empty());
        while guest.driver.dispatch(Duration::from_millis(5)) > 0 {}
        guest.take();
        let read = got.len() + guest.socket(ports).inbox.len();
        assert_eq!(guest.socket(ports).host_over.send, read == 25, "after {read} bytes");
        got.extend(guest.read(ports, 10));
    }
    assert_eq!(got, [7; 25]);
}

#[test]
fn a_guest_that_never_closes_is_not_waited_for() {
    let mut guest = Guest::with(Limits { close: Duration::from_millis(20), ..limits() });
    let (mut client, ports) = guest.open(3);
    client.write_all(b"last words").unwrap();
    drop(client);
    // Linux answers only when its program has read them.
    guest.run_until("the end", |guest| guest.socket(ports).host_over == BOTH);
    guest.run_until("the reset", |guest| guest.socket(ports).reset);
    assert_eq!((guest.driver.device.streams.len(), watched(&guest.driver)), (0, 0));
    assert_eq!(guest.read(ports, 100), b"last words");
}

#[test]
fn a_rest_of_the_listener_ends_in_its_own_time() {
    let mut driver = Driver::new(limits());
    let hour = Instant::now() + Duration::from_secs(3600);
    driver.device.listener.rest(hour, &mut driver.poll);
    let listens = |driver: &Driver| driver.poll.watched.values().any(|token| *token == Source::Listener.token());
    for _ in 0..3 {
        // The timer fires for something else.
        let token = Source::Timer.token();
        driver.call(|device, context| device.descriptor_ready(context, token, EventSet::IN)).unwrap();
        assert!(!listens(&driver));
    }
    driver.device.listener.rest(Instant::now(), &mut driver.poll);
    let token = Source::Timer.token();
    driver.call(|device, context| device.descriptor_ready(context, token, EventSet::IN)).unwrap();
    assert!(listens(&driver));
}

#[test]
fn a_client_that_cannot_be_watched_does_not_take_others_with_it() {
    let mut guest = Guest::new();
    guest.listening.push(3);
    let _served = [guest.driver.client(3), guest.driver.client(3)];
    // Its line is not complete, so it has to be watched.
    let mut partial = UnixStream::connect(&guest.driver.path).unwrap();
    partial.write_all(b"CONNECT 3").unwrap();
    guest.driver.poll.refused_adds = 1;
    guest.accept();
    guest.accept();
    assert_eq!(guest.driver.poll.refused_adds, 0);
    assert_eq!(partial.read(&mut [0]).unwrap(), 0, "refused");
    guest.open(3);
}

#[test]
fn bytes_behind_a_descriptor_are_not_forgotten() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(3);
    let fds = [client.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(&client, &[IoSlice::new(b"with")], &mut control, SendFlags::empty()).unwrap();
    client.write_all(b" and without").unwrap();
    guest.run_until("all bytes", |guest| guest.socket(ports).inbox == b"with and without");
}

#[test]
fn transmitted_chains_are_signalled_together_with_what_the_guest_gets() {
    let mut guest = Guest::new();
    let ports = guest.connect(1);
    let (_, mut socket) = guest.announced();
    guest.write(ports, b"ping");
    assert_eq!(guest.driver.device.quiet_chains, 1);
    socket.write_all(b"pong").unwrap();
    guest.run_until("pong", |guest| !guest.socket(ports).inbox.is_empty());
    assert_eq!((guest.driver.device.quiet_chains, guest.driver.device.signal_by), (0, None));
}

#[test]
fn a_turn_is_bounded_in_bytes() {
    let mut driver = Guest::new().driver;
    let stray = Ports { host: 5, guest: 6 };
    let header = super::super::packet::Header { op: Op::Reset as u16, ..Guest::new().packet(stray, Op::Data) };
    let header = super::super::packet::Header { len: 60_000, ..header };
    for _ in 0..40 {
        assert!(driver.try_send(&header, &[1; 60_000]));
    }
    driver.call(|device, context| device.queue_ready(context, TX)).unwrap();
    let taken = std::iter::from_fn(|| driver.completed(TX)).count();
    assert_eq!(taken, (1 << 20) / 60_044 + 1);
    driver.notify(TX).unwrap();
    assert_eq!(taken + std::iter::from_fn(|| driver.completed(TX)).count(), 40);
}

#[test]
fn a_refused_client_reads_the_end_of_file_whatever_it_sent_before() {
    let mut guest = Guest::new();
    let mut client = guest.driver.client(4711);
    client.write_all(&[1; 100_000]).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut byte = [0];
    guest.run_until("the refusal", |_| match client.read(&mut byte) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => false,
        read => {
            assert_eq!(read.expect("no ECONNRESET"), 0);
            true
        }
    });
}

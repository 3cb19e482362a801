//! The device against guests and host clients that mean harm, or do whatever comes to their mind.

use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    time::Duration,
};

use rustix::net::{AddressFamily, SocketType};

use super::{
    driver::{Driver, PATIENCE, fresh, limits, watched},
    guest::Guest,
};
use crate::virtio::vsock::{
    Limits, RX, TX,
    packet::{Header, Op},
    streams::Ports,
};

const NOWHERE: Ports = Ports { host: 5, guest: 6 };

/// Runs the machine until a host socket is at its end.
fn run_until_end(guest: &mut Guest, what: &str, socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.set_nonblocking(true).unwrap();
    guest.run_until(what, |_| match socket.read_to_end(&mut bytes) {
        Ok(_) => true,
        // A socket that was closed before everything was read from it.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    });
    bytes
}

#[test]
fn malformed_packets_are_dropped_and_counted() {
    let mut guest = Guest::new();
    let good = guest.packet(NOWHERE, Op::Data);
    guest.driver.send(&Header { src_cid: 4, ..good }, &[]);
    guest.driver.send(&Header { len: 11, ..good }, &[0; 10]);
    guest.driver.send(&Header { len: u32::MAX, ..good }, &[0; 10]);
    // A chain that ends within the header, an empty one, and one that the device could only write.
    for (len, flags) in [(43, 0), (0, 0), (64, 2)] {
        guest.driver.descriptor(TX, 255, 0x20_0000, len, flags, 0);
        guest.driver.offer(TX, 255);
        guest.driver.notify(TX).unwrap();
    }
    guest.take();
    assert_eq!((guest.driver.faults, guest.stray_resets), (6, 0));
    let ports = guest.connect(1);
    assert!(guest.socket(ports).established, "the device goes on");
}

#[test]
fn packets_for_nobody_are_refused_but_never_a_reset() {
    let mut guest = Guest::new();
    for op in 0..=9 {
        for (kind, dst_cid) in [(1, 2), (2, 2), (0xffff, 2), (1, 9), (1, u64::MAX)] {
            let known = kind == 1 && dst_cid == 2;
            if known && op == Op::Request as u16 {
                continue;
            }
            let header = Header { op, kind, dst_cid, ..guest.packet(NOWHERE, Op::Data) };
            guest.driver.send(&header, &[]);
            let answer = guest.driver.receive().map(|(header, ..)| header);
            let refusal = (op != Op::Reset as u16).then_some(Header {
                src_cid: dst_cid,
                dst_cid: 3,
                src_port: NOWHERE.host,
                dst_port: NOWHERE.guest,
                kind,
                op: Op::Reset as u16,
                ..Header::default()
            });
            assert_eq!(answer, refusal, "{header:?}");
        }
    }
    assert_eq!(guest.driver.device.streams.len(), 0);
}

#[test]
fn a_violation_ends_its_stream_after_what_came_before_it() {
    type Violation = fn(&Guest, Ports) -> (Header, usize);
    let violations: [Violation; 5] = [
        |guest, ports| (guest.packet(ports, Op::Request), 0),
        |guest, ports| (guest.packet(ports, Op::Response), 0),
        |guest, ports| (Header { op: 99, ..guest.packet(ports, Op::Data) }, 0),
        |guest, ports| (Header { op: 0, ..guest.packet(ports, Op::Data) }, 0),
        |guest, ports| (Header { len: 60_000, ..guest.packet(ports, Op::Data) }, 60_000),
    ];
    for (number, violation) in violations.into_iter().enumerate() {
        let mut guest = Guest::new();
        let (mut client, ports) = guest.open(3);
        let mut sent = b"before".to_vec();
        if number == 4 {
            // More than credit: what the socket does not take fills the window.
            sent = vec![7; 1 << 20];
            guest.write(ports, &sent);
            let left = guest.socket(ports).outbox.len();
            sent.truncate(sent.len() - left);
        } else {
            guest.write(ports, &sent);
        }
        let (header, len) = violation(&guest, ports);
        guest.driver.send(&header, &vec![9; len]);
        guest.take();
        assert!(guest.socket(ports).reset, "violation {number}");
        assert_eq!(guest.driver.faults, 1);
        let bytes = run_until_end(&mut guest, "the end of the stream", &mut client);
        assert!(bytes == sent, "violation {number}: {} of {} bytes", bytes.len(), sent.len());
        assert_eq!((guest.driver.device.streams.len(), watched(&guest.driver)), (0, 0));
    }
}

#[test]
fn a_flood_of_requests_costs_a_bounded_number_of_descriptors() {
    let mut guest = Guest::with(Limits { streams: 20, guest_streams: 15, ..limits() });
    for number in 0..500 {
        let ports = guest.connect(number);
        assert_eq!(guest.socket(ports).established, number < 15);
        assert!(watched(&guest.driver) <= 15);
    }
    // The parent takes none of them, so its socket fills up, even if the guest closes each stream again.
    let mut guest = Guest::new();
    let mut refused = 0;
    for number in 0..2000 {
        let ports = guest.connect(number);
        refused += u32::from(!guest.socket(ports).established);
        if guest.socket(ports).established {
            guest.abort(ports);
        }
    }
    assert!(refused > 1000, "{refused} refused");
    assert_eq!(guest.driver.device.streams.len(), 0);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut guest = Guest::new();
    guest.withhold = true;
    let mut sent = 0;
    for _ in 0..100_000 {
        let header = guest.packet(NOWHERE, Op::Data);
        if !guest.driver.try_send(&header, &[]) {
            break;
        }
        sent += 1;
        guest.driver.notify(TX).unwrap();
    }
    // 128 answers in its buffers, 256 refusals in the queue, 128 packets that were not taken.
    assert_eq!(sent, 128 + 256 + 128);
    guest.withhold = false;
    guest.run_until("all refusals", |guest| guest.stray_resets == 512);
    let ports = guest.connect(1);
    assert!(guest.socket(ports).established);
}

#[test]
fn receive_buffers_too_small_for_a_packet_are_returned_empty() {
    let mut guest = Guest::new();
    guest.withhold = true;
    for number in 0..128 {
        guest.driver.send(&Header { dst_port: number, ..guest.packet(NOWHERE, Op::Data) }, &[]);
    }
    while guest.driver.receive().is_some() {}
    // None, a header without room for data, a readable one.
    for (len, flags) in [(0, 2), (44, 2), (100, 0)] {
        guest.driver.descriptor(RX, 0, 0x20_0000, len, flags, 0);
        guest.driver.offer(RX, 0);
        guest.driver.send(&guest.packet(NOWHERE, Op::Data), &[]);
        assert_eq!(guest.driver.completed(RX), Some((0, 0)));
    }
    assert_eq!(guest.driver.faults, 3);
}

#[test]
fn a_guest_that_never_answers_loses_the_client() {
    let mut guest = Guest::with(Limits { handshake: Duration::from_millis(50), ..limits() });
    let mut client = guest.driver.client(1);
    let silent = guest.driver.client(2);
    drop(silent);
    // The guest's socket layer is not asked: it would refuse.
    client.set_nonblocking(true).unwrap();
    let mut seen = Vec::new();
    let start = std::time::Instant::now();
    while !matches!(client.read(&mut [0]), Ok(0)) || seen.len() < 4 {
        assert!(start.elapsed() < PATIENCE, "waited for the end of two streams, saw {seen:?}");
        guest.driver.dispatch(Duration::from_millis(10));
        seen.extend(std::iter::from_fn(|| guest.driver.receive()).map(|(header, ..)| header.op));
    }
    seen.sort_unstable();
    assert_eq!(seen, [Op::Request, Op::Request, Op::Reset, Op::Reset].map(|op| op as u16));
    assert_eq!((guest.driver.device.streams.len(), watched(&guest.driver)), (0, 0));
    // The device takes the next one, and its time begins anew.
    let (mut client, ports) = guest.open(3);
    guest.write(ports, b"x\n");
    assert_eq!(guest.read_line(&mut client), "x\n");
}

#[test]
fn clients_that_talk_nonsense_are_dropped() {
    let mut guest = Guest::new();
    for nonsense in
        ["GET / HTTP/1.0\r\n\r\n", "CONNECT 99999999999\n", "CONNECT 1x", "\0", "CONNECT 00000000000000000000"]
    {
        let mut client = UnixStream::connect(&guest.driver.path).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        assert_eq!(run_until_end(&mut guest, nonsense, &mut client), b"");
    }
    let mut client = UnixStream::connect(&guest.driver.path).unwrap();
    client.write_all(b"CONNECT 1").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(run_until_end(&mut guest, "half a line", &mut client), b"");
    assert_eq!((watched(&guest.driver), guest.count(Op::Request)), (0, 0));
}

#[test]
fn clients_that_never_finish_their_line_make_way_for_others() {
    // Eight may be unfinished.
    let mut guest = Guest::new();
    let mut slow: Vec<_> = (0..100).map(|_| UnixStream::connect(&guest.driver.path).unwrap()).collect();
    for client in &mut slow {
        client.write_all(b"CONNECT 1").unwrap();
    }
    guest.run_until("the last of them", |guest| guest.driver.dispatch(Duration::from_millis(20)) == 0);
    assert_eq!(watched(&guest.driver), 8);
    assert_eq!(run_until_end(&mut guest, "the oldest to be dropped", &mut slow[0]), b"");
    guest.open(3);

    let mut guest = Guest::with(Limits { handshake: Duration::from_millis(50), ..limits() });
    let mut client = UnixStream::connect(&guest.driver.path).unwrap();
    assert_eq!(run_until_end(&mut guest, "the time limit", &mut client), b"");
    assert_eq!(watched(&guest.driver), 0);
}

#[test]
fn a_listener_that_cannot_accept_rests_between_attempts() {
    // Stands for a process without descriptors: epoll finds this socket ready for ever, and accept fails.
    let directory = tempfile::tempdir().unwrap();
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let listener = socket.as_raw_fd();
    let mut driver = Driver::with_listener(fresh(), limits(), directory, socket);
    for _ in 0..3 {
        assert_eq!(driver.dispatch(PATIENCE), 1);
        assert!(!driver.poll.watched.contains_key(&listener), "an attempt, then rest");
        assert_eq!(driver.dispatch(PATIENCE), 1);
        assert!(driver.poll.watched.contains_key(&listener), "the timer ends the rest");
    }
}

/// Arbitrary rings: not only arbitrary descriptors, but indices that jump.
#[test]
fn an_available_index_that_ran_away_stops_the_device() {
    let mut driver = Driver::new(limits());
    driver.set_available(TX, 1000);
    assert!(driver.notify(TX).is_err());
}

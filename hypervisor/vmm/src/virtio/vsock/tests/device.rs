//! The device between a guest and real sockets: everything that well-behaved ends may do.

use std::{
    hash::{DefaultHasher, Hasher},
    io::{Read, Write},
    net::Shutdown as Direction,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use super::{
    driver::{Driver, RX_PAYLOAD, fresh, limits},
    guest::Guest,
};
use crate::virtio::vsock::{
    EVENT, Limits, TX, VsockState,
    packet::{Op, Shutdown},
    streams::{FIRST_HOST_PORT, Ports},
};

const SEND: Shutdown = Shutdown { receive: false, send: true };
const RECEIVE: Shutdown = Shutdown { receive: true, send: false };
const BOTH: Shutdown = Shutdown { receive: true, send: true };
const MIB: usize = 1 << 20;

/// Bytes that differ everywhere, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn read_to_end(mut socket: UnixStream) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn is_at_end(socket: &mut UnixStream) -> bool {
    matches!(socket.read(&mut [0]), Ok(0))
}

#[test]
fn a_host_client_talks_with_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(1024);
    assert_eq!(ports.host, FIRST_HOST_PORT);
    client.write_all(b"hello guest").unwrap();
    guest.run_until("the host's words", |guest| guest.socket(ports).inbox.len() == 11);
    assert_eq!(guest.read(ports, 100), b"hello guest");
    guest.write(ports, b"hello host\n");
    assert_eq!(guest.read_line(&mut client), "hello host\n");
}

#[test]
fn a_guest_talks_with_the_parent() {
    let mut guest = Guest::new();
    let ports = guest.connect(77);
    assert!(guest.socket(ports).established, "answered in the call that brought the REQUEST");
    let (stream, mut socket) = guest.announced();
    assert_eq!((stream.host_port, stream.guest_port), (77, ports.guest));
    guest.write(ports, b"ready\n");
    let mut line = [0; 6];
    socket.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    socket.write_all(b"go on").unwrap();
    guest.run_until("the parent's words", |guest| guest.socket(ports).inbox.len() == 5);
    assert_eq!(guest.read(ports, 100), b"go on");
}

#[test]
fn what_a_client_sends_behind_its_line_reaches_the_guest() {
    let mut guest = Guest::new();
    guest.listening.push(9);
    let mut client = UnixStream::connect(&guest.driver.path).unwrap();
    client.write_all(b"CONNECT 9\nearly bird").unwrap();
    client.shutdown(Direction::Write).unwrap();
    let ports = guest.accept();
    guest.run_until("the end of the stream", |guest| guest.socket(ports).host_over == SEND);
    assert_eq!(guest.read(ports, 100), b"early bird");
    guest.write(ports, b"late worm");
    guest.close(ports);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, format!("OK {FIRST_HOST_PORT}\nlate worm"));
    assert_eq!(guest.driver.device.streams.len(), 0);
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    guest.listening.push(1024);
    let mut client = UnixStream::connect(&guest.driver.path).unwrap();
    for piece in ["CON", "NECT 10", "24", "\n"] {
        assert!(guest.accepted.is_empty());
        client.write_all(piece.as_bytes()).unwrap();
        guest.run_until("an event for the piece", |guest| guest.driver.dispatch(Duration::from_millis(10)) > 0);
    }
    guest.accept();
}

/// Sends 64 MiB through a stream in both directions at once and compares digests.
#[test]
fn many_bytes_arrive_unchanged_both_ways() {
    const TOTAL: usize = 64 * MIB;
    let digest = |seed| {
        let mut hasher = DefaultHasher::new();
        (0..TOTAL / MIB).for_each(|piece| hasher.write(&noise(seed + piece as u64, MIB)));
        hasher.finish()
    };
    let mut guest = Guest::new();
    let (client, ports) = guest.open(5);
    let mut writer = client.try_clone().unwrap();
    let sending = thread::spawn(move || {
        (0..TOTAL / MIB).for_each(|piece| writer.write_all(&noise(1000 + piece as u64, MIB)).unwrap());
        writer.shutdown(Direction::Write).unwrap();
    });
    let mut reader = client;
    let receiving = thread::spawn(move || {
        let (mut hasher, mut count, mut buffer) = (DefaultHasher::new(), 0, vec![0; MIB]);
        while count < TOTAL {
            // A hasher is fed in the same pieces as at the other end.
            reader.read_exact(&mut buffer).unwrap();
            hasher.write(&buffer);
            count += buffer.len();
        }
        assert!(is_at_end(&mut reader), "nothing behind the last byte");
        hasher.finish()
    });
    let (mut hasher, mut pending, mut read, mut written) = (DefaultHasher::new(), Vec::new(), 0, 0);
    guest.run_until("64 MiB both ways", |guest| {
        let bytes = guest.read(ports, usize::MAX);
        read += bytes.len();
        pending.extend(bytes);
        while pending.len() >= MIB {
            hasher.write(&pending[..MIB]);
            pending.drain(..MIB);
        }
        if written < TOTAL / MIB && guest.socket(ports).outbox.is_empty() {
            guest.write(ports, &noise(written as u64, MIB));
            written += 1;
            if written == TOTAL / MIB {
                guest.shutdown(ports, SEND);
            }
        }
        read == TOTAL && receiving.is_finished()
    });
    sending.join().unwrap();
    assert_eq!(receiving.join().unwrap(), digest(0));
    assert_eq!(hasher.finish(), digest(1000));
}

#[test]
fn five_hundred_streams_live_side_by_side() {
    let mut guest = Guest::new();
    guest.listening.push(1);
    let mut clients = Vec::new();
    for number in 0..250u64 {
        let (client, ports) = guest.open(1);
        clients.push((client, ports, number));
        let ports = guest.connect(2);
        let (_, socket) = guest.announced();
        clients.push((socket, ports, 1000 + number));
    }
    assert_eq!(guest.driver.device.streams.len(), 500);
    let mut echoes = Vec::new();
    for (socket, ports, number) in clients {
        let mut writer = socket.try_clone().unwrap();
        writer.write_all(&noise(number, 3000)).unwrap();
        writer.shutdown(Direction::Write).unwrap();
        echoes.push((socket, ports, number));
    }
    for (_, ports, _) in &echoes {
        guest.run_until("a stream's end", |guest| guest.socket(*ports).host_over == SEND);
        let bytes = guest.read(*ports, usize::MAX);
        guest.write(*ports, &bytes);
        guest.close(*ports);
    }
    for (socket, _, number) in echoes {
        assert!(read_to_end(socket).join().unwrap() == noise(number, 3000), "stream {number}");
    }
    assert_eq!(guest.driver.device.streams.len(), 0);
    // The listener and the timer are left.
    assert_eq!(guest.driver.poll.watched.len(), 2);
}

#[test]
fn the_guest_may_finish_sending_and_still_receive() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(3);
    guest.write(ports, b"question");
    guest.shutdown(ports, SEND);
    let mut question = String::new();
    client.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    client.write_all(b"answer").unwrap();
    guest.run_until("the answer", |guest| guest.socket(ports).inbox == b"answer");
    drop(client);
    guest.run_until("the end", |guest| guest.socket(ports).host_over.send);
    guest.close(ports);
    assert_eq!(guest.driver.device.streams.len(), 0);
}

#[test]
fn the_host_may_finish_sending_and_still_receive() {
    let mut guest = Guest::new();
    let (client, ports) = guest.open(3);
    client.shutdown(Direction::Write).unwrap();
    guest.run_until("the end", |guest| guest.socket(ports).host_over == SEND);
    let reading = read_to_end(client);
    guest.write(ports, &noise(1, MIB));
    guest.close(ports);
    guest.run_until("the host to read all", |_| reading.is_finished());
    assert!(reading.join().unwrap() == noise(1, MIB));
    assert_eq!(guest.driver.device.streams.len(), 0);
}

#[test]
fn a_guest_that_will_not_receive_fails_the_hosts_writes() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(3);
    guest.shutdown(ports, RECEIVE);
    assert_eq!(client.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.write(ports, b"still talking");
    guest.close(ports);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still talking");
}

#[test]
fn bytes_of_a_guest_that_closed_reach_a_slow_reader() {
    for end in [Guest::close as fn(&mut Guest, Ports), Guest::abort] {
        let mut guest = Guest::new();
        let (client, ports) = guest.open(3);
        // More than the socket takes at once, less than credit.
        guest.write(ports, &noise(7, 300 * 1024));
        assert!(guest.socket(ports).outbox.is_empty(), "all of it was sent");
        end(&mut guest, ports);
        assert_eq!(guest.driver.device.streams.len(), 1, "it waits for the reader");
        assert_eq!(guest.driver.device.streams.find(ports), None, "its ports are free");
        client.set_nonblocking(false).unwrap();
        let reading = read_to_end(client);
        guest.run_until("the reader to get all", |_| reading.is_finished());
        assert!(reading.join().unwrap() == noise(7, 300 * 1024));
        assert_eq!(guest.driver.device.streams.len(), 0);
    }
}

#[test]
fn bytes_of_a_host_that_closed_reach_a_slow_guest() {
    let mut guest = Guest::new();
    guest.window = 1000;
    let (mut client, ports) = guest.open(3);
    client.write_all(&noise(9, 100_000)).unwrap();
    drop(client);
    let mut got = Vec::new();
    guest.run_until("all of it and the end", |guest| {
        assert!(guest.socket(ports).inbox.len() <= 1000);
        got.extend(guest.read(ports, 300));
        guest.socket(ports).host_over == BOTH
    });
    got.extend(guest.read(ports, usize::MAX));
    assert!(got == noise(9, 100_000));
    guest.close(ports);
}

#[test]
fn a_host_that_closes_while_the_guest_sends_stops_it() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(3);
    guest.write(ports, &noise(1, 2 * MIB));
    assert!(!guest.socket(ports).outbox.is_empty(), "credit is used up");
    client.read_exact(&mut [0; 1000]).unwrap();
    drop(client);
    guest.run_until("the news", |guest| guest.socket(ports).host_over == BOTH || guest.socket(ports).reset);
    guest.run_until("the end of the stream", |guest| guest.driver.device.streams.len() == 0);
    assert_eq!(guest.driver.faults, 0);
}

#[test]
fn a_refused_client_reads_the_end_of_file() {
    let mut guest = Guest::new();
    let client = guest.driver.client(4711);
    let reading = read_to_end(client);
    guest.run_until("the refusal", |_| reading.is_finished());
    assert_eq!(reading.join().unwrap(), b"");
    assert_eq!((guest.count(Op::Request), guest.driver.device.streams.len()), (1, 0));
}

#[test]
fn a_parent_may_refuse_by_closing_or_be_gone() {
    let mut guest = Guest::new();
    let ports = guest.connect(77);
    drop(guest.announced());
    guest.run_until("the end", |guest| guest.socket(ports).reset);
    assert_eq!(guest.driver.device.streams.len(), 0);
    guest.driver.parent = None;
    let ports = guest.connect(78);
    assert!(guest.socket(ports).reset && !guest.socket(ports).established);
}

#[test]
fn a_stalled_reader_stalls_its_own_stream_only() {
    let mut guest = Guest::new();
    let (stalled, first) = guest.open(3);
    let (mut lively, second) = guest.open(3);
    guest.write(first, &noise(1, 4 * MIB));
    let left = guest.socket(first).outbox.len();
    assert!(left > 0, "credit ends before the bytes do");
    for round in 0..100u8 {
        guest.write(second, &[round; 5000]);
        let mut bytes = [0; 5000];
        lively.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [round; 5000]);
    }
    assert_eq!(guest.socket(first).outbox.len(), left);
    guest.close(first);
    let reading = read_to_end(stalled);
    guest.run_until("the stalled reader to catch up", |_| reading.is_finished());
    assert!(reading.join().unwrap() == noise(1, 4 * MIB));
}

#[test]
fn a_chatty_host_leaves_every_other_stream_its_turn() {
    let mut guest = Guest::new();
    guest.window = u32::MAX;
    let streams: Vec<_> = (0..4).map(|_| guest.open(3)).collect();
    guest.withhold = true;
    let bytes = noise(0, MIB);
    streams[0].0.set_nonblocking(true).unwrap();
    guest.run_until("the first stream to fill the guest's buffers and its socket", |guest| {
        let full = (&streams[0].0).write(&bytes).is_err();
        guest.driver.dispatch(Duration::ZERO) == 0 && full
    });
    for (client, _) in &streams[1..] {
        (&*client).write_all(b"me too").unwrap();
    }
    guest.run_until("silence", |guest| guest.driver.dispatch(Duration::from_millis(10)) == 0);
    guest.post();
    let mut packets = Vec::new();
    while let Some((header, ..)) = guest.driver.receive() {
        packets.push(header.src_port);
    }
    for (_, ports) in &streams[1..] {
        let turn = packets.iter().position(|port| *port == ports.host).expect("a packet");
        assert!(turn <= 4, "only after {turn} others: {packets:?}");
    }
    assert!(packets.len() > 10, "the first stream had more");
}

#[test]
fn without_receive_buffers_the_device_sleeps_and_then_goes_on() {
    let mut guest = Guest::new();
    guest.window = u32::MAX;
    let (mut client, ports) = guest.open(3);
    guest.withhold = true;
    client.set_nonblocking(true).unwrap();
    let bytes = noise(3, 8 * MIB);
    let mut written = 0;
    guest.run_until("the socket to be full", |guest| {
        match client.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        guest.driver.dispatch(Duration::from_millis(5)) == 0 && client.write(&[]).is_ok() && written > 500_000
    });
    guest.take();
    let taken = guest.socket(ports).inbox.len();
    assert!(taken <= 128 * RX_PAYLOAD);
    for _ in 0..3 {
        assert_eq!(guest.driver.dispatch(Duration::from_millis(5)), 0, "nothing wakes the device");
    }
    guest.withhold = false;
    // Panics if the driver was not asked to notify: the device would wait for ever.
    guest.run_until("the rest", |guest| guest.socket(ports).inbox.len() == written);
    assert!(guest.socket(ports).inbox == bytes[..written]);
}

#[test]
fn the_guest_is_interrupted_only_for_what_it_gets() {
    let mut guest = Guest::new();
    let before = guest.driver.interrupts;
    let ports = guest.connect(1);
    assert_eq!(guest.driver.interrupts - before, 1, "the RESPONSE");
    let (_, mut socket) = guest.announced();
    guest.write(ports, b"ping");
    socket.read_exact(&mut [0; 4]).unwrap();
    // A reader that reads does not wake the device.
    assert_eq!(guest.driver.dispatch(Duration::from_millis(20)), 0);
    assert_eq!(guest.driver.interrupts - before, 1);
    socket.write_all(b"pong").unwrap();
    guest.run_until("pong", |guest| !guest.socket(ports).inbox.is_empty());
    assert_eq!(guest.driver.interrupts - before, 2);
    assert_eq!(guest.count(Op::CreditUpdate), 0);
    // Buffers do come back before the driver runs out of them.
    (0..70).for_each(|_| guest.write(ports, b"x"));
    assert_eq!(guest.driver.interrupts - before, 4);
}

#[test]
fn a_driver_that_only_sends_gets_its_buffers_back_in_time() {
    let mut guest = Guest::with(Limits { quiet: Duration::from_millis(5), ..limits() });
    let ports = guest.connect(1);
    for _ in 0..3 {
        let before = guest.driver.interrupts;
        guest.write(ports, b"x");
        assert_eq!(guest.driver.interrupts, before);
        guest.run_until("the interrupt", |guest| guest.driver.interrupts > before);
        assert_eq!(guest.driver.interrupts, before + 1);
        assert_eq!(guest.driver.dispatch(Duration::from_millis(20)), 0, "one is enough");
        // The driver frees them.
        while guest.driver.completed(TX).is_some() {}
    }
}

#[test]
fn credit_comes_back_before_the_guest_runs_dry() {
    let mut guest = Guest::new();
    let (client, ports) = guest.open(3);
    let mut reader = client;
    let reading = thread::spawn(move || reader.read_exact(&mut vec![0; 8 * MIB]).unwrap());
    let mut rounds = 0;
    guest.run_until("8 MiB", |guest| {
        if rounds < 128 && guest.socket(ports).outbox.is_empty() {
            guest.write(ports, &noise(rounds, 64 * 1024));
            rounds += 1;
        }
        reading.is_finished()
    });
    let updates = guest.count(Op::CreditUpdate);
    // 8 MiB are 64 halves of the window.
    assert!((1..=64).contains(&updates), "{updates} updates");
}

#[test]
fn a_window_that_ran_out_is_asked_about_once() {
    let mut guest = Guest::new();
    guest.window = 10_000;
    let (mut client, ports) = guest.open(3);
    client.write_all(&noise(1, 50_000)).unwrap();
    guest.run_until("the window to be full", |guest| guest.socket(ports).inbox.len() == 10_000);
    guest.run_until("the question", |guest| guest.socket(ports).credit_requests == 1);
    while guest.driver.dispatch(Duration::from_millis(10)) > 0 {}
    guest.take();
    assert_eq!(guest.socket(ports).credit_requests, 1);
    let mut got = Vec::new();
    guest.run_until("all of it", |guest| {
        got.extend(guest.read(ports, 700));
        got.len() == 50_000
    });
    assert!(got == noise(1, 50_000));
    assert!(guest.socket(ports).credit_requests <= 10, "not for every crumb");
}

#[test]
fn host_ports_of_live_streams_are_not_given_again() {
    let state = VsockState { next_host_port: u32::MAX - 1, ..fresh() };
    let mut guest = Guest::with_state(state, limits());
    let (_a, last) = guest.open(3);
    assert_eq!(last.host, u32::MAX - 1);
    let taken = guest.connect(FIRST_HOST_PORT);
    let (_b, next) = guest.open(4);
    assert_eq!(next.host, FIRST_HOST_PORT + 1, "{taken:?} is in use, {} names no port", u32::MAX);
    assert_eq!(guest.driver.device.save().next_host_port, FIRST_HOST_PORT + 2);
}

#[test]
fn the_table_is_bounded_for_both_sides() {
    let mut guest = Guest::with(Limits { streams: 4, ..limits() });
    let _clients: Vec<_> = (0..2).map(|_| guest.open(3)).collect();
    let ports: Vec<_> = (0..4).map(|_| guest.connect(1)).collect();
    let established = ports.iter().filter(|ports| guest.sockets[ports].established).count();
    assert_eq!(established, 2);
    assert!(guest.socket(ports[3]).reset);
    let reading = read_to_end(guest.driver.client(3));
    guest.run_until("the refusal", |_| reading.is_finished());
    assert_eq!(reading.join().unwrap(), b"");
}

#[test]
fn a_restored_guest_gets_the_event_that_its_streams_are_gone() {
    let state = Driver::new(limits()).device.save();
    let bytes = caisson_protos::monitor::encode(&state).unwrap();
    let state = VsockState { owes_transport_reset: true, ..caisson_protos::monitor::decode(&bytes).unwrap() };
    let mut driver = Driver::with_state(state, limits());
    assert!(driver.device.save().owes_transport_reset, "there was no buffer to say it in");
    driver.descriptor(EVENT, 0, 0x5_0000, 4, 2, 0);
    driver.memory_mut(0x5_0000, &[0xff; 4]);
    driver.offer(EVENT, 0);
    assert!(driver.wants_notification(EVENT));
    driver.notify(EVENT).unwrap();
    assert_eq!(driver.completed(EVENT), Some((0, 4)));
    assert_eq!(driver.memory_at(0x5_0000, 4), [0; 4]);
    assert!(!driver.device.save().owes_transport_reset);
}

#[test]
fn a_reset_device_lets_go_of_everything_and_can_begin_anew() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.open(3);
    let ports = guest.connect(1);
    let (_, mut socket) = guest.announced();
    let mut unfinished = UnixStream::connect(&guest.driver.path).unwrap();
    guest.run_until("the unfinished client", |guest| guest.driver.poll.watched.len() == 5);
    guest.driver.reset();
    assert!(guest.driver.poll.watched.is_empty());
    assert!(is_at_end(&mut client) && is_at_end(&mut socket) && is_at_end(&mut unfinished));
    guest.sockets.remove(&ports);
    guest.driver.activate();
    let (mut client, ports) = guest.open(3);
    guest.write(ports, b"again\n");
    assert_eq!(guest.read_line(&mut client), "again\n");
}

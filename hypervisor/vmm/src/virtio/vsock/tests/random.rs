//! The device under everything that may happen in any order: noise from guest and host, and honest ends of streams.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use proptest::prelude::*;

use super::{
    driver::{Driver, limits, watched},
    guest::Guest,
};
use crate::virtio::vsock::{
    EVENT, Limits, TX,
    packet::{HEADER_LEN, Header, Shutdown},
    streams::Ports,
};

#[derive(Clone, Debug)]
enum Noise {
    /// A descriptor in a queue: address, length, flags, next.
    Descriptor(usize, u16, u64, u32, u16, u16),
    /// A chain made available.
    Offer(usize, u16),
    /// A well-formed chain with any header.
    Packet(Header, usize),
    Client(Vec<u8>),
    Dispatch,
}

fn noise() -> impl Strategy<Value = Noise> {
    let address = prop_oneof![8 => 0x10_0000..0x20_0000u64, 1 => any::<u64>(), 1 => 0x1ff_ff00..0x200_0100u64];
    let len = prop_oneof![8 => 0..9000u32, 1 => any::<u32>()];
    let flags = prop_oneof![0..4u16, 0..8u16];
    let port = || prop_oneof![0..3u32, 0x4000_0000..0x4000_0004u32];
    let header = (
        prop_oneof![9 => 1..8u16, 1 => any::<u16>()],
        port(),
        0..3u32,
        prop_oneof![0..6000u32, any::<u32>()],
        any::<u32>(),
        prop_oneof![Just(0), 0..5000u32, any::<u32>()],
        prop_oneof![9 => Just(1u16), 1 => any::<u16>()],
        prop_oneof![9 => Just(3u64), 1 => any::<u64>()],
    )
        .prop_map(|(op, dst_port, src_port, len, flags, credit, kind, src_cid)| Header {
            src_cid,
            dst_cid: 2,
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc: credit,
            fwd_cnt: credit / 2,
        });
    prop_oneof![
        2 => (0..3usize, 0..16u16, address, len, flags, 0..20u16)
            .prop_map(|(queue, index, address, len, flags, next)| Noise::Descriptor(queue, index, address, len, flags, next)),
        2 => (0..3usize, 0..16u16).prop_map(|(queue, head)| Noise::Offer(queue, head)),
        8 => (header, 0..6000usize).prop_map(|(header, len)| Noise::Packet(header, len)),
        2 => prop_oneof![
            (0..3u32).prop_map(|port| format!("CONNECT {port}\n hello").into_bytes()),
            proptest::collection::vec(any::<u8>(), 0..30),
        ].prop_map(Noise::Client),
        3 => Just(Noise::Dispatch),
    ]
}

fn make_noise(steps: Vec<Noise>) {
    let mut driver = Driver::new(Limits { streams: 6, greetings: 3, ..limits() });
    (8..100).for_each(|slot| driver.post(slot));
    let mut clients = Vec::new();
    for step in steps {
        let result = match step {
            Noise::Descriptor(queue, index, address, len, flags, next) => {
                driver.descriptor(queue, index, address, len, flags, next);
                Ok(())
            }
            Noise::Offer(queue, head) => {
                driver.offer(queue, head % if queue == EVENT { 8 } else { 16 });
                driver.notify(queue)
            }
            Noise::Packet(header, len) => {
                let at = 0x30_0000;
                driver.memory_mut(at, &header.to_bytes());
                driver.descriptor(TX, 200, at, HEADER_LEN as u32, 1, 201);
                driver.descriptor(TX, 201, at + HEADER_LEN as u64, len as u32, 0, 0);
                driver.offer(TX, 200);
                driver.notify(TX)
            }
            Noise::Client(bytes) => {
                let mut client = UnixStream::connect(&driver.path).unwrap();
                client.write_all(&bytes).unwrap();
                clients.push(client);
                Ok(())
            }
            Noise::Dispatch => {
                while driver.try_dispatch(Duration::ZERO).is_ok_and(|count| count > 0) {}
                Ok(())
            }
        };
        while let Some((_, socket)) = driver.announced() {
            clients.push(socket);
        }
        assert!(driver.device.streams.len() <= 6 && watched(&driver) <= 9);
        if result.is_err() {
            // The transport does this.
            driver.reset();
            assert!(driver.poll.watched.is_empty());
            return;
        }
    }
}

/// What two honest ends do with a stream.
#[derive(Clone, Copy, Debug)]
enum Step {
    GuestWrites(usize),
    GuestReads(usize),
    GuestShuts(Shutdown),
    HostWrites(usize),
    HostReads(usize),
    HostFinishes,
    HostCloses,
    Withhold(bool),
    Dispatch,
}

fn honest_step() -> impl Strategy<Value = (usize, Step)> {
    let size = || prop_oneof![1..100usize, 1..50_000usize, 100_000..400_000usize];
    let shut = prop_oneof![Just((false, true)), Just((true, false)), Just((true, true))];
    let step = prop_oneof![
        6 => size().prop_map(Step::GuestWrites),
        6 => size().prop_map(Step::GuestReads),
        1 => shut.prop_map(|(receive, send)| Step::GuestShuts(Shutdown { receive, send })),
        6 => size().prop_map(Step::HostWrites),
        6 => size().prop_map(Step::HostReads),
        1 => Just(Step::HostFinishes),
        1 => Just(Step::HostCloses),
        2 => any::<bool>().prop_map(Step::Withhold),
        6 => Just(Step::Dispatch),
    ];
    (0..3usize, step)
}

/// One stream as its two users see it: what each wrote and what each read, as counts of one known sequence of bytes.
struct Pair {
    ports: Ports,
    host: Option<UnixStream>,
    guest_wrote: usize,
    host_read: usize,
    host_wrote: usize,
    guest_read: usize,
    guest_over: Shutdown,
    host_finished: bool,
    host_at_end: bool,
}

fn byte(position: usize, salt: u8) -> u8 {
    (position as u8) ^ (position >> 8) as u8 ^ (position >> 16) as u8 ^ salt
}

impl Pair {
    fn host_reads(&mut self, max: usize) {
        let Some(host) = &mut self.host else { return };
        let mut bytes = vec![0; max];
        match host.read(&mut bytes) {
            Ok(0) => self.host_at_end = true,
            Ok(count) => {
                for byte_read in &bytes[..count] {
                    assert_eq!(*byte_read, byte(self.host_read, 0x55), "byte {} to the host", self.host_read);
                    self.host_read += 1;
                }
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.host_at_end = true,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn guest_reads(&mut self, guest: &mut Guest, max: usize) {
        for byte_read in guest.read(self.ports, max) {
            assert_eq!(byte_read, byte(self.guest_read, 0xaa), "byte {} to the guest", self.guest_read);
            self.guest_read += 1;
        }
    }

    fn step(&mut self, guest: &mut Guest, step: Step) {
        let socket = guest.socket(self.ports);
        let reset = socket.reset;
        match step {
            Step::GuestWrites(len) if !reset && !self.guest_over.send && socket.outbox.len() < 500_000 => {
                let bytes: Vec<u8> = (self.guest_wrote..self.guest_wrote + len).map(|at| byte(at, 0x55)).collect();
                self.guest_wrote += len;
                guest.write(self.ports, &bytes);
            }
            Step::GuestReads(max) => self.guest_reads(guest, max),
            Step::GuestShuts(what) if !reset => {
                self.guest_over = self.guest_over.union(what);
                guest.shutdown(self.ports, what);
            }
            Step::HostWrites(len) if !self.host_finished => {
                let Some(host) = &mut self.host else { return };
                let bytes: Vec<u8> = (self.host_wrote..self.host_wrote + len).map(|at| byte(at, 0xaa)).collect();
                match host.write(&bytes) {
                    Ok(count) => self.host_wrote += count,
                    Err(error) => assert!(matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
                    )),
                }
            }
            Step::HostReads(max) => self.host_reads(max),
            Step::HostFinishes => {
                self.host_finished = true;
                if let Some(host) = &self.host {
                    let _ = host.shutdown(std::net::Shutdown::Write);
                }
            }
            Step::HostCloses => {
                self.host_finished = true;
                self.host = None;
            }
            Step::Withhold(withhold) => guest.withhold = withhold,
            Step::Dispatch => {
                guest.driver.dispatch(Duration::ZERO);
                guest.take();
            }
            _ => {}
        }
    }
}

fn live_honestly(steps: Vec<(usize, Step)>) {
    let mut guest = Guest::new();
    let mut pairs = Vec::new();
    for number in 0..3 {
        let (host, ports) = if number == 1 {
            let ports = guest.connect(1);
            (guest.announced().1, ports)
        } else {
            guest.open(3)
        };
        host.set_nonblocking(true).unwrap();
        pairs.push(Pair {
            ports,
            host: Some(host),
            guest_wrote: 0,
            host_read: 0,
            host_wrote: 0,
            guest_read: 0,
            guest_over: Shutdown::default(),
            host_finished: false,
            host_at_end: false,
        });
    }
    for (index, step) in steps {
        pairs[index].step(&mut guest, step);
    }
    // Everybody finishes and reads to the end.
    guest.withhold = false;
    for pair in &mut pairs {
        pair.step(&mut guest, Step::GuestShuts(Shutdown { receive: false, send: true }));
        if !pair.host_finished {
            pair.step(&mut guest, Step::HostFinishes);
        }
    }
    for pair in &mut pairs {
        guest.run_until("both ends of a stream to see its end", |guest| {
            pair.host_reads(100_000);
            pair.guest_reads(guest, 100_000);
            let socket = guest.socket(pair.ports);
            let guest_at_end = socket.reset || socket.host_over.send || pair.guest_over.receive;
            guest_at_end && socket.inbox.is_empty() && (pair.host.is_none() || pair.host_at_end)
        });
        if pair.host.is_some() {
            assert_eq!(pair.host_read, pair.guest_wrote, "the host read all that the guest wrote");
        }
        if !pair.guest_over.receive {
            assert_eq!(pair.guest_read, pair.host_wrote, "the guest read all that the host wrote");
        }
        if !guest.socket(pair.ports).reset {
            guest.close(pair.ports);
        }
        pair.host = None;
    }
    guest.run_until("the last stream to end", |guest| guest.driver.device.streams.len() == 0);
    assert_eq!((watched(&guest.driver), guest.driver.faults), (0, 0));
}

proptest! {
    #[test]
    fn no_guest_and_no_client_breaks_the_device(steps in proptest::collection::vec(noise(), 0..80)) {
        make_noise(steps);
    }

}

proptest! {
    // These move megabytes through sockets.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn honest_ends_get_their_bytes_in_any_order_of_events(
        steps in proptest::collection::vec(honest_step(), 0..60),
    ) {
        live_honestly(steps);
    }
}

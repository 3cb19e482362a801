//! Network devices: a Linux guest talks to sockets of the host through a tap, in a network namespace of the test's own.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    thread,
};

use caisson_protos::monitor::{AllowedSources, ExitReason, NetworkStats, RateLimit, TokenBucket};
use caisson_vm_tests::{
    environment::LIMIT,
    linux::{Guest, fact, scenario},
    monitor::read_until,
    tap,
};
use caisson_vmm_client::Network;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const PORT: u16 = 4000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MIB: usize = 1 << 20;

/// A tap in a new network namespace, in which this thread and those that it starts are from now on.
fn tap(queues: usize, mtu: u16) -> Vec<OwnedFd> {
    tap::enter_namespace();
    tap::create("tap0", queues, mtu, HOST)
}

fn network(taps: Vec<OwnedFd>, mtu: u16) -> Network {
    let (send_limit, receive_limit) = (RateLimit::default(), RateLimit::default());
    Network { taps, mac: MAC, mtu, send_limit, receive_limit, sources: None }
}

/// A guest that listens, and what it said of its card.
fn start(network: Network) -> (Guest, String) {
    let (mut machine, console) = scenario("network");
    machine.vcpus = 2;
    machine.memory.size = 256 << 20;
    machine.networks = vec![network];
    let mut guest = Guest::start((machine, console));
    let said = read_until(&mut guest.console, "the guest's listener", |text| {
        text.contains("guest: ready now") || text.contains("guest: failed")
    });
    assert!(said.contains("ready now"), "the guest said:\n{said}");
    (guest, said)
}

fn connect(wish: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect((GUEST, PORT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(wish).unwrap();
    stream
}

/// Sends bytes that differ with `seed` and gets them back.
fn echo(seed: usize, len: usize) {
    let sent: Vec<u8> = (0..len).map(|n| ((n + seed) % 251) as u8).collect();
    let mut stream = connect(b"e");
    let mut writer = stream.try_clone().unwrap();
    let (copy, mut received) = (sent.clone(), Vec::new());
    let sender = thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    stream.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert!(received == sent, "{len} bytes came back changed");
}

/// Ends the guest; gives what its device has moved.
fn end(mut guest: Guest) -> NetworkStats {
    let stats = guest.monitor.stats();
    assert_eq!(stats.guest_faults, 0);
    let [network] = *Vec::from_iter(stats.networks.into_values()) else { panic!("not one network device") };
    connect(b"q");
    let said = guest.verdict();
    assert!(said.contains("guest: passed"), "the guest said:\n{said}");
    assert_eq!(guest.monitor.exit_reason(), ExitReason::PoweredOff);
    network
}

#[test]
fn a_guest_and_the_host_talk_in_all_sizes() {
    let (guest, said) = start(network(tap(2, 1500), 1500));
    assert_eq!(fact(&said, "address"), "02:00:00:00:00:01");
    assert_eq!(["mtu", "carrier", "type", "queues"].map(|name| fact(&said, name)), ["1500", "1", "1", "2"]);
    echo(0, 1);
    let many: Vec<_> = (0..4).map(|seed| thread::spawn(move || echo(seed, 4 * MIB))).collect();
    many.into_iter().for_each(|echo| echo.join().unwrap());

    let socket = UdpSocket::bind((HOST, PORT)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    connect(b"u");
    for len in [0, 1, 1471, 1472, 1473, 9000, 65_507] {
        let mut bytes = vec![0; 70_000];
        let (received, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((received, from), (len, SocketAddrV4::new(GUEST, PORT).into()));
        assert!(bytes[..len].iter().enumerate().all(|(n, byte)| *byte == (n % 251) as u8), "{len}");
    }

    let stats = end(guest);
    let least = 16 * MIB as u64;
    assert!(stats.sent_bytes > least && stats.received_bytes > least, "{stats:?}");
    assert_eq!((stats.spoofed, stats.receive_dropped), (0, 0));
}

#[test]
fn large_frames_and_a_single_queue() {
    let (guest, said) = start(network(tap(1, 9000), 9000));
    assert_eq!(["mtu", "queues"].map(|name| fact(&said, name)), ["9000", "1"]);
    echo(7, 4 * MIB);
    end(guest);
}

#[test]
fn limits_slow_a_guest_down_and_break_nothing() {
    let limit = RateLimit { bytes: Some(TokenBucket { rate: 2 << 20, burst: 64 << 10 }), operations: None };
    let network = Network { send_limit: limit, receive_limit: limit, ..network(tap(1, 1500), 1500) };
    let (guest, _) = start(network);
    echo(3, MIB);
    let stats = end(guest);
    assert!(stats.sent_bytes > MIB as u64 && stats.received_bytes > MIB as u64, "{stats:?}");
}

#[test]
fn a_guest_that_is_bound_to_its_address_uses_it_and_no_other() {
    let bound = |address: Ipv4Addr| Some(AllowedSources { ipv4: vec![address], ipv6: Vec::new() });
    let (guest, _) = start(Network { sources: bound(GUEST), ..network(tap(1, 1500), 1500) });
    echo(5, MIB);
    assert_eq!(end(guest).spoofed, 0);

    // The guest's address is another than the one that it is bound to: its answers do not arrive.
    let (mut guest, _) = start(Network { sources: bound(Ipv4Addr::new(10, 9, 8, 3)), ..network(tap(1, 1500), 1500) });
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.send_to(b"who are you?", (GUEST, PORT)).unwrap();
    guest
        .monitor
        .wait_for_stats("a refused answer", |stats| stats.networks.values().any(|network| network.spoofed > 0));
}

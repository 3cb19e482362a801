//! The device on a tap of this machine's kernel, in a network namespace of the test's own. On the other side of the tap is the
//! kernel's network stack with ordinary sockets.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use virtio_bindings::virtio_net::*;

use super::{
    super::{Backend, Tap, tap},
    driver::*,
};
use crate::virtio::VirtioDevice;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const PORT: u16 = 4000;

/// This thread gets a network namespace of its own.
fn enter_namespace() {
    // SAFETY: changes what this thread sees of the network, and no memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "these tests run as root: {}", io::Error::last_os_error());
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: &impl AsRawFd, call: libc::Ioctl, request: &mut libc::ifreq) {
    // SAFETY: all calls here read and write an ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), call, request) };
    assert_eq!(result, 0, "ioctl {call:#x}: {}", io::Error::last_os_error());
}

fn open(name: &str, flags: libc::c_int) -> OwnedFd {
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&file, libc::TUNSETIFF, &mut request);
    file.into()
}

const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Gives the interface the host's address and brings it up. IPv6 is left out: it would send on its own.
fn bring_up(name: &str) {
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let address = |address: Ipv4Addr| {
        let mut bytes = [0; 14];
        bytes[2..6].copy_from_slice(&address.octets().map(|byte| byte as libc::c_char));
        libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: bytes }
    };
    let mut wanted = request(name);
    wanted.ifr_ifru.ifru_addr = address(HOST);
    ioctl(&socket, libc::SIOCSIFADDR, &mut wanted);
    wanted.ifr_ifru.ifru_netmask = address(Ipv4Addr::new(255, 255, 255, 0));
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut wanted);
    ioctl(&socket, libc::SIOCGIFFLAGS, &mut wanted);
    // SAFETY: SIOCGIFFLAGS has filled the flags.
    wanted.ifr_ifru.ifru_flags = unsafe { wanted.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut wanted);
}

/// A driver on a tap, and a socket of the host.
fn machine(features: u64) -> (Driver, UdpSocket) {
    enter_namespace();
    let tap = Tap::new(open("tap0", KIND)).unwrap();
    let uso = tap.has_uso();
    bring_up("tap0");
    let mut driver = Driver::on(vec![Box::new(tap)], super::super::Settings { uso, ..settings() }, features);
    driver.activate();
    driver.post(0, 200, 1536);
    (driver, UdpSocket::bind((HOST, PORT)).unwrap())
}

/// Waits for a frame of this Ethernet type; the host may send others on its own.
fn await_frame(driver: &mut Driver, kind: [u8; 2]) -> Vec<u8> {
    driver.until(|driver| driver.received(0).filter(|packet| packet[24..26] == kind))
}

/// Answers the host's question for the guest's address.
fn answer_arp(driver: &mut Driver) {
    let question = await_frame(driver, [8, 6]);
    let host = &question[12 + 6..12 + 12];
    let mut answer =
        [host, &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &MAC, &GUEST.octets(), host, &HOST.octets()].concat();
    answer.resize(60, 0);
    driver.send(1, &[0; 12], &answer);
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A datagram to the host whose UDP checksum the host has to make: it has the sum of the pseudo header only.
fn datagram(host_mac: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + length).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(HOST.octets());
    let checksum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = fold(sum(&GUEST.octets()) + sum(&HOST.octets()) + 17 + u32::from(length));
    let mut frame = [host_mac, &MAC, &[8, 0], &ip].concat();
    for word in [PORT, PORT, length, pseudo] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

#[test]
fn packets_go_both_ways_with_the_checksums_left_to_the_other_side() {
    let (mut driver, socket) = machine(u64::MAX);
    socket.send_to(b"to the guest", SocketAddrV4::new(GUEST, PORT)).unwrap();
    answer_arp(&mut driver);
    let packet = await_frame(&mut driver, [8, 0]);
    assert_eq!(packet[packet.len() - 12..], *b"to the guest");
    assert_eq!(packet[0] & 1, 1, "the checksum is left to the guest");
    let start = usize::from(u16::from_le_bytes([packet[6], packet[7]]));
    assert_eq!((start, packet[8]), (34, 6), "its place");

    let host_mac = packet[12 + 6..12 + 12].to_vec();
    driver.send(1, &[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &datagram(&host_mac, b"to the host"));
    let mut bytes = [0; 100];
    let (len, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..len], from.ip()), (&b"to the host"[..], GUEST.into()));
    assert_eq!(driver.faults, 0);
}

#[test]
fn a_guest_that_asks_for_nothing_gets_whole_checksums() {
    let (mut driver, socket) = machine(1 << VIRTIO_NET_F_MRG_RXBUF);
    socket.send_to(b"to the guest", SocketAddrV4::new(GUEST, PORT)).unwrap();
    answer_arp(&mut driver);
    let packet = await_frame(&mut driver, [8, 0]);
    assert_eq!(packet[..10], [0; 10]);
    let udp = &packet[12 + 34..];
    let pseudo = sum(&HOST.octets()) + sum(&GUEST.octets()) + 17 + udp.len() as u32;
    assert_eq!(fold(pseudo + sum(udp)), 0xffff, "the checksum is right");
}

#[test]
fn large_datagrams_go_over_in_one_piece_each_way() {
    let (mut driver, socket) = machine(u64::MAX);
    if driver.features & 1 << VIRTIO_NET_F_HOST_USO == 0 {
        // Before Linux 6.2.
        return;
    }
    socket.send_to(b"who is there?", SocketAddrV4::new(GUEST, PORT)).unwrap();
    answer_arp(&mut driver);
    let packet = await_frame(&mut driver, [8, 0]);
    let host_mac = packet[12 + 6..12 + 12].to_vec();

    let payload: Vec<u8> = (0..10_000u32).map(|n| (n % 249) as u8).collect();
    let header = [1, VIRTIO_NET_HDR_GSO_UDP_L4 as u8, 42, 0, 0xe8, 3, 34, 0, 6, 0, 0, 0];
    driver.send(1, &header, &datagram(&host_mac, &payload));
    for part in payload.chunks(1000) {
        let mut bytes = [0; 2000];
        let len = socket.recv(&mut bytes).unwrap();
        assert!(bytes[..len] == *part, "ten datagrams of 1000 bytes");
    }
    assert_eq!(driver.net.stats.sent_packets, 11, "and the answer to ARP");

    let size: libc::c_int = 1000;
    let len = size_of_val(&size) as libc::socklen_t;
    // SAFETY: UDP_SEGMENT reads an int.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const size).cast(), len)
    };
    assert_eq!(result, 0, "UDP_SEGMENT: {}", io::Error::last_os_error());
    socket.send_to(&payload, SocketAddrV4::new(GUEST, PORT)).unwrap();
    let packet = await_frame(&mut driver, [8, 0]);
    assert_eq!(packet[1], VIRTIO_NET_HDR_GSO_UDP_L4 as u8);
    assert_eq!(packet.len(), 12 + 42 + payload.len());
    assert!(packet[12 + 42..] == payload);
    assert!(u16::from_le_bytes([packet[10], packet[11]]) >= 7, "in several buffers");
}

#[test]
fn a_host_that_floods_fills_the_tap_s_queue_and_no_more() {
    let (mut driver, socket) = machine(u64::MAX);
    socket.send_to(b"who is there?", SocketAddrV4::new(GUEST, PORT)).unwrap();
    answer_arp(&mut driver);
    await_frame(&mut driver, [8, 0]);
    let mut sent = 0;
    for _ in 0..5000 {
        // The tap drops what it has no room for; the socket gets no error for that.
        sent += usize::from(socket.send_to(&[7; 1000], SocketAddrV4::new(GUEST, PORT)).is_ok());
    }
    assert!(sent > 4000);
    driver.settle();
    let first = std::iter::from_fn(|| driver.received(0)).count();
    assert!((100..=200).contains(&first), "as many as there were buffers: {first}");
    assert_eq!(driver.is_watching(0), Some(false));
    // With buffers it goes on; each turn is bounded.
    let before = (driver.net.stats.received_packets, driver.calls);
    driver.post(0, 100, 1536);
    driver.settle();
    let turns = driver.calls - before.1;
    assert!(driver.net.stats.received_packets - before.0 <= 64 * turns as u64);
    assert!(driver.net.stats.received_packets - before.0 >= 100);
}

#[test]
fn queues_are_spread_to_as_the_driver_says() {
    enter_namespace();
    let taps: Vec<Tap> = (0..2).map(|_| Tap::new(open("tap0", KIND | libc::IFF_MULTI_QUEUE)).unwrap()).collect();
    let backends = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect();
    let mut driver = Driver::on(backends, settings(), u64::MAX);
    bring_up("tap0");
    driver.activate();
    assert_eq!(driver.command(&[4, 0, 2, 0]), 0);
    assert_eq!((driver.is_watching(0), driver.is_watching(1)), (Some(true), Some(true)));
    driver.send(3, &[0; 12], &frame(PEER, 60));
    assert_eq!(driver.net.stats.sent_packets, 1);
    assert_eq!(driver.command(&[4, 0, 1, 0]), 0);
    driver.reset();
    driver.activate();
    assert_eq!(driver.command(&[4, 0, 2, 0]), 0);
}

#[test]
fn a_tap_that_is_deleted_is_noticed() {
    let (mut driver, _socket) = machine(u64::MAX);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // A tap without persistence goes with its last descriptor, one with it when it is deleted.
    let netlink = rustix::net::socket(rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW, None).unwrap();
    let mut index = request("tap0");
    ioctl(&socket, libc::SIOCGIFINDEX, &mut index);
    // SAFETY: SIOCGIFINDEX has filled the index.
    let index = unsafe { index.ifr_ifru.ifru_ifindex };
    // struct nlmsghdr { 32, RTM_DELLINK, REQUEST, 1, 0 } and struct ifinfomsg with the index.
    let mut message = [0; 32];
    message[0] = 32;
    message[4] = 17;
    message[6] = 1;
    message[8] = 1;
    message[20..24].copy_from_slice(&index.to_ne_bytes());
    rustix::net::send(&netlink, &message, rustix::net::SendFlags::empty()).unwrap();
    driver.until(|driver| driver.net.gone.then_some(()));
    assert!(driver.net.take_config_change() && driver.net.config[6..8] == [0, 0], "the link is gone, too");
    assert!(driver.net.set_link(true) && !driver.net.take_config_change(), "nobody brings it back");
    assert_eq!(driver.is_watching(0), None);
    driver.settle();
}

#[test]
fn other_descriptors_are_told_apart() {
    enter_namespace();
    let info = tap::describe(&open("tap7", KIND)).unwrap();
    assert_eq!((info.name.as_str(), info.multi_queue), ("tap7", false));
    assert!(tap::describe(&open("tap8", KIND | libc::IFF_MULTI_QUEUE)).unwrap().multi_queue);
    for flags in [libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, libc::IFF_TAP | libc::IFF_NO_PI] {
        assert_eq!(tap::describe(&open("tap9", flags)), None, "{flags:#x}");
    }
    let detached = open("tap6", KIND | libc::IFF_MULTI_QUEUE);
    Tap::new(detached.try_clone().unwrap()).unwrap().attach(false).unwrap();
    assert_eq!(tap::describe(&detached), None, "detached");
    let nothing = File::open("/dev/net/tun").unwrap();
    assert_eq!(tap::describe(&nothing.into()), None, "no interface yet");
    assert_eq!(tap::describe(&File::open("/dev/null").unwrap().into()), None);
}

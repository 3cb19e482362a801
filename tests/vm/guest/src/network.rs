//! A network device from inside: eth0 has the address 10.9.8.2, the host is 10.9.8.1.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const PORT: u16 = 4000;
/// How long the link may take to come up.
const CARRIER_LIMIT: Duration = Duration::from_secs(10);

/// Describes eth0 and brings it up. Then each connection from the host says by its first byte what it wants: an echo of what comes (`e`),
/// datagrams (`u`), or the end.
pub fn serve() {
    for name in ["address", "mtu", "carrier", "type"] {
        if name == "carrier" {
            bring_up("eth0", GUEST);
            // Linux looks at the link on a work queue of its own.
            let limit = Instant::now() + CARRIER_LIMIT;
            while attribute(name) != "1" && Instant::now() < limit {
                std::thread::yield_now();
            }
        }
        println!("guest: {name} {}", attribute(name));
    }
    let queues = std::fs::read_dir("/sys/class/net/eth0/queues").expect("queues of eth0");
    let receiving =
        queues.filter(|queue| queue.as_ref().expect("an entry").file_name().to_string_lossy().starts_with("rx-"));
    println!("guest: queues {}", receiving.count());
    let listener = TcpListener::bind((GUEST, PORT)).expect("listening");
    println!("guest: ready now");
    for stream in listener.incoming() {
        let mut stream = stream.expect("a connection");
        let mut wish = [0];
        stream.read_exact(&mut wish).expect("what the host wants");
        match &wish {
            b"e" => {
                std::thread::spawn(move || echo(stream));
            }
            b"u" => datagrams(),
            _ => return,
        }
    }
}

/// As io::copy, but in large pieces.
fn echo(stream: TcpStream) {
    try_echo(stream).expect("an echo");
}

fn try_echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

/// Echoes what comes to any address of this machine, in the background. A connection may break: its card may go.
pub fn echo_in_background() {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("listening");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            std::thread::spawn(move || try_echo(stream));
        }
    });
}

/// Datagrams of all sizes, the largest ones in fragments.
fn datagrams() {
    let socket = UdpSocket::bind((GUEST, PORT)).expect("a UDP socket");
    for len in [0, 1, 1471, 1472, 1473, 9000, 65_507] {
        let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        socket.send_to(&bytes, SocketAddrV4::new(HOST, PORT)).expect("sending a datagram");
    }
}

fn attribute(name: &str) -> String {
    let path = format!("/sys/class/net/eth0/{name}");
    std::fs::read_to_string(&path).expect(&path).trim().to_owned()
}

/// Gives a card an address in a network of 256 and brings it up.
pub fn bring_up(name: &str, ip: Ipv4Addr) {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let address = |address: [u8; 4]| {
        let mut bytes = [0; 14];
        bytes[2..6].copy_from_slice(&address.map(|byte| byte as libc::c_char));
        libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: bytes }
    };
    request.ifr_ifru.ifru_addr = address(ip.octets());
    call(&socket, libc::SIOCSIFADDR, &mut request);
    request.ifr_ifru.ifru_netmask = address([255, 255, 255, 0]);
    call(&socket, libc::SIOCSIFNETMASK, &mut request);
    call(&socket, libc::SIOCGIFFLAGS, &mut request);
    // SAFETY: SIOCGIFFLAGS has filled the flags.
    request.ifr_ifru.ifru_flags = unsafe { request.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
    call(&socket, libc::SIOCSIFFLAGS, &mut request);
}

fn call(socket: &UdpSocket, call: libc::c_ulong, request: &mut libc::ifreq) {
    use std::os::fd::AsRawFd;
    // SAFETY: all calls here read and write an ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), call as _, request) };
    assert_eq!(result, 0, "ioctl {call:#x}: {}", io::Error::last_os_error());
}

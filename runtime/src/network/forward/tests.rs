//! The listener in network namespaces of this machine, and behind it the agent's side in another one, with a socket in place of the
//! monitor. Needs root, and a kernel with sk_lookup.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{
        IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener as StdListener, TcpStream as StdStream, UdpSocket,
    },
    os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    thread,
    time::Duration,
};

use caisson_agent::{
    forward as agent,
    transport::{Accept, ByteStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
    task::JoinHandle,
};

use super::*;
use crate::network::lab::{LIMIT, Space};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn open(space: &Space) -> Listener {
    Listener::open(&space.namespace()).unwrap()
}

/// Connects from within the namespace.
fn connect(space: &Space, address: IpAddr, port: u16) -> io::Result<StdStream> {
    let stream = space.run(|| StdStream::connect_timeout(&SocketAddr::new(address, port), LIMIT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn assert_refused(space: &Space, address: IpAddr, port: u16) {
    let error = connect(space, address, port).expect_err("nobody listens there");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address} {port}: {error}");
}

/// Accepts one connection; it must be there.
fn accepted(socket: &OwnedFd) -> StdStream {
    StdListener::from(socket.try_clone().unwrap()).accept().expect("a connection waits").0
}

fn local_port(socket: &OwnedFd) -> u16 {
    StdListener::from(socket.try_clone().unwrap()).local_addr().unwrap().port()
}

#[test]
fn every_port_of_loopback_and_nothing_else_comes_to_the_listener() {
    let (space, other) = (Space::new(), Space::new());
    space.ip("address add 10.9.9.9/32 dev lo");
    space.ip("address add fd00::9/128 dev lo");
    assert_refused(&space, V4, 80);
    let listener = open(&space);
    let ipv6 = listener.ipv6.as_ref().expect("this kernel has IPv6");
    for (address, socket) in [(V4, &listener.ipv4), ("127.3.2.1".parse().unwrap(), &listener.ipv4), (V6, ipv6)] {
        for port in [1, 80, 65535] {
            let client = connect(&space, address, port).unwrap();
            let server = accepted(socket);
            assert_eq!(server.local_addr().unwrap(), SocketAddr::new(address, port), "what was dialled");
            assert_eq!(server.peer_addr().unwrap(), client.local_addr().unwrap());
        }
    }
    // A client that uses IPv6's form of an IPv4 address.
    let _client = connect(&space, Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), 80).unwrap();
    assert_eq!(accepted(&listener.ipv4).local_addr().unwrap(), SocketAddr::new(V4, 80));

    for port in [80, local_port(&listener.ipv4), local_port(ipv6)] {
        assert_refused(&space, "10.9.9.9".parse().unwrap(), port);
        assert_refused(&space, "fd00::9".parse().unwrap(), port);
        assert_refused(&other, V4, port);
        assert_refused(&other, V6, port);
    }
    let (left, right) = space.run(|| (UdpSocket::bind((V4, 0)).unwrap(), UdpSocket::bind((V4, 0)).unwrap()));
    right.set_read_timeout(Some(LIMIT)).unwrap();
    left.send_to(b"as ever", right.local_addr().unwrap()).unwrap();
    assert_eq!(right.recv(&mut [0; 16]).unwrap(), 7);

    drop(listener);
    assert_refused(&space, V4, 80);
    assert_refused(&space, V6, 80);
}

#[test]
fn what_the_host_has_in_the_namespace_is_hidden_as_long_as_the_listener_is_there() {
    let space = Space::new();
    let server = space.run(|| StdListener::bind((V4, 8080)).unwrap());
    let mut before = connect(&space, V4, 8080).unwrap();
    let mut served = server.accept().unwrap().0;
    let listener = open(&space);
    before.write_all(b"still here").unwrap();
    let mut text = [0; 10];
    served.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still here");
    let _now = connect(&space, V4, 8080).unwrap();
    assert_eq!(accepted(&listener.ipv4).local_addr().unwrap().port(), 8080);
    drop(listener);
    let after = connect(&space, V4, 8080).unwrap();
    assert_eq!(server.accept().unwrap().1, after.local_addr().unwrap());
}

#[test]
fn the_loopback_interface_may_come_up_later() {
    let space = Space::new();
    space.ip("link set lo down");
    let listener = open(&space);
    space.ip("link set lo up");
    for (address, socket) in [(V4, &listener.ipv4), (V6, listener.ipv6.as_ref().unwrap())] {
        let _client = connect(&space, address, 443).unwrap();
        assert_eq!(accepted(socket).local_addr().unwrap(), SocketAddr::new(address, 443));
    }
}

#[test]
fn the_hosts_own_namespace_is_refused() {
    let own = File::open("/proc/self/ns/net").unwrap();
    assert!(matches!(Listener::open(&own.into()), Err(ListenError::Host)));
}

/// Streams that the machine in the test hands to the agent.
struct Handed(mpsc::UnboundedReceiver<StdUnixStream>);

impl Accept for Handed {
    async fn accept(&mut self) -> io::Result<(Box<dyn ByteStream>, u32)> {
        match self.0.recv().await {
            Some(stream) => Ok((Box::new(UnixStream::from_std(stream)?), 0)),
            None => std::future::pending().await,
        }
    }
}

/// A pod: its namespace on the host, and its guest.
struct Pod {
    host: Space,
    guest: Space,
    serving: JoinHandle<io::Result<()>>,
    _directory: tempfile::TempDir,
}

impl Pod {
    fn new() -> Self {
        let (host, guest) = (Space::new(), Space::new());
        let directory = tempfile::tempdir().unwrap();
        let dialer = Arc::new(Dialer::new(directory.path()).unwrap());
        let socket = StdUnixListener::from(dialer.listen().unwrap());
        socket.set_nonblocking(true).unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(monitor(tokio::net::UnixListener::from_std(socket).unwrap(), sender));
        let namespace = guest.namespace();
        thread::spawn(move || {
            let serve = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(agent::serve(Handed(receiver), slog::Logger::root(slog::Discard, slog::o!())));
            };
            namespace.run(serve).unwrap();
        });
        let listener = open(&host);
        let serving =
            tokio::spawn(async move { serve(listener, &dialer, &slog::Logger::root(slog::Discard, slog::o!())).await });
        Self { host, guest, serving, _directory: directory }
    }

    /// A server in the guest that treats each connection so.
    fn server(&self, address: IpAddr, port: u16, treat: impl Fn(StdStream) + Send + Clone + 'static) {
        let listener = self.guest.run(|| StdListener::bind((address, port)).unwrap());
        thread::spawn(move || {
            for client in listener.incoming() {
                let treat = treat.clone();
                thread::spawn(move || treat(client.unwrap()));
            }
        });
    }

    /// Does something with a connection of a client on the host, on a thread, because the shim's side runs on the test's.
    async fn client<T: Send + 'static>(
        &self,
        address: IpAddr,
        port: u16,
        work: impl FnOnce(StdStream) -> T + Send + 'static,
    ) -> T {
        let stream = connect(&self.host, address, port).unwrap();
        on_own_thread("client", move || work(stream)).await.unwrap()
    }
}

/// What the monitor does with a client of its socket, with the agent in the guest's place.
async fn monitor(socket: tokio::net::UnixListener, agent: mpsc::UnboundedSender<StdUnixStream>) {
    for number in 1.. {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 1026\n");
        stream.write_all(format!("OK {number}\n").as_bytes()).await.unwrap();
        let stream = stream.into_std().unwrap();
        // Registered anew in the agent's runtime.
        if agent.send(stream).is_err() {
            return;
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(31) >> 4) as u8).collect()
}

/// Sends back what it gets.
fn echo(mut client: StdStream) {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    client.write_all(&bytes).unwrap();
}

/// Sends, finishes, and reads the answer.
fn ask(mut server: StdStream, question: &[u8]) -> io::Result<Vec<u8>> {
    server.write_all(question)?;
    server.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).map(|_| answer)
}

#[tokio::test]
async fn a_client_on_the_host_reaches_a_server_in_the_guest() {
    let pod = Pod::new();
    pod.server(V4, 80, echo);
    pod.server(V6, 81, echo);
    pod.server("127.0.0.53".parse().unwrap(), 53, echo);
    // The other family's server is reached as well, as it is by a client that tries both.
    let dialled = [(V4, 80), (V6, 81), ("127.0.0.53".parse().unwrap(), 53), (V6, 80), (V4, 81)];
    for (address, port) in dialled {
        let answer = pod.client(address, port, |server| ask(server, &pattern(3_000_000))).await;
        assert!(answer.unwrap() == pattern(3_000_000), "{address} {port}");
    }
}

#[tokio::test]
async fn a_refusal_of_the_guest_is_a_reset() {
    let pod = Pod::new();
    for address in [V4, V6] {
        let answer = pod.client(address, 9, |mut server| server.read(&mut [0])).await;
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_and_one_that_resets() {
    let pod = Pod::new();
    pod.server(V4, 22, |mut client| {
        client.write_all(b"banner").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 5);
        // Its end is seen, too: this side has finished as well now.
    });
    let heard = pod.client(V4, 22, |mut server| {
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        server.write_all(b"hello").unwrap();
        text
    });
    assert_eq!(heard.await, "banner");
    // It closes with the question unread, which is a reset.
    pod.server(V4, 23, |client| assert_eq!(client.peek(&mut [0]).unwrap(), 1));
    let answer = pod.client(V4, 23, |server| ask(server, b"question")).await;
    assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_client_that_resets_is_a_reset_for_the_server() {
    let pod = Pod::new();
    let (sender, mut met) = mpsc::unbounded_channel();
    pod.server(V4, 80, move |mut client| {
        sender.send(client.read_to_end(&mut Vec::new()).map_err(|error| error.kind())).unwrap();
    });
    pod.client(V4, 80, |client| {
        let client = socket_with_reset(client);
        drop(client);
    })
    .await;
    let met = tokio::time::timeout(LIMIT, met.recv()).await.expect("the server meets something");
    assert_eq!(met, Some(Err(io::ErrorKind::ConnectionReset)));
}

/// A connection whose closing is a reset.
fn socket_with_reset(stream: StdStream) -> StdStream {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    stream
}

#[tokio::test]
async fn more_connections_than_the_limit_are_reset_and_later_ones_served() {
    // Six descriptors of this process for each.
    let limits = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limits.1, limits.1).unwrap();
    let pod = Pod::new();
    pod.server(V4, 80, echo);
    let mut held = Vec::new();
    for _ in 0..MAX_FORWARDS {
        // One after the other: the queue of those that wait is shorter.
        held.push(
            pod.client(V4, 80, |mut server| {
                server.write_all(b"x").unwrap();
                server
            })
            .await,
        );
    }
    let over = pod.client(V4, 80, |mut server| server.read(&mut [0])).await;
    assert_eq!(over.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let ask_all = move || held.into_iter().map(|server| ask(server, b"y")).collect::<Vec<_>>();
    for answer in on_own_thread("clients", ask_all).await.unwrap() {
        assert_eq!(answer.unwrap(), b"xy");
    }
    assert_eq!(pod.client(V4, 80, |server| ask(server, b"again")).await.unwrap(), b"again");
}

#[tokio::test]
async fn when_the_shim_ends_its_clients_are_reset_and_loopback_is_as_before() {
    let pod = Pod::new();
    pod.server(V4, 80, echo);
    let mut client = pod
        .client(V4, 80, |mut server| {
            server.write_all(b"x").unwrap();
            server
        })
        .await;
    pod.serving.abort();
    let ended = on_own_thread("client", move || client.read(&mut [0])).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_refused(&pod.host, V4, 80);
    assert_refused(&pod.host, V6, 80);
}

//! Port forwarding's end in the guest: what the host asks for is done or the stream is closed. A socket pair stands for the vsock
//! stream; servers listen on this machine's loopback. The two ends together are tested in `runtime`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use caisson_agent::{
    forward,
    transport::{Accept, ByteStream},
};
use caisson_forward::Target;
use caisson_protos::guest::MAX_FORWARDS;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixStream},
    sync::mpsc,
    time::timeout,
};

/// No step takes this long unless something hangs.
const LIMIT: Duration = Duration::from_secs(30);

struct Streams(mpsc::UnboundedReceiver<UnixStream>);

impl Accept for Streams {
    async fn accept(&mut self) -> io::Result<(Box<dyn ByteStream>, u32)> {
        match self.0.recv().await {
            Some(stream) => Ok((Box::new(stream), 0)),
            None => std::future::pending().await,
        }
    }
}

/// The host's side of the agent's port.
struct Port(mpsc::UnboundedSender<UnixStream>);

impl Port {
    fn open() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forward::serve(Streams(receiver), slog::Logger::root(slog::Discard, slog::o!())));
        Self(sender)
    }

    /// A stream on which this was said.
    async fn stream(&self, said: &[u8]) -> UnixStream {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        self.0.send(theirs).unwrap();
        ours.write_all(said).await.unwrap();
        ours
    }
}

/// The stream was closed, and nothing came.
async fn assert_closed(mut stream: UnixStream) {
    let read = timeout(LIMIT, stream.read(&mut [0; 16])).await.expect("the stream is closed");
    // With bytes that nobody has read it is a reset.
    assert!(matches!(read.as_ref().map_err(io::Error::kind), Ok(0) | Err(io::ErrorKind::ConnectionReset)), "{read:?}");
}

async fn server() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn bytes_and_ends_go_both_ways_in_frames() {
    let (port, (listener, address)) = (Port::open(), server().await);
    let target = Target::new(address).unwrap().encode();
    let mut stream = port.stream(&[&target[..], b"\x05\0hello\0\0"].concat()).await;
    let (mut client, _) = timeout(LIMIT, listener.accept()).await.expect("a connection").unwrap();
    let mut text = String::new();
    timeout(LIMIT, client.read_to_string(&mut text)).await.expect("its end").unwrap();
    assert_eq!(text, "hello");
    client.write_all(b"you").await.unwrap();
    drop(client);
    let mut answer = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the stream's end").unwrap();
    assert_eq!(answer, b"\x03\0you\0\0");
}

#[tokio::test]
async fn only_loopback_is_reached() {
    // This machine's own address, and a server that would answer at it.
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = Port::open();
    let number = listener.local_addr().unwrap().port().to_be_bytes();
    for address in ["0.0.0.0", "169.254.1.1", "::", "fe80::1"] {
        let octets = match address.parse().unwrap() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        assert_closed(port.stream(&[&octets[..], &number].concat()).await).await;
    }
    let nothing = timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(nothing.is_err(), "{nothing:?}");
}

#[tokio::test]
async fn what_cannot_be_connected_is_closed() {
    let (port, (listener, address)) = (Port::open(), server().await);
    drop(listener);
    let refused = port.stream(&Target::new(address).unwrap().encode()).await;
    assert_closed(refused).await;
    let mut half = port.stream(&[0; Target::LEN - 1]).await;
    half.shutdown().await.unwrap();
    assert_closed(half).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_says_nothing_is_not_waited_for_without_end() {
    let port = Port::open();
    assert_closed(port.stream(b"").await).await;
}

#[tokio::test]
async fn more_streams_than_the_limit_are_closed() {
    let port = Port::open();
    let mut held = Vec::new();
    for _ in 0..MAX_FORWARDS {
        held.push(port.stream(b"").await);
    }
    assert_closed(port.stream(b"").await).await;
    drop(held.pop());
    // Its place is free a moment later.
    let (listener, address) = server().await;
    let target = Target::new(address).unwrap().encode();
    let connects = async {
        loop {
            let stream = port.stream(&target).await;
            tokio::select! {
                accepted = listener.accept() => return accepted.unwrap(),
                () = assert_closed(stream) => {}
            }
        }
    };
    timeout(LIMIT, connects).await.expect("a connection");
}

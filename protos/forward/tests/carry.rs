//! Both ends at work: a client, two copies of the carrier with a stream between them, and a server, with TCP connections over this
//! machine's loopback. What the client and the server see must be what they would see if they had one connection.

use std::{io, net::Ipv4Addr, time::Duration};

use caisson_forward::{Broken, carry};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    task::JoinHandle,
    time::timeout,
};

/// No step takes this long unless something hangs.
const LIMIT: Duration = Duration::from_secs(30);

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("waited {LIMIT:?} for {what}"))
}

/// Two ends of one TCP connection.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// What carries one connection: the host's side and the guest's.
struct Carriers(JoinHandle<Result<(), Broken>>, JoinHandle<Result<(), Broken>>);

impl Carriers {
    async fn end(self) -> (Result<(), Broken>, Result<(), Broken>) {
        let Self(host, guest) = self;
        within("both sides to end", async { (host.await.unwrap(), guest.await.unwrap()) }).await
    }

    async fn end_in_order(self) {
        let ends = self.end().await;
        assert!(matches!(ends, (Ok(()), Ok(()))), "{ends:?}");
    }

    async fn end_broken(self) {
        let ends = self.end().await;
        assert!(matches!(ends, (Err(_), Err(_))), "{ends:?}");
    }
}

/// A client and a server, joined.
async fn joined() -> (TcpStream, TcpStream, Carriers) {
    let ((client, host), (guest, server)) = (connection().await, connection().await);
    let (left, right) = UnixStream::pair().unwrap();
    (client, server, Carriers(tokio::spawn(carry(host, left)), tokio::spawn(carry(guest, right))))
}

async fn read_all(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    within("the end of a connection", from.read_to_end(&mut bytes)).await.map(|_| bytes)
}

/// What comes until the connection is reset, which it must be.
async fn read_until_reset(from: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = within("a reset", from.read_to_end(&mut bytes)).await.expect_err("a reset, and not an end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    bytes
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(31).wrapping_add(seed) >> 3) as u8).collect()
}

#[tokio::test]
async fn much_goes_both_ways_at_once_and_arrives_as_it_was() {
    let (client, server, carriers) = joined().await;
    let exchange = |mut socket: TcpStream, out: usize, back: usize| async move {
        let (mut read, mut write) = socket.split();
        let mut got = Vec::new();
        let (written, received) = tokio::join!(
            async {
                write.write_all(&pattern(5_000_000, out)).await?;
                write.shutdown().await
            },
            read.read_to_end(&mut got)
        );
        written.unwrap();
        received.unwrap();
        assert!(got == pattern(5_000_000, back));
    };
    within("both transfers", async { tokio::join!(exchange(client, 1, 2), exchange(server, 2, 1)) }).await;
    carriers.end_in_order().await;
}

#[tokio::test]
async fn a_client_that_has_finished_still_gets_its_answer() {
    let (mut client, mut server, carriers) = joined().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"question");
    server.write_all(&pattern(1_000_000, 0)).await.unwrap_or_else(|error| panic!("{error}"));
    drop(server);
    assert!(read_all(&mut client).await.unwrap() == pattern(1_000_000, 0));
    carriers.end_in_order().await;
}

#[tokio::test]
async fn a_server_that_has_finished_still_gets_what_the_client_says() {
    let (mut client, mut server, carriers) = joined().await;
    server.write_all(b"banner").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"banner");
    client.write_all(&pattern(1_000_000, 0)).await.unwrap();
    drop(client);
    assert!(read_all(&mut server).await.unwrap() == pattern(1_000_000, 0));
    carriers.end_in_order().await;
}

#[tokio::test]
async fn a_reset_of_the_client_reaches_the_server_behind_what_it_said() {
    let (mut client, mut server, carriers) = joined().await;
    client.write_all(b"half a request").await.unwrap();
    let mut said = [0; 14];
    within("the request", server.read_exact(&mut said)).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(read_until_reset(&mut server).await, b"");
    carriers.end_broken().await;
}

#[tokio::test]
async fn an_answer_that_is_followed_by_a_reset_arrives_before_it() {
    let (mut client, mut server, carriers) = joined().await;
    client.write_all(&pattern(100, 0)).await.unwrap();
    assert_eq!(within("the request", server.peek(&mut [0])).await.unwrap(), 1);
    server.write_all(b"413").await.unwrap();
    // With unread bytes the kernel resets.
    drop(server);
    assert_eq!(read_until_reset(&mut client).await, b"413");
    carriers.end_broken().await;
}

#[tokio::test]
async fn half_an_answer_is_never_taken_for_a_whole_one() {
    let (mut client, mut server, carriers) = joined().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"question");
    server.write_all(b"half").await.unwrap();
    let mut half = [0; 4];
    within("half an answer", client.read_exact(&mut half)).await.unwrap();
    server.set_zero_linger().unwrap();
    drop(server);
    assert_eq!(read_until_reset(&mut client).await, b"");
    carriers.end_broken().await;
}

#[tokio::test]
async fn what_a_client_said_before_it_left_reaches_a_server_that_talks_to_nobody() {
    let (mut client, mut server, carriers) = joined().await;
    client.write_all(&pattern(20_000, 0)).await.unwrap();
    drop(client);
    // Answered by a reset, because nobody has the client's socket any more.
    server.write_all(b"banner").await.unwrap();
    let mut got = Vec::new();
    let ended = within("the end", server.read_to_end(&mut got)).await;
    assert!(got == pattern(20_000, 0), "{} bytes, {ended:?}", got.len());
    drop(server);
    drop(carriers.end().await);
}

#[tokio::test]
async fn when_one_side_dies_the_peer_of_the_other_is_reset() {
    for killed_is_the_hosts in [true, false] {
        let (mut client, mut server, Carriers(host, guest)) = joined().await;
        client.write_all(b"x").await.unwrap();
        within("the byte", server.read_u8()).await.unwrap();
        if killed_is_the_hosts {
            host.abort()
        } else {
            guest.abort()
        }
        assert_eq!(read_until_reset(&mut client).await, b"");
        assert_eq!(read_until_reset(&mut server).await, b"");
    }
}

#[tokio::test]
async fn a_side_that_breaks_the_protocol_is_a_reset() {
    // An end, and then a frame.
    for bytes in [&b"\0\0\x01\0x"[..], b"\0\0\0\0"] {
        let (mut client, host) = connection().await;
        let (left, mut right) = UnixStream::pair().unwrap();
        let carried = tokio::spawn(carry(host, left));
        right.write_all(bytes).await.unwrap();
        let broken = within("the end", carried).await.unwrap().unwrap_err();
        assert!(matches!(broken, Broken::Protocol(_)), "{broken}");
        // The end of this direction was whole.
        assert_eq!(read_all(&mut client).await.unwrap(), b"");
    }
    // Half a header and half a payload.
    for bytes in [&b"\x05"[..], b"\x05\0abc"] {
        let (mut client, host) = connection().await;
        let (left, mut right) = UnixStream::pair().unwrap();
        let carried = tokio::spawn(carry(host, left));
        right.write_all(bytes).await.unwrap();
        drop(right);
        assert!(matches!(within("the end", carried).await.unwrap(), Err(Broken::Reset)));
        assert!(b"abc".starts_with(&read_until_reset(&mut client).await));
    }
}

#[tokio::test]
async fn a_reader_that_stops_makes_its_writer_wait() {
    let (mut client, server, carriers) = joined().await;
    setsockopt(&client, sockopt::SndBuf, &65536).unwrap();
    // Everything on the way has filled up when nothing more goes for a while.
    let (chunk, mut sent) = (vec![7; 65536], 0usize);
    while let Ok(written) = timeout(Duration::from_millis(500), client.write(&chunk)).await {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "it must not be kept here");
    }
    let count = async {
        let (mut server, mut got, mut buffer) = (server, 0, vec![0; 65536]);
        while got < sent {
            got += server.read(&mut buffer).await.unwrap();
        }
        got
    };
    assert_eq!(within("all that was sent", count).await, sent);
    drop(client);
    drop(carriers.end().await);
}

/// The server does not read, so nothing is read from the client either; that it has gone is told by the socket's error.
#[tokio::test]
async fn a_reset_is_noticed_though_nothing_can_be_read() {
    let (mut client, mut server, carriers) = joined().await;
    let chunk = vec![7; 65536];
    while timeout(Duration::from_millis(500), client.write(&chunk)).await.is_ok() {}
    client.set_zero_linger().unwrap();
    drop(client);
    let Carriers(host, guest) = carriers;
    assert!(matches!(within("the host's side to end", host).await.unwrap(), Err(Broken::Tcp(_))));
    // What is on its way goes first.
    read_until_reset(&mut server).await;
    assert!(within("the guest's side to end", guest).await.unwrap().is_err());
}

#[tokio::test]
async fn a_hundred_connections_do_not_wait_for_each_other() {
    let mut all = Vec::new();
    for number in 0..100 {
        all.push((number, joined().await));
    }
    let exchanges = all.into_iter().map(|(number, (mut client, mut server, carriers))| {
        tokio::spawn(async move {
            let question = pattern(20_000 + number, number);
            let (asked, heard) = tokio::join!(
                async {
                    client.write_all(&question).await?;
                    client.shutdown().await?;
                    read_all(&mut client).await
                },
                async {
                    let heard = read_all(&mut server).await?;
                    server.write_all(&heard).await?;
                    server.shutdown().await?;
                    Ok::<_, io::Error>(heard)
                }
            );
            assert!(asked.unwrap() == question && heard.unwrap() == question);
            carriers.end_in_order().await;
        })
    });
    for exchange in exchanges.collect::<Vec<_>>() {
        within("every exchange", exchange).await.unwrap();
    }
}

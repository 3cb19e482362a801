//! Two ends of a connection. Each sends what the other can predict, so that a lost, changed or misplaced byte is seen.
//!
//! ```text
//! serve PORT BYTES          takes one TCP connection and exchanges     echo PORT COUNT            answers COUNT datagrams
//! connect ADDRESS BYTES     makes one and exchanges                    datagrams ADDRESS SIZE...  sends one of each size
//! ```

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::number;

/// No answer within this time is none.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a datagram is sent that nobody answers.
const TRIES: usize = 5;

/// Runs one end.
pub fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port, bytes] => {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, number(port)? as u16)).context("listen")?;
            println!("listening");
            let (stream, peer) = listener.accept().context("accept")?;
            exchange(&stream, number(bytes)?, 2, 1)?;
            println!("exchanged {bytes} with {}", peer.ip().to_canonical());
        }
        ["connect", address, bytes] => {
            let address: SocketAddr = address.parse().context("the address")?;
            let stream = TcpStream::connect_timeout(&address, LIMIT).context("connect")?;
            exchange(&stream, number(bytes)?, 1, 2)?;
            println!("exchanged {bytes}");
        }
        ["echo", port, count] => {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, number(port)? as u16)).context("bind")?;
            println!("listening");
            let mut buffer = vec![0; 1 << 16];
            for _ in 0..number(count)? {
                let (length, peer) = socket.recv_from(&mut buffer).context("receive")?;
                socket.send_to(&buffer[..length], peer).context("answer")?;
            }
        }
        ["datagrams", address, sizes @ ..] => {
            let address: SocketAddr = address.parse().context("the address")?;
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).context("bind")?;
            socket.set_read_timeout(Some(LIMIT / TRIES as u32))?;
            socket.connect(address).context("connect")?;
            for size in sizes {
                datagram(&socket, number(size)?).with_context(|| format!("a datagram of {size} bytes"))?;
                println!("answered {size}");
            }
        }
        _ => bail!(
            "usage: probe net serve PORT BYTES | connect ADDRESS BYTES | echo PORT COUNT | datagrams ADDRESS SIZE..."
        ),
    }
    Ok(())
}

/// The bytes that end number `seed` sends: no two stretches of them are alike.
struct Sequence(u64);

impl Sequence {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for part in buffer.chunks_mut(8) {
            // xorshift64
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            part.copy_from_slice(&self.0.to_le_bytes()[..part.len()]);
        }
    }
}

/// Sends and receives `bytes` bytes at once.
fn exchange(stream: &TcpStream, bytes: usize, ours: u64, theirs: u64) -> Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(stream, bytes, ours));
        receive(stream, bytes, theirs)?;
        sending.join().expect("it does not panic")
    })
}

const CHUNK: usize = 1 << 16;

fn send(mut stream: &TcpStream, bytes: usize, seed: u64) -> Result<()> {
    let (mut sequence, mut buffer, mut left) = (Sequence::new(seed), vec![0; CHUNK], bytes);
    while left > 0 {
        let count = left.min(CHUNK);
        sequence.fill(&mut buffer[..count]);
        stream.write_all(&buffer[..count]).with_context(|| format!("send, {left} bytes before the end"))?;
        left -= count;
    }
    stream.shutdown(Shutdown::Write).context("end the sending")
}

fn receive(mut stream: &TcpStream, bytes: usize, seed: u64) -> Result<()> {
    let (mut sequence, mut expected, mut buffer, mut left) =
        (Sequence::new(seed), vec![0; CHUNK], vec![0; CHUNK], bytes);
    while left > 0 {
        let count = left.min(CHUNK);
        stream.read_exact(&mut buffer[..count]).with_context(|| format!("receive, {left} bytes before the end"))?;
        sequence.fill(&mut expected[..count]);
        ensure!(buffer[..count] == expected[..count], "the bytes at {} are not those that were sent", bytes - left);
        left -= count;
    }
    ensure!(stream.read(&mut [0])? == 0, "more than {bytes} bytes came");
    Ok(())
}

fn datagram(socket: &UdpSocket, size: usize) -> Result<()> {
    let mut sent = vec![0; size];
    Sequence::new(size as u64 + 1).fill(&mut sent);
    let mut answer = vec![0; 1 << 16];
    for _ in 0..TRIES {
        socket.send(&sent).context("send")?;
        // What is late is the answer to an earlier try of it.
        if let Ok(length) = socket.recv(&mut answer) {
            ensure!(answer[..length] == sent, "the answer has {length} bytes that are others");
            return Ok(());
        }
    }
    bail!("no answer to {TRIES} of them");
}

//! Two ends that move bytes, datagrams and answers as fast as they can, for the network benchmark. The client decides what is done
//! and its clock counts; nothing is looked at but how much came.
//!
//! ```text
//! client                                         server (`probe speed PORT`)
//!   │ request: [task, size, count, UDP port] ────────► │     one TCP connection for all of it
//!   │ bytes or datagrams, one way or the other ◄─────► │
//!   │ ◄──── one byte for each BATCH of datagrams, or for all bytes (from whom receives)
//! ```
//!
//! A sender of datagrams has at most two batches on the way, so that no queue between the ends has to drop one: a lost one is an
//! error.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// No progress within this time is an error.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes in one write or read of a stream.
const CHUNK: usize = 64 << 10;
/// Datagrams that are answered by one byte.
pub const BATCH: usize = 32;
/// Batches that may be on the way.
const ON_THE_WAY: usize = 2;
/// Bytes of a request.
const REQUEST: usize = 14;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Task {
    /// `count` bytes of a stream to the server.
    StreamTo = 1,
    /// `count` bytes of a stream from the server.
    StreamFrom = 2,
    /// `count` times one byte there and back.
    Answers = 3,
    /// `count` datagrams of `size` bytes to the server.
    DatagramsTo = 4,
    /// The same from the server.
    DatagramsFrom = 5,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    task: Task,
    size: u16,
    count: u64,
    /// Where the client's UDP socket is.
    port: u16,
}

impl Request {
    fn bytes(self) -> [u8; REQUEST] {
        let mut bytes = [0; REQUEST];
        bytes[0] = self.task as u8;
        bytes[2..4].copy_from_slice(&self.size.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..].copy_from_slice(&self.port.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; REQUEST]) -> Result<Self> {
        let [task, _, s0, s1, c0, c1, c2, c3, c4, c5, c6, c7, p0, p1] = *bytes;
        let task = match task {
            1 => Task::StreamTo,
            2 => Task::StreamFrom,
            3 => Task::Answers,
            4 => Task::DatagramsTo,
            5 => Task::DatagramsFrom,
            other => bail!("there is no task {other}"),
        };
        let count = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
        Ok(Self { task, size: u16::from_le_bytes([s0, s1]), count, port: u16::from_le_bytes([p0, p1]) })
    }
}

/// One end: the connection and the UDP socket.
struct End {
    stream: TcpStream,
    datagrams: UdpSocket,
}

impl End {
    fn new(stream: TcpStream, datagrams: UdpSocket) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        datagrams.set_read_timeout(Some(LIMIT))?;
        Ok(Self { stream, datagrams })
    }

    fn one(&mut self) -> Result<()> {
        self.stream.read_exact(&mut [0]).context("wait for the other end's answer")
    }

    fn answer(&mut self) -> Result<()> {
        self.stream.write_all(&[0]).context("answer")
    }

    fn send_stream(&mut self, mut left: u64) -> Result<()> {
        let chunk = vec![0x55; CHUNK];
        while left > 0 {
            let count = left.min(CHUNK as u64);
            self.stream
                .write_all(&chunk[..count as usize])
                .with_context(|| format!("send, {left} bytes before the end"))?;
            left -= count;
        }
        self.one()
    }

    fn receive_stream(&mut self, mut left: u64) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        while left > 0 {
            let most = left.min(CHUNK as u64) as usize;
            let count = self
                .stream
                .read(&mut chunk[..most])
                .with_context(|| format!("receive, {left} bytes before the end"))?;
            ensure!(count > 0, "the stream ended {left} bytes early");
            left -= count as u64;
        }
        self.answer()
    }

    fn send_datagrams(&mut self, size: u16, count: u64) -> Result<()> {
        let datagram = vec![0x55; size.into()];
        let mut on_the_way = 0;
        for batch in batches(count) {
            if on_the_way == ON_THE_WAY {
                self.one()?;
                on_the_way -= 1;
            }
            for _ in 0..batch {
                self.datagrams.send(&datagram).context("send a datagram")?;
            }
            on_the_way += 1;
        }
        (0..on_the_way).try_for_each(|_| self.one())
    }

    fn receive_datagrams(&mut self, size: u16, count: u64) -> Result<()> {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        for batch in batches(count) {
            for index in 0..batch {
                let found = self.datagrams.recv(&mut buffer);
                let length = found.with_context(|| format!("receive datagram {index} of a batch of {batch}"))?;
                ensure!(length == usize::from(size), "a datagram has {length} bytes, not {size}");
            }
            self.answer()?;
        }
        Ok(())
    }
}

/// The sizes of the batches of `count` datagrams.
fn batches(count: u64) -> impl Iterator<Item = u64> {
    let batch = BATCH as u64;
    (0..count.div_ceil(batch)).map(move |index| batch.min(count - index * batch))
}

/// Serves one client on `port` until it ends the connection. Says `listening` on standard output.
///
/// # Errors
/// If the client asks for something unknown, or nothing moves for two minutes.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port)).context("listen")?;
    let datagrams = UdpSocket::bind(("0.0.0.0", port)).context("bind")?;
    println!("listening");
    serve_client(&listener, datagrams)
}

fn serve_client(listener: &TcpListener, datagrams: UdpSocket) -> Result<()> {
    let (stream, peer) = listener.accept().context("accept")?;
    let mut end = End::new(stream, datagrams)?;
    loop {
        let mut request = [0; REQUEST];
        match end.stream.read(&mut request[..1]).context("wait for a request")? {
            0 => return Ok(()),
            _ => end.stream.read_exact(&mut request[1..]).context("read a request")?,
        }
        let Request { task, size, count, port } = Request::parse(&request)?;
        end.datagrams.connect((peer.ip(), port)).context("connect the UDP socket")?;
        // The client begins when this end is ready for it.
        end.answer()?;
        match task {
            Task::StreamTo => end.receive_stream(count)?,
            Task::StreamFrom => end.send_stream(count)?,
            Task::DatagramsTo => end.receive_datagrams(size, count)?,
            Task::DatagramsFrom => end.send_datagrams(size, count)?,
            Task::Answers => {
                for _ in 0..count {
                    end.one()?;
                    end.answer()?;
                }
            }
        }
    }
}

/// The end that decides.
pub struct Client {
    end: End,
}

impl Client {
    /// Connects to a [`serve`].
    ///
    /// # Errors
    /// The system's.
    pub fn connect(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, LIMIT).context("connect")?;
        let datagrams = UdpSocket::bind((stream.local_addr()?.ip(), 0)).context("bind")?;
        datagrams.connect(server).context("connect the UDP socket")?;
        Ok(Self { end: End::new(stream, datagrams)? })
    }

    /// Does one task; `each` is called before the first and after each round trip of [`Task::Answers`], and before and after
    /// everything else.
    ///
    /// # Errors
    /// If less arrived than was sent, or nothing for two minutes.
    pub fn run(&mut self, task: Task, size: u16, count: u64, mut each: impl FnMut()) -> Result<()> {
        let port = self.end.datagrams.local_addr()?.port();
        self.end.stream.write_all(&Request { task, size, count, port }.bytes()).context("ask")?;
        self.end.one()?;
        each();
        match task {
            Task::StreamTo => self.end.send_stream(count)?,
            Task::StreamFrom => self.end.receive_stream(count)?,
            Task::DatagramsTo => self.end.send_datagrams(size, count)?,
            Task::DatagramsFrom => self.end.receive_datagrams(size, count)?,
            Task::Answers => {
                for _ in 0..count {
                    self.end.answer()?;
                    self.end.one()?;
                    each();
                }
                return Ok(());
            }
        }
        each();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let request = Request { task: Task::DatagramsTo, size: 1472, count: 1 << 40, port: 65535 };
        assert_eq!(Request::parse(&request.bytes()).unwrap(), request);
        assert!(Request::parse(&[9; REQUEST]).is_err());
    }

    #[test]
    fn the_last_batch_has_the_rest() {
        assert_eq!(batches(70).collect::<Vec<_>>(), [32, 32, 6]);
        assert_eq!(batches(64).collect::<Vec<_>>(), [32, 32]);
        assert_eq!(batches(0).count(), 0);
    }

    #[test]
    fn every_task_moves_all_of_it() {
        // The same port of both protocols: TCP's, if nobody has UDP's.
        let (listener, datagrams) = (0..100)
            .find_map(|_| {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let datagrams = UdpSocket::bind(listener.local_addr().unwrap()).ok()?;
                Some((listener, datagrams))
            })
            .expect("a port that is free for both");
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || serve_client(&listener, datagrams));
        let mut client = Client::connect(address).unwrap();
        for task in [Task::StreamTo, Task::StreamFrom, Task::DatagramsTo, Task::DatagramsFrom, Task::Answers] {
            let mut calls = 0;
            client.run(task, 64, 100, || calls += 1).unwrap();
            assert_eq!(calls, if task == Task::Answers { 101 } else { 2 });
        }
        drop(client);
        server.join().unwrap().unwrap();
    }
}

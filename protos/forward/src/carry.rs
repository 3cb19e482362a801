//! The copying between a TCP connection and a stream, the same on the host and in the guest.
//!
//! Each direction has one buffer and reads only when what it read before is written: a reader that is slow makes its writer wait,
//! through the stream as well, and nobody else.
//!
//! How it ends:
//!
//! | what is met | what is done |
//! |---|---|
//! | TCP: the end (FIN) | the end frame; the other direction goes on |
//! | stream: the end frame | FIN; the other direction goes on |
//! | both ends have come and gone | both are closed |
//! | TCP: reading fails (RST) | the stream is closed, which resets the other side |
//! | stream: closed before both ends, or against the protocol | RST |
//! | TCP: writing fails | what the peer had said before goes to the stream, then the stream is closed |
//! | stream: writing fails | what had come before goes to TCP, then RST |
//!
//! Nothing else closes a connection in good order: a program that is killed here leaves an RST on both sides.

use std::{io, os::fd::AsRawFd, pin::pin, time::Duration};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::frame::{AfterEnd, Frames, Outgoing, Piece};

/// Many connections carry a question and a short answer.
const SMALL_BUFFER: usize = 4 * 1024;
/// For a direction that has filled the small one, bytes. With a second one for the other direction it is what a connection costs.
const BUFFER: usize = 32 * 1024;
/// How long what came before a reset may take to reach its reader.
const LAST_BYTES: Duration = Duration::from_secs(10);

/// Why a connection was reset. Dropping its TCP connection is what resets it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Its TCP connection broke on this side.
    #[error("the TCP connection failed: {0}")]
    Tcp(io::Error),
    /// It was reset, refused or given up on the other side.
    #[error("reset by the other side")]
    Reset,
    /// The stream to the other side failed.
    #[error("the stream failed: {0}")]
    Stream(io::Error),
    /// The other side broke the protocol.
    #[error("the other side sent {0}")]
    Protocol(#[from] AfterEnd),
}

impl Broken {
    fn of_stream(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => Self::Reset,
            _ => Self::Stream(error),
        }
    }

    fn is_of_tcp(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }
}

/// Carries `tcp` over `stream` until both directions have ended.
///
/// # Errors
/// Why it ended before; `tcp` was reset then. If the future is dropped, `tcp` is reset, too.
pub async fn carry(tcp: TcpStream, stream: impl AsyncRead + AsyncWrite) -> Result<(), Broken> {
    // From here on closing it is a reset.
    tcp.set_zero_linger().map_err(Broken::Tcp)?;
    tcp.set_nodelay(true).map_err(Broken::Tcp)?;
    let (from, to) = tokio::io::split(stream);
    tokio::select! {
        carried = both(&tcp, from, to) => carried,
        error = reset_unnoticed(&tcp) => Err(Broken::Tcp(error)),
    }?;
    #[expect(deprecated, reason = "only another duration than none would block")]
    tcp.set_linger(None).map_err(Broken::Tcp)
}

/// Which direction ended first, and how.
enum First<R> {
    Sent(Result<(), Broken>),
    Received(Result<R, Broken>),
}

async fn both(tcp: &TcpStream, from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Result<(), Broken> {
    let mut send = pin!(send(tcp, &mut to));
    let mut receive = pin!(receive(tcp, from));
    let first = tokio::select! {
        sent = &mut send => First::Sent(sent),
        received = &mut receive => First::Received(received),
    };
    match first {
        First::Sent(Ok(())) => receive.await.map(drop),
        First::Received(Ok(from)) => tokio::select! {
            // If both are so, the stream may be closed.
            biased;
            sent = send => sent,
            broken = closed(from) => Err(broken),
        },
        First::Sent(Err(broken)) => {
            if !broken.is_of_tcp() {
                let _ = timeout(LAST_BYTES, receive).await;
            }
            Err(broken)
        }
        First::Received(Err(broken)) => {
            if broken.is_of_tcp() {
                let _ = timeout(LAST_BYTES, send).await;
            }
            Err(broken)
        }
    }
}

/// From TCP to the stream, until TCP's end.
async fn send(tcp: &TcpStream, to: &mut (impl AsyncWrite + Unpin)) -> Result<(), Broken> {
    let mut outgoing = Outgoing::new(SMALL_BUFFER);
    loop {
        let room = outgoing.room();
        let size = room.len();
        let length = read(tcp, room).await.map_err(Broken::Tcp)?;
        to.write_all(outgoing.frame(length)).await.map_err(Broken::of_stream)?;
        if length == 0 {
            return to.flush().await.map_err(Broken::of_stream);
        }
        if length == size {
            outgoing.set_room(BUFFER);
        }
    }
}

/// From the stream to TCP, until the end frame. Gives the stream back.
async fn receive<R: AsyncRead + Unpin>(tcp: &TcpStream, mut from: R) -> Result<R, Broken> {
    let (mut frames, mut buffer) = (Frames::Between, vec![0; SMALL_BUFFER]);
    loop {
        let length = from.read(&mut buffer).await.map_err(Broken::of_stream)?;
        let mut bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            return Err(Broken::Reset);
        }
        while let Some(piece) = frames.next(&mut bytes)? {
            match piece {
                Piece::Payload(payload) => write_all(tcp, payload).await.map_err(Broken::Tcp)?,
                Piece::End => {
                    shutdown(tcp.as_raw_fd(), Shutdown::Write).map_err(|error| Broken::Tcp(error.into()))?;
                }
            }
        }
        if frames == Frames::Ended {
            return Ok(from);
        }
        if length == buffer.len() {
            buffer.resize(BUFFER, 0);
        }
    }
}

async fn read(tcp: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
    loop {
        tcp.readable().await?;
        match tcp.try_read(room) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write_all(tcp: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        tcp.writable().await?;
        match tcp.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => bytes = bytes.get(written?..).unwrap_or_default(),
        }
    }
    Ok(())
}

/// Waits until the stream is closed, after the end frame has come.
async fn closed(mut from: impl AsyncRead + Unpin) -> Broken {
    match from.read(&mut [0]).await {
        Ok(0) => Broken::Reset,
        Ok(_) => AfterEnd.into(),
        Err(error) => Broken::of_stream(error),
    }
}

/// A peer that has reset the connection while nothing is read from it, because the other side does not go on reading.
async fn reset_unnoticed(tcp: &TcpStream) -> io::Error {
    let ready = tcp.ready(Interest::ERROR).await;
    sleep(LAST_BYTES).await;
    ready.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

//! Streams from the host into the guest, through the Unix socket of the hybrid vsock device: connect, write
//! `CONNECT <guest port>\n`, read `OK <host port>\n`, and the rest of the connection is the stream. The host port is the
//! stream's name in the guest: the agent sees it as the peer's port.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open},
    sys::{
        socket::{MsgFlags, recv},
        stat::Mode,
    },
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
    time::timeout,
};

/// How long the guest may take to accept a stream. The agent's accept loop does nothing else.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest answer line, bytes: `OK 4294967295\n`.
const MAX_LINE: usize = 14;

/// A stream that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The socket.
    #[error("cannot reach the machine's vsock socket: {0}")]
    Socket(#[from] io::Error),
    /// No answer in time.
    #[error("the guest did not accept a stream to port {0} within {LIMIT:?}")]
    TooLong(u32),
    /// Nobody listens there, or the machine has ended.
    #[error("the guest refused a stream to port {0}")]
    Refused(u32),
    /// No such answer.
    #[error("unexpected answer of the machine's vsock socket to CONNECT {0}")]
    Answer(u32),
}

/// Opens streams to one machine's guest.
#[derive(Debug)]
pub struct Dialer {
    /// The socket's directory. A path through this descriptor is short, whatever the pod is called.
    directory: OwnedFd,
}

impl Dialer {
    /// For the socket `vsock.sock` in `directory`.
    ///
    /// # Errors
    /// If there is no such directory.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { directory: open(directory, flags, Mode::empty())? })
    }

    fn path(&self) -> String {
        format!("/proc/self/fd/{}/vsock.sock", self.directory.as_raw_fd())
    }

    /// The listening socket for the monitor.
    ///
    /// # Errors
    /// If it cannot be bound.
    pub fn listen(&self) -> io::Result<OwnedFd> {
        Ok(std::os::unix::net::UnixListener::bind(self.path())?.into())
    }

    /// Opens a stream to `port`: the stream and its host port.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn dial(&self, port: u32) -> Result<(UnixStream, u32), DialError> {
        timeout(LIMIT, self.handshake(port)).await.map_err(|_| DialError::TooLong(port))?
    }

    async fn handshake(&self, port: u32) -> Result<(UnixStream, u32), DialError> {
        let mut stream = UnixStream::connect(self.path()).await?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let mut line = Vec::with_capacity(MAX_LINE);
        while line.last() != Some(&b'\n') {
            let room = MAX_LINE.saturating_sub(line.len());
            if room == 0 {
                return Err(DialError::Answer(port));
            }
            match stream.async_io(Interest::READABLE, || take_line(&stream, room)).await {
                Ok(part) if part.is_empty() => return Err(DialError::Refused(port)),
                Ok(part) => line.extend(part),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(DialError::Refused(port)),
                Err(error) => return Err(error.into()),
            }
        }
        let host_port = parse_ok(&line).ok_or(DialError::Answer(port))?;
        Ok((stream, host_port))
    }
}

/// Takes what has arrived, up to the end of the line and not a byte more: what follows belongs to the stream's user.
fn take_line(stream: &UnixStream, room: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; room];
    let peeked = recv(stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
    let line = bytes.iter().take(peeked).position(|&byte| byte == b'\n').map_or(peeked, |end| end + 1);
    bytes.truncate(line);
    recv(stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
    Ok(bytes)
}

fn parse_ok(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"OK ")?.strip_suffix(b"\n")?;
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // Port 0 means "no stream" in the agent's calls.
    (port != 0).then_some(port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::{io::AsyncReadExt, net::UnixListener};

    use super::*;

    fn listening(directory: &Path) -> (Dialer, UnixListener) {
        let dialer = Dialer::new(directory).unwrap();
        let listener = std::os::unix::net::UnixListener::from(dialer.listen().unwrap());
        listener.set_nonblocking(true).unwrap();
        (dialer, UnixListener::from_std(listener).unwrap())
    }

    #[tokio::test]
    async fn the_first_bytes_of_the_stream_are_not_swallowed() {
        let directory = tempfile::tempdir().unwrap();
        let (dialer, listener) = listening(directory.path());
        let monitor = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1025\n");
            stream.write_all(b"OK 7").await.unwrap();
            stream.write_all(b"3\nhello").await.unwrap();
        });
        let (mut stream, port) = dialer.dial(1025).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!((port, text.as_str()), (73, "hello"));
        monitor.await.unwrap();
    }

    #[tokio::test]
    async fn a_closed_connection_is_a_refusal_and_garbage_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (dialer, listener) = listening(directory.path());
        tokio::spawn(async move {
            drop(listener.accept().await.unwrap());
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\n").await.unwrap();
            std::future::pending::<()>().await;
        });
        assert!(matches!(dialer.dial(9).await, Err(DialError::Refused(9) | DialError::Socket(_))));
        assert!(matches!(dialer.dial(9).await, Err(DialError::Answer(9))));
    }

    proptest! {
        #[test]
        fn only_the_exact_answer_counts(line in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Some(port) = parse_ok(&line) {
                let text = String::from_utf8(line).unwrap();
                prop_assert_eq!(text[3..text.len() - 1].parse::<u32>().unwrap(), port);
            }
        }
    }
}

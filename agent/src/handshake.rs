//! The talk between the agent and a stage over one inherited Unix stream socket.
//!
//! ```text
//! agent                                stage (the socket is its descriptor 0)
//!   │ ── plan + descriptors ──────────►  │
//!   │ ◄─ Terminal (+ its master side) ─  │  where others live in the pid namespace already, before it has a child there
//!   │ ◄─ Born(pid) ────────────────────  │  with namespaces that hold from birth on only: its child is the container's
//!   │ ── seen ────────────────────────►  │  process and goes on, and it ends
//!   │                                    │  prepares (before Born where others live in the pid namespace already)
//!   │ ◄─ Ready (+ terminal) ───────────  │  waits          or ◄─ Failed, and the stage ends
//!   │ ── go ──────────────────────────►  │  execs
//!   │ ◄─ end of stream ────────────────  │  the socket closed on exec: the program runs
//!   │                                    │                 or ◄─ Failed, and the stage ends
//! ```
//!
//! Processes that the stage makes for itself answer it in the same form, with Ready or Failed (stage/joined.rs).
//!
//! A frame is a little-endian u32 length and that many bytes of postcard; descriptors travel with the length. Passing
//! them this way keeps every descriptor of the agent close-on-exec at all times, so none can leak into a
//! process that another task starts in between.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::net::UnixStream as StdStream,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
};

use crate::plan::{Failure, Plan};

/// The largest frame, bytes: a specification of 1 MiB and what its plan adds.
pub const MAX_FRAME: usize = 4 * 1024 * 1024;
/// The most descriptors beside one frame: one for each kind of namespace and three standard ones.
const MAX_FDS: usize = 11;
const GO: u8 = 1;
const SEEN: u8 = 2;

/// What a stage says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The process with this number in the agent's pid namespace takes over. It is this stage's child until the agent
    /// has said that it knows, and the agent checks that: the child has this socket as well, and from its birth on a
    /// process of its pid namespace may use it in its place.
    Born(i32),
    /// The terminal's master side comes beside it. The first of all replies, or none.
    Terminal,
    /// Prepared; the next is exec. A terminal's master side comes beside it, unless it came before.
    Ready,
    /// It ends now.
    Failed(Failure),
}

fn header(length: usize) -> io::Result<[u8; 4]> {
    match u32::try_from(length) {
        Ok(n) if length <= MAX_FRAME => Ok(n.to_le_bytes()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("frame of {length} bytes exceeds {MAX_FRAME}"))),
    }
}

fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(message).map_err(io::Error::other)
}

fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> io::Result<T> {
    postcard::from_bytes(body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn send_header(socket: BorrowedFd<'_>, header: [u8; 4], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage] = if raw.is_empty() { &[] } else { &rights };
    let sent =
        sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&header)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    // Four bytes into a stream socket's buffer go whole or not at all.
    if sent == header.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Returns the frame's length and its descriptors, or None at the end of the stream.
fn receive_header(socket: BorrowedFd<'_>) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut bytes = [0u8; 4];
    let mut fds = Vec::new();
    let received = {
        let mut space = nix::cmsg_space!([i32; MAX_FDS]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just installed these descriptors for us; nothing else owns them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    match received {
        0 => Ok(None),
        4 => match u32::from_le_bytes(bytes) as usize {
            length if length <= MAX_FRAME => Ok(Some((length, fds))),
            length => Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes"))),
        },
        // The sender writes the header in one call, so the kernel never splits it.
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct AgentEnd(UnixStream);

impl AgentEnd {
    /// Takes the agent's end of the pair.
    ///
    /// # Errors
    /// If the socket cannot be registered with the runtime.
    pub fn new(socket: StdStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(socket)?))
    }

    /// Sends the plan with its descriptors: for an exec first the container's pidfd, for an init process the namespaces
    /// that it joins; then, without a terminal, stdin, stdout and stderr.
    ///
    /// # Errors
    /// If the stage has ended, or the plan is larger than [`MAX_FRAME`].
    pub async fn send_plan(&mut self, plan: &Plan, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = encode(plan)?;
        let header = header(body.len())?;
        self.0.async_io(Interest::WRITABLE, || send_header(self.0.as_fd(), header, fds)).await?;
        self.0.write_all(&body).await
    }

    /// Lets the stage enter its program.
    ///
    /// # Errors
    /// If the stage has ended.
    pub async fn send_go(&mut self) -> io::Result<()> {
        self.0.write_all(&[GO]).await
    }

    /// Answers [`Reply::Born`].
    ///
    /// # Errors
    /// If the stage has ended.
    pub async fn send_seen(&mut self) -> io::Result<()> {
        self.0.write_all(&[SEEN]).await
    }

    /// The stage's next reply, or None at the end of the stream.
    ///
    /// # Errors
    /// If the reply is malformed.
    pub async fn receive(&mut self) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
        let received = self.0.async_io(Interest::READABLE, || receive_header(self.0.as_fd())).await?;
        let Some((length, fds)) = received else { return Ok(None) };
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await?;
        Ok(Some((decode(&body)?, fds.into_iter().next())))
    }
}

/// The stage's end.
#[derive(Debug)]
pub struct StageEnd(StdStream);

impl StageEnd {
    /// Takes the stage's end of the pair.
    pub fn new(socket: StdStream) -> Self {
        Self(socket)
    }

    /// Waits for the plan.
    ///
    /// # Errors
    /// If the agent has gone, or the plan is malformed.
    pub fn receive_plan(&mut self) -> io::Result<(Plan, Vec<OwnedFd>)> {
        let (length, fds) = receive_header(self.0.as_fd())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((decode(&body)?, fds))
    }

    /// The next reply of a process that the stage has made for itself, or None at the end of the stream.
    ///
    /// # Errors
    /// If the reply is malformed.
    pub fn receive(&mut self) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
        let Some((length, fds)) = receive_header(self.0.as_fd())? else { return Ok(None) };
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(Some((decode(&body)?, fds.into_iter().next())))
    }

    /// Waits for leave to enter the program.
    ///
    /// # Errors
    /// If the agent has gone.
    pub fn receive_go(&mut self) -> io::Result<()> {
        self.receive_byte(GO)
    }

    /// Waits until the agent knows what [`Reply::Born`] reports.
    ///
    /// # Errors
    /// If the agent has gone.
    pub fn receive_seen(&mut self) -> io::Result<()> {
        self.receive_byte(SEEN)
    }

    fn receive_byte(&mut self, expected: u8) -> io::Result<()> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        if byte == [expected] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Sends a reply, with the master side of a terminal beside it if there is one.
    ///
    /// # Errors
    /// If the agent has gone.
    pub fn send(&mut self, reply: &Reply, terminal: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let body = encode(reply)?;
        send_header(self.0.as_fd(), header(body.len())?, terminal.as_slice())?;
        self.0.write_all(&body)
    }
}

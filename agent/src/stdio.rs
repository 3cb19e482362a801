//! The standard streams of one process: pipes or a terminal on the process's side, vsock streams on the host's, and the
//! copying between them.
//!
//! ```text
//!   host stream ──► stdin pipe ──► process ──► stdout pipe ──► host stream
//!   end of stream    ▼ closed                    end of pipe    ▼ half-closed after the last byte
//! ```
//!
//! Each direction is a task of its own with one buffer: it reads only when what it read before is written, so a reader
//! that stalls makes its writer wait, as on a pipe, and nobody else. The tasks end with their streams, not with the
//! process: a child that keeps stdout open keeps exactly that stream.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{fcntl, unistd};
use rustix::{
    pty::{OpenptFlags, ioctl_tiocgptpeer},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, unix::AsyncFd},
    task::AbortHandle,
};

use crate::{plan::UserPlan, transport::ByteStream};

/// Most streams carry a few lines.
const SMALL_BUFFER: usize = 4 * 1024;
/// As much as a pipe holds, for a stream that has filled the small one.
const BUFFER: usize = 64 * 1024;
/// How long the host has to close its side after the last byte of output.
const LINGER: Duration = Duration::from_secs(10);

/// The streams that a process's Create or Exec named.
#[derive(Default)]
pub struct HostStreams {
    /// To the process.
    pub stdin: Option<Box<dyn ByteStream>>,
    /// From the process.
    pub stdout: Option<Box<dyn ByteStream>>,
    /// From the process.
    pub stderr: Option<Box<dyn ByteStream>>,
}

/// The agent's hold on a process's streams.
#[derive(Debug)]
pub struct Handle {
    _input: Option<Input>,
    terminal: Option<std::sync::Arc<AsyncFd<OwnedFd>>>,
    /// The terminal's other side: as long as somebody has it open, it does not hang up. A program may close its console and
    /// open it again.
    held: Option<OwnedFd>,
}

impl Handle {
    /// The process has ended: its terminal hangs up when nobody else has it open.
    pub fn ended(&mut self) {
        self.held = None;
    }

    /// Sets the terminal's size. False if there is none.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else { return Ok(false) };
        tcsetwinsize(terminal.get_ref(), Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 })?;
        Ok(true)
    }
}

/// The copying of a process's input, which ends at the latest when the process is forgotten.
#[derive(Debug)]
struct Input(AbortHandle);

impl Input {
    fn start(from: Box<dyn ByteStream>, to: Descriptor) -> Self {
        Self(tokio::spawn(copy_input(from, to)).abort_handle())
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes the pipes of a process without a terminal and starts copying. Returns the process's descriptors 0, 1 and 2.
///
/// The pipes belong to the process's user, so that it may open /dev/stdout anew.
///
/// # Errors
/// If the kernel refuses a pipe.
pub fn pipes(streams: HostStreams, user: &UserPlan) -> io::Result<([OwnedFd; 3], Handle)> {
    let (stdin, input) = match streams.stdin {
        None => (null()?, None),
        Some(stream) => {
            let (theirs, ours) = pipe(user)?;
            (theirs, Some(Input::start(stream, Descriptor::new(ours)?)))
        }
    };
    let output = |stream: Option<Box<dyn ByteStream>>| match stream {
        None => null(),
        Some(stream) => {
            let (ours, theirs) = pipe(user)?;
            tokio::spawn(output_and_linger(Descriptor::new(ours)?, stream));
            Ok::<_, io::Error>(theirs)
        }
    };
    let stdout = output(streams.stdout)?;
    let stderr = output(streams.stderr)?;
    Ok(([stdin, stdout, stderr], Handle { _input: input, terminal: None, held: None }))
}

/// Starts copying between a terminal's master side and its streams.
///
/// # Errors
/// If the terminal cannot be registered with the runtime, or its other side not be opened.
pub fn terminal(streams: HostStreams, master: OwnedFd) -> io::Result<Handle> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let held = Some(ioctl_tiocgptpeer(&master, flags)?);
    let master = Descriptor::new(master)?;
    let input = streams.stdin.map(|stream| Input::start(stream, master.clone()));
    let handle = Handle { _input: input, terminal: Some(master.0.clone()), held };
    tokio::spawn(terminal_output(master, streams.stdout));
    Ok(handle)
}

/// Copies what a terminal shows. Without a reader, or after it has gone, the terminal must not fill up and stop the
/// process.
async fn terminal_output(master: Descriptor, stream: Option<impl AsyncWrite + Unpin>) {
    if let Some(stream) = stream {
        copy_output(master.clone(), stream).await;
    }
    copy_output(master, tokio::io::sink()).await;
}

/// A pipe that belongs to the user: read end, write end.
fn pipe(user: &UserPlan) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = unistd::pipe2(fcntl::OFlag::O_CLOEXEC)?;
    // Both ends are one inode.
    unistd::fchown(&read, Some(user.uid.into()), Some(user.gid.into()))?;
    Ok((read, write))
}

fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

async fn copy_input(mut from: Box<dyn ByteStream>, mut to: Descriptor) {
    let mut buffer = vec![0; SMALL_BUFFER];
    loop {
        // Dropping the pipe's end at a return is the process's end of input.
        match from.read(&mut buffer).await.ok().and_then(|length| buffer.get(..length)) {
            None | Some([]) => return,
            Some(bytes) if to.write_all(bytes).await.is_err() => return,
            Some(bytes) if bytes.len() == SMALL_BUFFER => buffer.resize(BUFFER, 0),
            Some(_) => {}
        }
    }
}

/// Copies, and then keeps the stream until the host has closed its side too, so that nothing still on its way is cut
/// off.
async fn output_and_linger(from: Descriptor, mut stream: Box<dyn ByteStream>) {
    copy_output(from, &mut stream).await;
    let ended = async { while stream.read(&mut [0; 64]).await.is_ok_and(|length| length > 0) {} };
    // A host that never closes loses nothing by our closing.
    let _ = tokio::time::timeout(LINGER, ended).await;
}

async fn copy_output(mut from: Descriptor, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; SMALL_BUFFER];
    loop {
        // A terminal whose last user has gone answers EIO.
        match from.read(&mut buffer).await.ok().and_then(|length| buffer.get(..length)) {
            None | Some([]) => break,
            // The host has gone: closing our end tells the writer so, as on any pipe.
            Some(bytes) if to.write_all(bytes).await.is_err() => break,
            Some(bytes) if bytes.len() == SMALL_BUFFER => buffer.resize(BUFFER, 0),
            Some(_) => {}
        }
    }
    // Nothing can be done about a host that does not want the end of the stream.
    let _ = to.shutdown().await;
}

/// A pipe or terminal in the runtime. Clones share the descriptor.
#[derive(Clone)]
struct Descriptor(std::sync::Arc<AsyncFd<OwnedFd>>);

impl Descriptor {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: the OwnedFd keeps its descriptor open, and its number the same, for as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self(std::sync::Arc::new(fd)))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for Descriptor {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            match guard.try_io(|_| Ok(rustix::io::read(self.fd(), buffer.initialize_unfilled())?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result.map(|length| buffer.advance(length))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Descriptor {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|_| Ok(rustix::io::write(self.fd(), bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

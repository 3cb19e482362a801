//! A process's standard input: the FIFO that the client writes, and when it ends.
//!
//! A client that opens the FIFO with a Go library waits in open(2) until the shim opens it too, and can only call CloseIO
//! once Create or Exec has been answered, because not before does it know the process. So the shim reads nothing before
//! Start, when every client knows the process, and holds the FIFO open for writing only from then on:
//!
//! ```text
//!              client's writers when Start comes                 the input ends
//!   init       came and went already (POLLHUP)                   after what they wrote
//!   both       some have it open, or wait in open(2)             after CloseIO and the last writer
//!   both       none, and none in the first OPEN_LIMIT after      then: nothing will ever be written (`ctr … </dev/null`)
//! ```
//!
//! A terminal's input is held open from Start in any case: it ends with its process, and a client may attach to it at any time.
//!
//! An init process's FIFO is opened for reading at the end of Create already, so that a client may write before Start.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    io::Errno,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::pipe::{OpenOptions, Receiver, Sender},
    },
    sync::watch,
    time::sleep,
};

use super::copies::BUFFER;

/// How long after Start a first writer may take to open the FIFO. Clients of containerd wait in open(2) before they call Create
/// or Exec; one that has nothing to write has closed the FIFO by then and never comes back.
pub const OPEN_LIMIT: Duration = Duration::from_secs(2);

/// The FIFO, found but not open in either direction: its writers still wait.
#[derive(Debug)]
pub struct Fifo(File);

impl Fifo {
    /// Finds the FIFO at `path`.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn find(path: &str) -> io::Result<Self> {
        let file = File::from(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::Fifo => Ok(Self(file)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a FIFO")),
        }
    }

    /// Its path for as long as this value lives, even if the client has removed the name.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    fn reader(&self) -> io::Result<Receiver> {
        OpenOptions::new().open_receiver(self.path())
    }

    fn writer(&self) -> io::Result<Sender> {
        OpenOptions::new().open_sender(self.path())
    }
}

/// The input of a process that was not started yet.
#[derive(Debug)]
pub struct Input {
    fifo: Fifo,
    reader: Option<Receiver>,
    stream: UnixStream,
    terminal: bool,
}

/// What a read from the FIFO finds before the shim itself holds it open for writing.
enum Found {
    /// No writer has it open, nor waits in open(2).
    Nobody,
    /// A writer, and perhaps what it wrote.
    Writer(Vec<u8>),
}

impl Input {
    /// The FIFO, and the stream to the agent that gets what comes.
    pub fn new(fifo: Fifo, stream: UnixStream, terminal: bool) -> Self {
        Self { fifo, reader: None, stream, terminal }
    }

    /// Lets writers open the FIFO and fill it.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&mut self) -> io::Result<()> {
        self.reader = Some(self.fifo.reader()?);
        Ok(())
    }

    /// Copies to the end of the input. `closing` becomes true with CloseIO; `limit` is [`OPEN_LIMIT`].
    ///
    /// # Errors
    /// The FIFO's or the stream's.
    pub async fn copy(self, mut closing: watch::Receiver<bool>, limit: Duration) -> io::Result<()> {
        let Self { fifo, reader, mut stream, terminal } = self;
        let has_ended = !terminal && reader.as_ref().is_some_and(has_hung_up);
        let mut reader = match reader {
            Some(reader) => reader,
            None => fifo.reader()?,
        };
        let mut holder = None;
        if !has_ended {
            let first = if terminal { Some(Vec::new()) } else { first_writer(&reader, limit).await? };
            if let Some(bytes) = first {
                // Held before anything is passed on, so that the writer's close alone does not end the input.
                holder = Some(fifo.writer()?);
                // Registered anew: of a FIFO that once had no writer the runtime remembers for ever that it is at its end.
                reader = Receiver::from_owned_fd(reader.into_nonblocking_fd()?)?;
                stream.write_all(&bytes).await?;
            } else {
                return stream.shutdown().await;
            }
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = tokio::select! {
                biased;
                _ = closing.wait_for(|close| *close), if holder.is_some() => {
                    // Without the holder the FIFO ends after what its writers have written and with the last of them.
                    holder = None;
                    continue;
                }
                read = reader.read(&mut buffer) => read?,
            };
            match buffer.get(..read) {
                None | Some([]) => return stream.shutdown().await,
                Some(bytes) => stream.write_all(bytes).await?,
            }
        }
    }
}

/// Waits for a first writer: what it has written by then, or None if the input is over without one.
async fn first_writer(reader: &Receiver, limit: Duration) -> io::Result<Option<Vec<u8>>> {
    if let Found::Writer(bytes) = look(reader)? {
        return Ok(Some(bytes));
    }
    tokio::select! {
        biased;
        // It wrote, or it came and went after Start.
        readable = reader.readable() => return readable.map(|()| Some(Vec::new())),
        () = sleep(limit) => {}
    }
    // A writer that has the FIFO open but is silent makes nothing readable.
    Ok(match look(reader)? {
        Found::Nobody => None,
        Found::Writer(bytes) => Some(bytes),
    })
}

/// Whether writers were there and have all gone.
fn has_hung_up(reader: &Receiver) -> bool {
    let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    let events = poll(&mut polled, PollTimeout::ZERO).ok().and_then(|_| polled[0].revents());
    events.is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// pipe(7): without any writer a read finds the end, with one it would wait. A writer that waits in open(2) counts (fs/pipe.c,
/// `fifo_open`).
fn look(reader: &Receiver) -> io::Result<Found> {
    let mut buffer = vec![0; BUFFER];
    match rustix::io::read(reader, buffer.as_mut_slice()) {
        Ok(0) => Ok(Found::Nobody),
        Ok(read) => {
            buffer.truncate(read);
            Ok(Found::Writer(buffer))
        }
        Err(Errno::AGAIN) => Ok(Found::Writer(Vec::new())),
        Err(errno) => Err(errno.into()),
    }
}

//! The copy loops of one process's streams.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use slog::{Logger as Log, debug, warn};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};

use super::{
    Connected, Sink,
    input::{Input, OPEN_LIMIT},
    logger::Logger,
};

/// Bytes that one read takes at most; a FIFO holds 64 KiB.
pub(super) const BUFFER: usize = 32 * 1024;

/// How often progress is looked at, while there is some to be made.
const LOOK: Duration = Duration::from_millis(50);

/// Called once, when the first byte of output has come.
pub type FirstOutput = Arc<dyn Fn() + Send + Sync>;

impl Connected {
    /// Lets it flow.
    pub fn copy(self, first_output: Option<FirstOutput>) -> Copies {
        let (mut outputs, mut progresses) = (JoinSet::new(), Vec::new());
        for (name, output) in ["stdout", "stderr"].into_iter().zip(self.outputs) {
            let Some((sink, stream)) = output else { continue };
            // The guest's end of this stream was half-closed by nobody: the shim writes nothing to it.
            let (log, first) = (self.log.clone(), first_output.clone());
            let (progress, open) = Progress::new(&sink);
            progresses.push(progress.clone());
            outputs.spawn(async move {
                let _open = open;
                let copied = match sink {
                    Sink::Pipe(pipe) => pump(stream, pipe, first, &progress).await,
                    Sink::File(file) => pump(stream, file, first, &progress).await,
                };
                if let Err(error) = copied {
                    warn!(log, "output cannot be written any more"; "stream" => name, "error" => %error);
                }
            });
        }
        let (drained, done) = watch::channel(false);
        let outputs = tokio::spawn(async move {
            while outputs.join_next().await.is_some() {}
            let _ = drained.send(true);
        });
        Copies {
            close: watch::Sender::new(false),
            input: Mutex::new(self.stdin),
            done,
            progresses,
            given_up: Arc::default(),
            outputs: outputs.abort_handle(),
            stdin: Mutex::new(None),
            loggers: self.loggers,
            log: self.log,
        }
    }
}

/// How long output that has not reached its reader is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a reader that has not gone on reading what is there.
    pub reader: Duration,
    /// For more to come, or the end: somebody in the guest may still have the stream.
    pub writer: Duration,
    /// In all, also while output moves: what a process has left running may write for ever.
    pub total: Duration,
}

/// As long as it moves, and so long beyond.
impl From<Duration> for Patience {
    fn from(stall: Duration) -> Self {
        Self { reader: stall, writer: stall, total: Duration::MAX }
    }
}

/// How far the output of one stream has come on its way to its reader.
#[derive(Clone, Debug)]
struct Progress {
    /// Bytes that were written into the FIFO or file.
    written: Arc<AtomicU64>,
    /// The pipe, to ask how much its reader has left in it. Weak: what holds it open ends with the copy.
    pipe: Weak<OwnedFd>,
}

impl Progress {
    /// And what must live as long as the copy.
    fn new(sink: &Sink) -> (Self, Option<Arc<OwnedFd>>) {
        let pipe = match sink {
            Sink::Pipe(pipe) => pipe.as_fd().try_clone_to_owned().ok().map(Arc::new),
            Sink::File(_) => None,
        };
        let weak = pipe.as_ref().map_or_else(Weak::new, Arc::downgrade);
        (Self { written: Arc::default(), pipe: weak }, pipe)
    }

    /// The bytes that have left for their reader, and whether others wait in the pipe for it.
    fn look(&self) -> (u64, bool) {
        let unread = self.pipe.upgrade().and_then(|pipe| rustix::io::ioctl_fionread(pipe).ok()).unwrap_or(0);
        (self.written.load(Ordering::Relaxed).wrapping_sub(unread), unread > 0)
    }
}

/// Copies until the end of `from`, then ends `to`; or until `to` takes no more.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut first: Option<FirstOutput>,
    progress: &Progress,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    // An error is an end, too: the machine's.
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if let Some(first) = first.take() {
            first();
        }
        let mut bytes = buffer.get(..read).unwrap_or_default();
        while !bytes.is_empty() {
            let written = to.write(bytes).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = bytes.get(written..).unwrap_or_default();
            progress.written.fetch_add(written as u64, Ordering::Relaxed);
        }
    }
    to.flush().await?;
    to.shutdown().await
}

/// The copies of one process; output flows from the beginning, input from [`Self::start_input`] on. Dropped, they end at
/// once, and their loggers with them.
#[derive(Debug)]
pub struct Copies {
    /// True after CloseIO.
    close: watch::Sender<bool>,
    /// Until the start.
    input: Mutex<Option<Input>>,
    done: watch::Receiver<bool>,
    progresses: Vec<Progress>,
    /// Output was waited for too long.
    given_up: Arc<AtomicBool>,
    outputs: AbortHandle,
    stdin: Mutex<Option<AbortHandle>>,
    loggers: Vec<Logger>,
    log: Log,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    /// Lets the client's writers open the input and write before the process is started: the last act of Create.
    pub fn open_input(&self) {
        let mut input = lock(&self.input);
        if let Some(Err(error)) = input.as_mut().map(Input::open) {
            warn!(self.log, "cannot open the stdin FIFO: the process gets an empty input"; "error" => %error);
            // Dropped, the stream to the agent ends.
            *input = None;
        }
    }

    /// Lets the input flow. Called once, when the process is started: whoever writes it knows the process by now and can
    /// call CloseIO.
    pub fn start_input(&self) {
        self.start_input_within(OPEN_LIMIT);
    }

    pub(super) fn start_input_within(&self, limit: Duration) {
        let Some(input) = lock(&self.input).take() else { return };
        let (closing, log) = (self.close.subscribe(), self.log.clone());
        let copy = tokio::spawn(async move {
            if let Err(error) = input.copy(closing, limit).await {
                debug!(log, "input is not read any more"; "error" => %error);
            }
        });
        *lock(&self.stdin) = Some(copy.abort_handle());
    }

    /// Ends the input after what the client has written, when the client has closed its end. It may come before the
    /// process is started.
    pub fn close_stdin(&self) {
        self.close.send_replace(true);
    }

    /// Waits until all output is with its readers, for as long as `patience` says. Something that holds the output in
    /// the guest, or a client that does not read, must not hold up an exit or a Delete. False if it was given up, which is
    /// not waited for a second time.
    pub fn drained(&self, patience: Patience) -> impl Future<Output = bool> + use<> {
        let (mut done, progresses, given_up) = (self.done.clone(), self.progresses.clone(), Arc::clone(&self.given_up));
        let patience = if given_up.load(Ordering::Relaxed) { Duration::ZERO.into() } else { patience };
        async move {
            let look = || progresses.iter().map(Progress::look).collect::<Vec<_>>();
            let (begun, mut before, mut since) = (Instant::now(), look(), Instant::now());
            while timeout(LOOK, done.wait_for(|done| *done)).await.is_err() {
                let now = look();
                let is_unread = now.iter().any(|(_, is_unread)| *is_unread);
                if now != before {
                    (before, since) = (now, Instant::now());
                }
                let limit = if is_unread { patience.reader } else { patience.writer };
                if since.elapsed() >= limit || begun.elapsed() >= patience.total {
                    let is_late = is_unread || begun.elapsed() >= patience.total;
                    given_up.fetch_or(is_late, Ordering::Relaxed);
                    return false;
                }
            }
            true
        }
    }

    /// Ends them, and gives the loggers their time to end.
    pub async fn end(mut self, log: &Log) {
        self.abort();
        for logger in self.loggers.drain(..) {
            logger.end(log).await;
        }
    }

    #[cfg(test)]
    pub(super) fn loggers(&self) -> usize {
        self.loggers.len()
    }

    fn abort(&self) {
        self.outputs.abort();
        if let Some(stdin) = lock(&self.stdin).take() {
            stdin.abort();
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.abort();
    }
}

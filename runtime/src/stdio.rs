//! A process's standard streams: FIFOs that containerd's client made on one side, vsock streams to the agent on the
//! other, and a copy loop between each two. Nothing is buffered beyond one buffer a stream, so a reader that stalls
//! stalls its own stream, and in the end the writer in the guest, as a pipe would.
//!
//! ```text
//!   client ──stdin FIFO──► shim ──stream──► agent ──► process      end of FIFO: half-close
//!   client ◄─stdout FIFO── shim ◄─stream─── agent ◄── process      end of stream: the FIFO is closed
//! ```
//!
//! As containerd's own shim does, this end holds an output FIFO open for reading too, so that a client may go and come
//! back, and holds an input FIFO open for writing until CloseIO, so that the input ends when somebody says so.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use caisson_protos::{agent, guest::STDIO_PORT};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{
        UnixStream,
        unix::pipe::{OpenOptions, Receiver, Sender},
    },
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::dial::{DialError, Dialer};

/// Bytes that one read takes at most; a FIFO holds 64 KiB.
const BUFFER: usize = 32 * 1024;

/// Where a process's streams go, as containerd said it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Path of the FIFO, or empty.
    pub stdin: String,
    /// The same.
    pub stdout: String,
    /// The same; ignored with a terminal.
    pub stderr: String,
    /// One pseudo-terminal instead of three pipes.
    pub terminal: bool,
}

impl Stdio {
    /// The fields of a request.
    pub fn new(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Self {
        Self { stdin: stdin.to_owned(), stdout: stdout.to_owned(), stderr: stderr.to_owned(), terminal }
    }
}

/// A stream that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The FIFO.
    #[error("cannot open the {stream} FIFO {path}: {source}")]
    Open {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A log URI.
    #[error("{stream} {uri}: the scheme {scheme} is not supported, pass a FIFO")]
    Scheme {
        /// stdout or stderr.
        stream: &'static str,
        /// All of it.
        uri: String,
        /// The part before the colon.
        scheme: String,
    },
    /// The guest's side.
    #[error(transparent)]
    Dial(#[from] DialError),
}

/// Opened FIFOs. Opening never waits for the other side.
#[derive(Debug)]
pub struct Fifos {
    stdin: Option<(Receiver, Sender)>,
    stdout: Option<Sender>,
    stderr: Option<Sender>,
    terminal: bool,
}

impl Fifos {
    /// Opens what `stdio` names.
    ///
    /// # Errors
    /// [`StdioError::Open`] or [`StdioError::Scheme`].
    pub fn open(stdio: &Stdio) -> Result<Self, StdioError> {
        let stderr = if stdio.terminal { "" } else { &stdio.stderr };
        Ok(Self {
            stdin: input(&stdio.stdin)?,
            stdout: output("stdout", &stdio.stdout)?,
            stderr: output("stderr", stderr)?,
            terminal: stdio.terminal,
        })
    }

    /// Opens a stream to the agent for each FIFO.
    ///
    /// # Errors
    /// [`StdioError::Dial`].
    pub async fn connect(self, dialer: &Dialer) -> Result<Connected, StdioError> {
        let dial = |wanted: bool| async move {
            match wanted {
                true => dialer.dial(STDIO_PORT).await.map(Some),
                false => Ok(None),
            }
        };
        let (stdin, stdout, stderr) =
            tokio::try_join!(dial(self.stdin.is_some()), dial(self.stdout.is_some()), dial(self.stderr.is_some()))?;
        let port = |dialled: &Option<(UnixStream, u32)>| dialled.as_ref().map_or(0, |(_, port)| *port);
        let mut ports = agent::Stdio::new();
        (ports.stdin_port, ports.stdout_port, ports.stderr_port) = (port(&stdin), port(&stdout), port(&stderr));
        ports.terminal = self.terminal;
        Ok(Connected {
            ports,
            stdin: self.stdin.zip(stdin.map(|(stream, _)| stream)),
            outputs: [
                self.stdout.zip(stdout.map(|(stream, _)| stream)),
                self.stderr.zip(stderr.map(|(stream, _)| stream)),
            ],
        })
    }
}

fn opened<T>(stream: &'static str, path: &str, result: io::Result<T>) -> Result<T, StdioError> {
    result.map_err(|source| StdioError::Open { stream, path: path.to_owned(), source })
}

fn input(path: &str) -> Result<Option<(Receiver, Sender)>, StdioError> {
    if path.is_empty() {
        return Ok(None);
    }
    let reader = opened("stdin", path, OpenOptions::new().open_receiver(path))?;
    let holder = opened("stdin", path, OpenOptions::new().open_sender(path))?;
    Ok(Some((reader, holder)))
}

fn output(stream: &'static str, path: &str) -> Result<Option<Sender>, StdioError> {
    if path.is_empty() {
        return Ok(None);
    }
    if let Some((scheme, _)) = path.split_once("://") {
        let scheme = scheme.to_owned();
        return Err(StdioError::Scheme { stream, uri: path.to_owned(), scheme });
    }
    opened(stream, path, OpenOptions::new().read_write(true).open_sender(path)).map(Some)
}

/// FIFOs with their streams; nothing flows yet.
#[derive(Debug)]
pub struct Connected {
    /// What the agent is told.
    pub ports: agent::Stdio,
    stdin: Option<((Receiver, Sender), UnixStream)>,
    outputs: [Option<(Sender, UnixStream)>; 2],
}

/// Called once, when the first byte of output has come.
pub type FirstOutput = Arc<dyn Fn() + Send + Sync>;

impl Connected {
    /// Lets it flow.
    pub fn copy(self, first_output: Option<FirstOutput>) -> Copies {
        let mut outputs = JoinSet::new();
        for (fifo, stream) in self.outputs.into_iter().flatten() {
            // The guest's end of this stream was half-closed by nobody: the shim writes nothing to it.
            outputs.spawn(pump(stream, fifo, first_output.clone()));
        }
        let (drained, done) = watch::channel(false);
        let outputs = tokio::spawn(async move {
            while outputs.join_next().await.is_some() {}
            let _ = drained.send(true);
        });
        let (holder, stdin) = match self.stdin {
            Some(((fifo, holder), stream)) => (Some(holder), Some(tokio::spawn(pump(fifo, stream, None)))),
            None => (None, None),
        };
        Copies {
            holder: Mutex::new(holder),
            done,
            tasks: [Some(outputs.abort_handle()), stdin.map(|task| task.abort_handle())],
        }
    }
}

/// Copies until the end of `from`, then ends `to`; or until `to` takes no more.
async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, first: Option<FirstOutput>) {
    let mut first = first;
    let mut buffer = vec![0; BUFFER];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if let Some(first) = first.take() {
            first();
        }
        let Some(bytes) = buffer.get(..read) else { break };
        if to.write_all(bytes).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// The running copies of one process. Dropped, they end at once.
#[derive(Debug)]
pub struct Copies {
    holder: Mutex<Option<Sender>>,
    done: watch::Receiver<bool>,
    tasks: [Option<tokio::task::AbortHandle>; 2],
}

impl Copies {
    /// Ends the input after what the client has written, when the client has closed its end.
    pub fn close_stdin(&self) {
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits until all output is in its FIFOs, but no longer than `limit`: something that still holds the output in the
    /// guest, or a client that does not read, must not hold up a Delete.
    pub fn drained(&self, limit: Duration) -> impl Future<Output = bool> + use<> {
        let mut done = self.done.clone();
        async move { timeout(limit, done.wait_for(|done| *done)).await.is_ok() }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for task in self.tasks.iter().flatten() {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    fn connected(fifos: Fifos) -> (Connected, Vec<UnixStream>) {
        let mut guest = Vec::new();
        let mut pair = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            guest.push(theirs);
            ours
        };
        let connected = Connected {
            ports: agent::Stdio::new(),
            stdin: fifos.stdin.map(|stdin| (stdin, pair())),
            outputs: [fifos.stdout, fifos.stderr].map(|output| output.map(|fifo| (fifo, pair()))),
        };
        (connected, guest)
    }

    #[tokio::test]
    async fn input_ends_only_after_close_io_and_the_clients_own_close() {
        let directory = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdin: fifo(directory.path(), "in"), ..Stdio::default() };
        let (connected, mut guest) = connected(Fifos::open(&stdio).unwrap());
        let mut guest = guest.remove(0);
        let copies = connected.copy(None);
        let mut client = OpenOptions::new().open_sender(&stdio.stdin).unwrap();
        client.write_all(b"one").await.unwrap();
        drop(client);
        let mut buffer = [0; 16];
        assert_eq!(guest.read(&mut buffer).await.unwrap(), 3);
        // A second client may come, because nobody has said that the input is over.
        let mut client = OpenOptions::new().open_sender(&stdio.stdin).unwrap();
        copies.close_stdin();
        client.write_all(b"two").await.unwrap();
        drop(client);
        let mut text = String::new();
        timeout(LIMIT, guest.read_to_string(&mut text)).await.expect("end of input").unwrap();
        assert_eq!(text, "two");
    }

    #[tokio::test]
    async fn output_arrives_whole_and_the_fifo_closes_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
        // Opened before the reader: must not wait for it.
        let fifos = Fifos::open(&stdio).unwrap();
        let path = stdio.stdout.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        });
        let (connected, mut guest) = connected(fifos);
        let seen = Arc::new(Mutex::new(0));
        let count = Arc::clone(&seen);
        let copies = connected.copy(Some(Arc::new(move || *count.lock().unwrap() += 1)));
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut guest = guest.remove(0);
        timeout(LIMIT, guest.write_all(&sent)).await.expect("the reader reads").unwrap();
        drop(guest);
        assert!(copies.drained(LIMIT).await);
        assert_eq!(reader.join().unwrap(), sent);
        assert_eq!(*seen.lock().unwrap(), 1);
    }

    #[tokio::test]
    async fn a_reader_that_stalls_does_not_stall_the_other_stream() {
        let directory = tempfile::tempdir().unwrap();
        let stdio =
            Stdio { stdout: fifo(directory.path(), "out"), stderr: fifo(directory.path(), "err"), ..Stdio::default() };
        let (connected, mut guest) = connected(Fifos::open(&stdio).unwrap());
        let mut reader = OpenOptions::new().open_receiver(&stdio.stderr).unwrap();
        let copies = connected.copy(None);
        let (mut out, mut err) = (guest.remove(0), guest.remove(0));
        let stalled = tokio::spawn(async move { out.write_all(&vec![1; 4 << 20]).await });
        for _ in 0..100 {
            timeout(LIMIT, err.write_all(&[2; 1000])).await.expect("stderr flows").unwrap();
            let mut bytes = [0; 1000];
            timeout(LIMIT, reader.read_exact(&mut bytes)).await.expect("stderr arrives").unwrap();
        }
        assert!(!stalled.is_finished());
        assert!(!copies.drained(Duration::from_millis(10)).await, "the stalled stream is not drained");
    }

    #[tokio::test]
    async fn what_is_not_a_fifo_is_refused_by_name() {
        let missing = Stdio { stdout: "/no/such/fifo".into(), ..Stdio::default() };
        let told = Fifos::open(&missing).unwrap_err().to_string();
        assert!(told.starts_with("cannot open the stdout FIFO /no/such/fifo: "), "{told}");
        let uri = Stdio { stdout: "binary:///bin/logger".into(), ..Stdio::default() };
        assert!(Fifos::open(&uri).unwrap_err().to_string().contains("scheme binary"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        File::options().write(true).create_new(true).mode(0o600).open(&file).unwrap();
        let regular = Stdio { stdin: file.display().to_string(), ..Stdio::default() };
        assert!(Fifos::open(&regular).is_err());
    }
}

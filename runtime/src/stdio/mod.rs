//! A process's standard streams: what containerd names on one side (FIFOs that a client made, a file, a logging program), vsock
//! streams to the agent on the other, and a copy loop between each two. Nothing is buffered beyond one buffer a stream, so a
//! reader that stalls stalls its own stream, and in the end the writer in the guest, as a pipe would.
//!
//! ```text
//!   client ──stdin FIFO──► shim ──stream──► agent ──► process      end of FIFO: half-close
//!   client ◄─stdout FIFO── shim ◄─stream─── agent ◄── process      end of stream: the FIFO is closed
//!      file, logger ◄──────┘
//! ```
//!
//! As containerd's own shim does, this end holds an output FIFO open for reading too, so that a client may go and come
//! back, and holds an input FIFO open for writing until CloseIO, so that the input ends when somebody says so.

mod copies;
pub mod logger;
pub mod target;

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use caisson_protos::{agent, guest::STDIO_PORT};
use slog::Logger as Log;
use tokio::net::{
    UnixStream,
    unix::pipe::{OpenOptions, Receiver, Sender},
};

pub use self::copies::{Copies, FirstOutput};
use self::{
    logger::{Logger, LoggerError, Owner},
    target::{Target, TargetError},
};
use crate::{
    dial::{DialError, Dialer},
    host_view::HostView,
};

/// Where a process's streams go, as containerd said it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Path of the FIFO, or empty.
    pub stdin: String,
    /// Path of a FIFO or file, a log URI, or empty.
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
    /// The file.
    #[error("cannot open the {stream} file {path:?}: {source}")]
    File {
        /// stdout or stderr.
        stream: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that cannot be understood.
    #[error("{stream}: {source}")]
    Target {
        /// stdout or stderr.
        stream: &'static str,
        /// What is wrong with it.
        source: TargetError,
    },
    /// The logging program.
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// The guest's side.
    #[error(transparent)]
    Dial(#[from] DialError),
}

/// Where the host's side of a process's streams is opened, and for whom.
#[derive(Debug)]
pub struct Place<'a> {
    /// Whose streams they are.
    pub owner: Owner<'a>,
    /// Where files are opened and loggers run.
    pub host: &'a HostView,
    /// Where it is told if something is lost later.
    pub log: Log,
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    /// A FIFO, or a pipe to a logger.
    Pipe(Sender),
    /// Written by threads that may wait for the file's disk.
    File(tokio::fs::File),
}

/// The host's side, opened. Opening a FIFO never waits for its other side.
#[derive(Debug)]
pub struct Opened {
    stdin: Option<(Receiver, Sender)>,
    outputs: [Option<Sink>; 2],
    loggers: Vec<Logger>,
    terminal: bool,
    log: Log,
}

impl Opened {
    /// Opens what `stdio` names.
    ///
    /// # Errors
    /// Every [`StdioError`] but Dial.
    pub async fn open(stdio: &Stdio, place: Place<'_>) -> Result<Self, StdioError> {
        let parse = |stream, name| Target::parse(name).map_err(|source| StdioError::Target { stream, source });
        let stdout = parse("stdout", &stdio.stdout)?;
        let stderr = if stdio.terminal { Target::None } else { parse("stderr", &stdio.stderr)? };
        let stdin = input(&stdio.stdin)?;
        let mut loggers = Vec::new();
        let outputs = match (stdout, stderr) {
            // One logger gets both streams, also when only the first has a name.
            (Target::Binary(binary), stderr) if stderr == Target::None || stderr == Target::Binary(binary.clone()) => {
                let (logger, [stdout, stderr]) = logger::start(&binary, place.owner, place.host).await?;
                loggers.push(logger);
                [Some(Sink::Pipe(stdout)), (!stdio.terminal).then_some(Sink::Pipe(stderr))]
            }
            (stdout, stderr) => [
                output("stdout", stdout, &place, &mut loggers).await?,
                output("stderr", stderr, &place, &mut loggers).await?,
            ],
        };
        Ok(Self { stdin, outputs, loggers, terminal: stdio.terminal, log: place.log })
    }

    /// Opens a stream to the agent for each that is wanted.
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
        let [stdout, stderr] = self.outputs;
        let (to_stdin, from_stdout, from_stderr) =
            tokio::try_join!(dial(self.stdin.is_some()), dial(stdout.is_some()), dial(stderr.is_some()))?;
        let port = |dialled: &Option<(UnixStream, u32)>| dialled.as_ref().map_or(0, |(_, port)| *port);
        let mut ports = agent::Stdio::new();
        (ports.stdin_port, ports.stdout_port, ports.stderr_port) =
            (port(&to_stdin), port(&from_stdout), port(&from_stderr));
        ports.terminal = self.terminal;
        Ok(Connected {
            ports,
            stdin: self.stdin.zip(to_stdin.map(|(stream, _)| stream)),
            outputs: [
                stdout.zip(from_stdout.map(|(stream, _)| stream)),
                stderr.zip(from_stderr.map(|(stream, _)| stream)),
            ],
            loggers: self.loggers,
            log: self.log,
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

async fn output(
    stream: &'static str,
    target: Target,
    place: &Place<'_>,
    loggers: &mut Vec<Logger>,
) -> Result<Option<Sink>, StdioError> {
    let sink = match target {
        Target::None => return Ok(None),
        Target::Path(path) => match OpenOptions::new().read_write(true).open_sender(&path) {
            // It is there, but no FIFO.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Sink::File(file(stream, path, false, place.host).await?)
            }
            fifo => Sink::Pipe(opened(stream, &path.to_string_lossy(), fifo)?),
        },
        Target::File(path) => Sink::File(file(stream, path, true, place.host).await?),
        Target::Binary(binary) => {
            let (logger, [stdout, stderr]) = logger::start(&binary, place.owner, place.host).await?;
            loggers.push(logger);
            Sink::Pipe(if stream == "stdout" { stdout } else { stderr })
        }
    };
    Ok(Some(sink))
}

async fn file(stream: &'static str, path: PathBuf, make: bool, host: &HostView) -> Result<tokio::fs::File, StdioError> {
    let at = path.clone();
    let opened = host.run(move || append_to(&at, make)).await.and_then(|file| file);
    let file = opened.map_err(|source| StdioError::File { stream, path, source })?;
    Ok(tokio::fs::File::from_std(file))
}

/// With the modes that containerd's own shim gives files and directories.
fn append_to(path: &Path, make: bool) -> io::Result<File> {
    if let Some(directory) = path.parent().filter(|_| make) {
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    File::options().append(true).create(make).mode(0o644).open(path)
}

/// Both sides; nothing flows yet.
#[derive(Debug)]
pub struct Connected {
    /// What the agent is told.
    pub ports: agent::Stdio,
    stdin: Option<((Receiver, Sender), UnixStream)>,
    outputs: [Option<(Sink, UnixStream)>; 2],
    loggers: Vec<Logger>,
    log: Log,
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Read,
        os::unix::fs::PermissionsExt,
        path::Path,
        sync::{Arc, Mutex},
        time::Duration,
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    async fn open(stdio: &Stdio) -> Result<Opened, StdioError> {
        let host = HostView::here().unwrap();
        let log = caisson_log::logger("shim", io::sink(), slog::Level::Debug);
        Opened::open(stdio, Place { owner: Owner { id: "one", namespace: "ns" }, host: &host, log }).await
    }

    /// With the far ends of its streams, stdin first.
    async fn connected(stdio: &Stdio) -> (Connected, Vec<UnixStream>) {
        let opened = open(stdio).await.unwrap();
        let mut guest = Vec::new();
        let mut pair = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            guest.push(theirs);
            ours
        };
        let connected = Connected {
            ports: agent::Stdio::new(),
            stdin: opened.stdin.map(|stdin| (stdin, pair())),
            outputs: opened.outputs.map(|output| output.map(|sink| (sink, pair()))),
            loggers: opened.loggers,
            log: opened.log,
        };
        (connected, guest)
    }

    /// Bytes in which each place can be told from every other.
    fn numbers(count: u32) -> Vec<u8> {
        (0..count).flat_map(u32::to_le_bytes).collect()
    }

    #[tokio::test]
    async fn input_ends_only_after_close_io_and_the_clients_own_close() {
        let directory = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdin: fifo(directory.path(), "in"), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
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
        let (connected, mut guest) = connected(&stdio).await;
        let path = stdio.stdout.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        });
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
    async fn a_reader_that_stalls_stops_its_own_writer_only_and_then_gets_everything() {
        let directory = tempfile::tempdir().unwrap();
        let stdio =
            Stdio { stdout: fifo(directory.path(), "out"), stderr: fifo(directory.path(), "err"), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
        let mut reader = OpenOptions::new().open_receiver(&stdio.stderr).unwrap();
        let copies = connected.copy(None);
        let (mut out, mut err) = (guest.remove(0), guest.remove(0));
        let sent = numbers(1 << 20);
        let expected = sent.clone();
        let stalled = tokio::spawn(async move { out.write_all(&sent).await });
        for _ in 0..100 {
            timeout(LIMIT, err.write_all(&[2; 1000])).await.expect("stderr flows").unwrap();
            let mut bytes = [0; 1000];
            timeout(LIMIT, reader.read_exact(&mut bytes)).await.expect("stderr arrives").unwrap();
        }
        assert!(!stalled.is_finished());
        assert!(!copies.drained(Duration::from_millis(10)).await, "the stalled stream is not drained");
        let mut late = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
        let mut got = vec![0; expected.len()];
        timeout(LIMIT, late.read_exact(&mut got)).await.expect("stdout arrives").unwrap();
        assert!(got == expected, "whole and in order");
        stalled.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_leaves_and_comes_back_misses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
        let _copies = connected.copy(None);
        let sent = numbers(1 << 18);
        let expected = sent.clone();
        let mut out = guest.remove(0);
        let writer = tokio::spawn(async move { out.write_all(&sent).await });
        let mut got = Vec::new();
        // As often as containerd is restarted while the container writes.
        for _ in 0..4 {
            let mut reader = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
            let mut bytes = vec![0; expected.len() / 4];
            timeout(LIMIT, reader.read_exact(&mut bytes)).await.expect("it arrives").unwrap();
            got.extend(bytes);
        }
        assert!(got == expected, "whole and in order");
        timeout(LIMIT, writer).await.expect("it is all taken").unwrap().unwrap();
    }

    #[tokio::test]
    async fn output_is_appended_to_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b c/log");
        let uri = format!("file://{}", path.display().to_string().replace(' ', "%20"));
        let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
        for _ in 0..2 {
            let (connected, mut guest) = connected(&stdio).await;
            let copies = connected.copy(None);
            let mut out = guest.remove(0);
            out.write_all(b"out\n").await.unwrap();
            guest.remove(0).write_all(b"err\n").await.unwrap();
            drop(out);
            assert!(copies.drained(LIMIT).await);
        }
        let text = fs::read_to_string(&path).unwrap();
        let mut lines: Vec<_> = text.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["err", "err", "out", "out"], "nothing was overwritten");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o644, 0o755));
        // A plain path to a file that is there is appended to as well.
        let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
        let copies = connected.copy(None);
        guest.remove(0).write_all(b"more\n").await.unwrap();
        assert!(copies.drained(LIMIT).await);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().last(), Some("more"));
    }

    #[tokio::test]
    async fn a_file_that_takes_no_more_ends_the_stream_and_no_other() {
        let stdio = Stdio { stdout: "file:///dev/full".into(), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
        let _copies = connected.copy(None);
        let mut out = guest.remove(0);
        let refused = timeout(LIMIT, async { while out.write_all(&[0; 4096]).await.is_ok() {} });
        refused.await.expect("the writer in the guest is told");
    }

    #[tokio::test]
    async fn one_logger_gets_both_streams_and_is_ended_with_them() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("logger");
        let here = directory.path().display();
        let script = format!("#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >> {here}/out; /bin/cat <&4 >> {here}/err\n");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?a=b", program.display());
        for stderr in ["", uri.as_str()] {
            let stdio = Stdio { stdout: uri.clone(), stderr: stderr.to_owned(), ..Stdio::default() };
            let (connected, mut guest) = connected(&stdio).await;
            let copies = connected.copy(None);
            assert_eq!((copies.loggers(), guest.len()), (1, 2));
            guest[0].write_all(b"out").await.unwrap();
            guest[1].write_all(b"err").await.unwrap();
            guest.clear();
            assert!(copies.drained(LIMIT).await);
            let log = caisson_log::logger("shim", io::sink(), slog::Level::Debug);
            timeout(LIMIT, copies.end(&log)).await.expect("the logger ends");
        }
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!((read("out"), read("err")), ("outout".into(), "errerr".into()));
        let terminal = Stdio { stdout: uri, terminal: true, ..Stdio::default() };
        assert_eq!(connected(&terminal).await.1.len(), 1, "a terminal has one stream");
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_refused_by_name() {
        let missing = Stdio { stdout: "/no/such/fifo".into(), ..Stdio::default() };
        let told = open(&missing).await.unwrap_err().to_string();
        assert!(told.starts_with("cannot open the stdout FIFO /no/such/fifo: "), "{told}");
        let uri = Stdio { stderr: "http:///x".into(), ..Stdio::default() };
        assert!(open(&uri).await.unwrap_err().to_string().starts_with("stderr: http:///x: the scheme http"));
        let unmade = Stdio { stdout: "file:///proc/no/log".into(), ..Stdio::default() };
        let told = open(&unmade).await.unwrap_err().to_string();
        assert!(told.starts_with("cannot open the stdout file \"/proc/no/log\": "), "{told}");
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let regular = Stdio { stdin: file.display().to_string(), ..Stdio::default() };
        assert!(open(&regular).await.is_err(), "input comes from a FIFO only");
    }
}

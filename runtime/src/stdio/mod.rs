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
//! back, and holds an input FIFO open for writing until CloseIO ([`input`] says from when on).

mod copies;
pub mod input;
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
    unix::pipe::{OpenOptions, Sender},
};

pub use self::copies::{Copies, FirstOutput, Patience};
use self::{
    input::{Fifo, Input},
    logger::{Logger, LoggerError, Owner},
    target::{Target, TargetError},
};
use crate::{
    host::namespaces::HostView,
    vm::dial::{DialError, Dialer},
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
        /// The error.
        source: io::Error,
    },
    /// The file.
    #[error("cannot open the {stream} file {path:?}: {source}")]
    File {
        /// stdout or stderr.
        stream: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error.
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
    /// Where it is logged if something is lost later.
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
    stdin: Option<Fifo>,
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
        let stdin = match stdio.stdin.as_str() {
            "" => None,
            path => Some(opened("stdin", path, Fifo::find(path))?),
        };
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
            stdin: self.stdin.zip(to_stdin).map(|(fifo, (stream, _))| Input::new(fifo, stream, self.terminal)),
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
    /// What the agent gets.
    pub ports: agent::Stdio,
    stdin: Option<Input>,
    outputs: [Option<(Sink, UnixStream)>; 2],
    loggers: Vec<Logger>,
    log: Log,
}

#[cfg(test)]
mod tests;

//! Logging by a program (`binary://`), as containerd's own shim does it: the program gets what the process writes to its standard output
//! as descriptor 3 and its standard error as 4, says that it is ready by closing 5, and finds out from its environment whose output it
//! is. It runs in the host's mount namespace, so that it holds nothing of the pod.
//!
//! Its end: the streams end with the process. A logger that has not ended by itself a moment later is asked to (SIGTERM), as
//! containerd's shim asks at once, and killed when it has not ended after 12 seconds.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use caisson_vmm_client::Child;
use command_fds::{CommandFdExt, FdMapping};
use nix::{fcntl::OFlag, sys::signal::Signal, unistd::pipe2};
use slog::{Logger as Log, warn};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{Receiver, Sender},
    time::timeout,
};

use super::target::Binary;
use crate::host::namespaces::HostView;

/// How long a logger may take to get ready.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long a logger may take to end by itself when there is nothing more to read.
const GRACE: Duration = Duration::from_secs(2);
/// How long it may take after it was asked to: containerd's own limit.
const TERM_LIMIT: Duration = Duration::from_secs(12);

/// A logger that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The program.
    #[error("cannot run the logger {program:?}: {source}")]
    Run {
        /// Its path.
        program: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It never closed its descriptor 5.
    #[error("the logger {program:?} was not ready after {limit:?}: it has to close descriptor 5 when it is")]
    NotReady {
        /// Its path.
        program: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// Whose output is logged.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// The container's id, or the exec's.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
}

/// A logger that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Logger {
    child: Child,
    program: PathBuf,
}

/// Starts a logger and waits until it is ready; where its standard output and standard error go in.
///
/// # Errors
/// See [`LoggerError`]. Then it is gone.
pub async fn start(binary: &Binary, owner: Owner<'_>, host: &HostView) -> Result<(Logger, [Sender; 2]), LoggerError> {
    start_within(READY_LIMIT, binary, owner, host).await
}

async fn start_within(
    limit: Duration,
    binary: &Binary,
    owner: Owner<'_>,
    host: &HostView,
) -> Result<(Logger, [Sender; 2]), LoggerError> {
    let program = binary.program.clone();
    let failed = |source| LoggerError::Run { program: program.clone(), source };
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()));
    let ((stdout, to_stdout), (stderr, to_stderr), (ready, say_ready)) = (pipe()?, pipe()?, pipe()?);
    let mut command = Command::new(&binary.program);
    command.args(&binary.arguments).env_clear();
    command.env("CONTAINER_ID", owner.id).env("CONTAINER_NAMESPACE", owner.namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    // A new process is in the mount namespace of the thread that made it.
    let spawned = host.run(move || spawn(command, [stdout, stderr, say_ready])).await;
    let child = spawned.and_then(|child| child).map_err(failed)?;
    let mut logger = Logger { child, program: program.clone() };

    let mut ready = Receiver::from_owned_fd(ready).map_err(failed)?;
    let mut byte = [0];
    match timeout(limit, ready.read(&mut byte)).await {
        Ok(read) => read.map_err(failed)?,
        Err(_) => {
            logger.child.kill();
            let _ = logger.child.wait().await;
            return Err(LoggerError::NotReady { program, limit });
        }
    };
    let sender = |end: OwnedFd| Sender::from_owned_fd(end).map_err(failed);
    let inputs = [sender(to_stdout)?, sender(to_stderr)?];
    Ok((logger, inputs))
}

fn spawn(mut command: Command, descriptors: [OwnedFd; 3]) -> io::Result<Child> {
    let mappings = (3..).zip(descriptors).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    Child::adopt(command.spawn()?)
}

impl Logger {
    /// Waits for its end, after its streams have ended, and sees to it that it comes.
    pub async fn end(mut self, log: &Log) {
        for (limit, signal) in [(GRACE, Some(Signal::SIGTERM)), (TERM_LIMIT, None)] {
            if let Ok(ended) = timeout(limit, self.child.wait()).await {
                self.log_end(ended, log);
                return;
            }
            if let Some(signal) = signal {
                self.child.signal(signal);
            }
        }
        warn!(log, "the logger did not end in time and is killed"; "program" => self.program.display());
        self.child.kill();
        let _ = self.child.wait().await;
    }

    fn log_end(&self, ended: io::Result<ExitStatus>, log: &Log) {
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => warn!(log, "the logger ended"; "program" => self.program.display(), "status" => %status),
            Err(error) => {
                warn!(log, "cannot wait for the logger"; "program" => self.program.display(), "error" => %error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    use tempfile::TempDir;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn logger(script: &str) -> (TempDir, Binary) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("logger");
        fs::write(&program, format!("#!/bin/sh\nhere={}\n{script}\n", directory.path().display())).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        (directory, Binary { program, arguments: vec!["key".into(), "a value".into()] })
    }

    fn owner() -> Owner<'static> {
        Owner { id: "one", namespace: "ns" }
    }

    fn log() -> Log {
        caisson_log::logger("shim", io::sink(), slog::Level::Debug)
    }

    async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
        timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"))
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams_its_arguments_and_nothing_else() {
        let (directory, binary) = logger(
            "/usr/bin/env > $here/env; echo \"$@\" > $here/arguments; exec 5>&-\n\
            /bin/cat <&3 > $here/stdout; /bin/cat <&4 > $here/stderr; echo done > $here/done",
        );
        let host = HostView::here().unwrap();
        let (running, [mut stdout, mut stderr]) = within("ready", start(&binary, owner(), &host)).await.unwrap();
        let sent: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        within("it reads", stdout.write_all(&sent)).await.unwrap();
        stderr.write_all(b"errors").await.unwrap();
        drop((stdout, stderr));
        within("it ends", running.end(&log())).await;
        let read = |name: &str| fs::read(directory.path().join(name)).unwrap();
        assert!(read("stdout") == sent, "whole and in order");
        assert_eq!((read("stderr"), read("done")), (b"errors".to_vec(), b"done\n".to_vec()));
        assert_eq!(read("arguments"), b"key a value\n");
        let environment = String::from_utf8(read("env")).unwrap();
        assert!(environment.contains("CONTAINER_ID=one\n") && environment.contains("CONTAINER_NAMESPACE=ns\n"));
        assert!(!environment.contains("CARGO"), "{environment}");
    }

    #[tokio::test]
    async fn a_logger_that_does_not_end_with_its_input_is_asked_to() {
        let (directory, binary) =
            logger("trap 'echo asked > $here/asked; exit 0' TERM; exec 5>&-\nwhile :; do /bin/sleep 0.05; done");
        let host = HostView::here().unwrap();
        let (running, inputs) = within("ready", start(&binary, owner(), &host)).await.unwrap();
        drop(inputs);
        within("it ends", running.end(&log())).await;
        assert_eq!(fs::read(directory.path().join("asked")).unwrap(), b"asked\n");
    }

    #[tokio::test]
    async fn a_logger_that_never_gets_ready_is_killed() {
        let (directory, binary) = logger("echo $$ > $here/new; /bin/mv $here/new $here/pid; exec /bin/sleep 1000");
        let host = HostView::here().unwrap();
        let message = start_within(Duration::from_millis(500), &binary, owner(), &host).await.unwrap_err().to_string();
        assert!(message.contains("was not ready after 500ms") && message.contains("/logger"), "{message}");
        // On a machine that is busy it may not even have come to this.
        if let Ok(pid) = fs::read_to_string(directory.path().join("pid")) {
            assert!(!Path::new("/proc").join(pid.trim()).exists(), "it is gone and reaped");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_missing_is_named() {
        let binary = Binary { program: "/no/such/logger".into(), arguments: Vec::new() };
        let host = HostView::here().unwrap();
        let message = start(&binary, owner(), &host).await.unwrap_err().to_string();
        assert!(message.starts_with("cannot run the logger \"/no/such/logger\": No such file"), "{message}");
    }
}

//! The program: takes two descriptors, enters the jail, serves until the monitor closes the socket.
//!
//! `caisson-fsd --socket-fd 3 --root-fd 4 [--host-socket-fd 5] [--max-files N] [--threads N]`: a SOCK_SEQPACKET socket to a
//! virtio-fs device, the shared directory, the socket of another device that shows the same directory to a guest that shares it
//! with the host's processes ([`Sharing::WithHost`]), how many files the guest may remember and have open at once in all
//! ([`caisson_fsd::budget`]; default: as many as descriptors can be had, about a million), and how many threads serve each
//! socket. A guest that wants more files gets ENFILE.
//!
//! Exit status 0 when the sockets close, 1 with a message on standard error otherwise.

use std::{
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
    sync::{Arc, Barrier},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_fsd::{
    budget::Budget,
    files::OpenFiles,
    handshake::Sharing,
    jail,
    session::{self, Session},
    tree::Tree,
};
use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{UnshareFlags, unshare_unsafe},
};
use slog::{Logger, error, info};

/// Of a thread that serves, bytes: directory listings take 4 KiB, the rest is calls.
const STACK: usize = 256 * 1024;

/// Threads that serve a socket: enough to have several requests wait for a disk at once. Each may need 2 MiB for them.
const THREADS: usize = 4;
const MAX_THREADS: usize = 64;

/// Descriptors that no guest causes: the process's own.
const RESERVED_DESCRIPTORS: usize = 64;
/// Descriptors that one request needs beside those that count.
const DESCRIPTORS_OF_A_REQUEST: usize = 24;

fn main() -> ExitCode {
    // The records of fuse-backend-rs are not bridged into it: they hold whole requests of the guest.
    let log = caisson_log::logger("fsd", std::io::stderr(), slog::Level::Info);
    match run(&log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(log, "{:#}", error);
            ExitCode::FAILURE
        }
    }
}

fn run(log: &Logger) -> Result<()> {
    let Arguments { socket, host_socket, root, max_files, threads } = arguments(std::env::args().skip(1))?;
    let named = [("--socket-fd", Some(socket), Sharing::Alone), ("--host-socket-fd", host_socket, Sharing::WithHost)];
    let mut sockets = Vec::new();
    for (name, number, sharing) in named {
        let Some(number) = number else { continue };
        ensure!(number != root, "{name} and --root-fd are the same descriptor, {root}");
        ensure!(sockets.is_empty() || number != socket, "--socket-fd and {name} are the same descriptor, {number}");
        let socket = descriptor(number, name)?;
        session::check_socket(&socket).context(name)?;
        session::raise_send_buffer(&socket);
        sockets.push((socket, sharing));
    }
    let root = descriptor(root, "--root-fd")?;
    jail::check_directory(&root).context("--root-fd")?;
    let jail = jail::enter(root)?;
    let reserved = RESERVED_DESCRIPTORS + sockets.len() * threads * DESCRIPTORS_OF_A_REQUEST;
    let budget = usize::try_from(jail.descriptors)?.saturating_sub(reserved).min(max_files);
    ensure!(budget > 0, "at most {} descriptors are allowed, {reserved} are too few", jail.descriptors);
    let limit = Some((budget + reserved) as u64);
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).context("limiting descriptors")?;
    let files = Arc::new(OpenFiles::new(Budget::new(budget)));
    let mut sessions = Vec::new();
    for (connection, (socket, sharing)) in sockets.into_iter().enumerate() {
        let (root, proc_fds) = (jail.root.try_clone()?, jail.proc_fds.try_clone()?);
        let tree =
            Tree::new(root, proc_fds, files.clone(), connection, sharing).context("looking at the shared directory")?;
        sessions.push(Session::new(socket, tree, threads, log.clone())?);
    }
    drop(jail);
    // All threads wait here twice: when they are ready for the filter (see caisson_fsd::jail), and until it is there.
    let gate = Barrier::new(sessions.len() * threads + 1);
    std::thread::scope(|scope| {
        let start = || {
            for session in sessions.iter().flat_map(|session| std::iter::repeat_n(session, threads)) {
                // Threads of their own, because they change their user all the time and the main thread must not (see
                // jail::enter).
                let thread = std::thread::Builder::new().name("fs".into()).stack_size(STACK);
                thread.spawn_scoped(scope, || serve(session, &gate))?;
            }
            gate.wait();
            jail::filter::install()?;
            gate.wait();
            anyhow::Ok(())
        };
        if let Err(error) = start() {
            // The threads that wait would wait for ever.
            error!(log, "{:#}", error);
            std::process::exit(1);
        }
    });
    info!(log, "the monitor closed its end");
    Ok(())
}

/// Serves one socket until it closes. When that fails the process ends, also for the other socket: the pod needs both.
fn serve(session: &Session, gate: &Barrier) {
    /// Ends the process if the thread panics.
    struct ExitOnPanic;
    impl Drop for ExitOnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                std::process::exit(1);
            }
        }
    }
    let _exit_on_panic = ExitOnPanic;
    // The umask, which each request sets, is a thread's own only if its working directory is.
    // SAFETY: no FILES flag: the table of descriptors stays as it is.
    let unshared = unsafe { unshare_unsafe(UnshareFlags::FS) };
    gate.wait();
    gate.wait();
    if let Err(errno) = unshared.and_then(|()| session.run()) {
        error!(session.log(), "the socket to the monitor failed"; "error" => %errno);
        std::process::exit(1);
    }
}

struct Arguments {
    socket: RawFd,
    host_socket: Option<RawFd>,
    root: RawFd,
    max_files: usize,
    threads: usize,
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    const USAGE: &str =
        "usage: caisson-fsd --socket-fd N --root-fd N [--host-socket-fd N] [--max-files N] [--threads N]";
    let (mut socket, mut host_socket, mut root) = (None, None, None);
    let (mut max_files, mut threads) = (usize::MAX, THREADS);
    while let Some(word) = words.next() {
        let mut number = || words.next().with_context(|| format!("{word} needs a number; {USAGE}"));
        let wrong = |value: &str| format!("{word} {value:?}: not a number");
        match word.as_str() {
            "--socket-fd" => socket = Some(number().and_then(|n| n.parse().with_context(|| wrong(&n)))?),
            "--host-socket-fd" => {
                host_socket = Some(number().and_then(|n| n.parse().with_context(|| wrong(&n)))?);
            }
            "--root-fd" => root = Some(number().and_then(|n| n.parse().with_context(|| wrong(&n)))?),
            "--max-files" => max_files = number().and_then(|n| n.parse().with_context(|| wrong(&n)))?,
            "--threads" => threads = number().and_then(|n| n.parse().with_context(|| wrong(&n)))?,
            other => bail!("unknown argument {other:?}; {USAGE}"),
        }
    }
    let socket = socket.with_context(|| format!("--socket-fd is missing; {USAGE}"))?;
    let root = root.with_context(|| format!("--root-fd is missing; {USAGE}"))?;
    ensure!((1..=MAX_THREADS).contains(&threads), "--threads {threads}: 1 to {MAX_THREADS} can serve a socket");
    Ok(Arguments { socket, host_socket, root, max_files, threads })
}

/// Takes over an inherited descriptor.
fn descriptor(number: RawFd, name: &str) -> Result<OwnedFd> {
    ensure!(number > 2, "{name} {number}: 0 to 2 are the standard descriptors");
    // SAFETY: only borrowed to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).with_context(|| format!("{name} {number}"))?;
    // SAFETY: it is open, and the parent gave it to be owned; nothing here has used this number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

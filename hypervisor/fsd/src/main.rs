//! The program: takes two descriptors, enters the jail, serves until the monitor closes the socket.
//!
//! `caisson-fsd --socket-fd 3 --root-fd 4 [--max-files N]`: a SOCK_SEQPACKET socket to the virtio-fs device, the shared
//! directory, and how many files the guest may remember at once (default: as many as descriptors can be had, about a
//! million). A guest that wants more gets ENFILE.
//!
//! Exit status 0 when the socket closes, 1 with a message on standard error otherwise.

use std::{
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_fsd::{jail, session, session::Session, tree::RESERVED_DESCRIPTORS, tree::Tree};
use slog::{Logger, error, info};

/// Of the thread that serves, bytes: directory listings take 4 KiB, the rest is calls.
const STACK: usize = 256 * 1024;

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
    let Arguments { socket, root, max_files } = arguments(std::env::args().skip(1))?;
    ensure!(socket != root, "--socket-fd and --root-fd are the same descriptor, {socket}");
    let (socket, root) = (descriptor(socket, "--socket-fd")?, descriptor(root, "--root-fd")?);
    session::check_socket(&socket).context("--socket-fd")?;
    jail::check_directory(&root).context("--root-fd")?;
    session::raise_send_buffer(&socket);
    let jail = jail::enter(root)?;
    let nodes = usize::try_from(jail.descriptors)?.saturating_sub(RESERVED_DESCRIPTORS);
    ensure!(nodes > 0, "at most {} descriptors are allowed, {RESERVED_DESCRIPTORS} are too few", jail.descriptors);
    let tree = Tree::new(jail.root, jail.proc_fds, nodes.min(max_files)).context("looking at the shared directory")?;
    let session = Session::new(socket, tree, log.clone())?;
    // A thread of its own, because it changes its user all the time and the main thread must not (see jail::enter).
    let serve = move || session.run();
    let thread = std::thread::Builder::new().name("fs".into()).stack_size(STACK).spawn(serve)?;
    match thread.join() {
        Ok(served) => served.context("the socket to the monitor failed")?,
        Err(_) => bail!("the serving thread panicked"),
    }
    info!(log, "the monitor closed its end");
    Ok(())
}

struct Arguments {
    socket: RawFd,
    root: RawFd,
    max_files: usize,
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    const USAGE: &str = "usage: caisson-fsd --socket-fd N --root-fd N [--max-files N]";
    let (mut socket, mut root, mut max_files) = (None, None, usize::MAX);
    while let Some(word) = words.next() {
        let mut number = || words.next().with_context(|| format!("{word} needs a number; {USAGE}"));
        let wrong = |value: &str| format!("{word} {value:?}: not a number");
        match word.as_str() {
            "--socket-fd" => socket = Some(number().and_then(|n| n.parse().with_context(|| wrong(&n)))?),
            "--root-fd" => root = Some(number().and_then(|n| n.parse().with_context(|| wrong(&n)))?),
            "--max-files" => max_files = number().and_then(|n| n.parse().with_context(|| wrong(&n)))?,
            other => bail!("unknown argument {other:?}; {USAGE}"),
        }
    }
    let socket = socket.with_context(|| format!("--socket-fd is missing; {USAGE}"))?;
    let root = root.with_context(|| format!("--root-fd is missing; {USAGE}"))?;
    Ok(Arguments { socket, root, max_files })
}

/// Takes over an inherited descriptor.
fn descriptor(number: RawFd, name: &str) -> Result<OwnedFd> {
    ensure!(number > 2, "{name} {number}: 0 to 2 are the standard descriptors");
    // SAFETY: only borrowed to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).with_context(|| format!("{name} {number}"))?;
    // SAFETY: it is open, and whoever started this program gave it to be owned; nothing here has used this number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

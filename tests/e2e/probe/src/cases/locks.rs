//! `probe cases lock ACTION KIND FILE`: takes a lock on a whole file.
//!
//! ACTION is `try` (ends at once), `wait` (until it has the lock) or `hold` (takes it and keeps it until it is killed); KIND
//! is `flock`, `posix` or `ofd`.

use std::{fs::File, io, os::fd::AsRawFd, path::Path};

use rustix::fs::{FlockOperation, flock};

use super::{Outcome, done};

/// See the module.
pub fn lock(action: &str, kind: &str, path: &Path) {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) => return println!("open: {}", super::error_name(&error)),
    };
    let wait = action == "wait";
    if wait {
        println!("waits");
    }
    let taken = match kind {
        "flock" if wait => flock(&file, FlockOperation::LockExclusive).map_err(io::Error::from),
        "flock" => flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from),
        "posix" => of_process(&file, wait),
        _ => open_file(&file, wait),
    };
    let held = taken.is_ok();
    println!("{}", Outcome::from(done(taken)).0);
    if held && action == "hold" {
        loop {
            std::thread::park();
        }
    }
}

/// A lock of the open file (OFD).
pub fn open_file(file: &File, wait: bool) -> io::Result<()> {
    set(file, if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK })
}

/// A lock of the process (POSIX).
fn of_process(file: &File, wait: bool) -> io::Result<()> {
    set(file, if wait { libc::F_SETLKW } else { libc::F_SETLK })
}

fn set(file: &File, command: i32) -> io::Result<()> {
    // SAFETY: all zero is a lock of the whole file of kind F_RDLCK.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    // SAFETY: the descriptor is open, and the command reads the lock.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

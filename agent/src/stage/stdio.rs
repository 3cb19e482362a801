//! The standard descriptors of the program: three that the agent sent, or a terminal of the container's own devpts.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags, Uid, fchown, fstat, fstatfs, major, minor, openat},
    io::Errno,
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::{gather::clone_tree, inroot::Root, mounts::attach as attach_mount, replace};
use crate::plan::{Failure, FailureKind, ProcessPlan, TerminalSize, Trying};

/// DEVPTS_SUPER_MAGIC of include/uapi/linux/magic.h.
const DEVPTS_MAGIC: u64 = 0x1cd1;

/// Puts descriptors 0, 1 and 2 in place. Returns the master side if the process has a terminal.
pub(super) fn attach(
    process: &ProcessPlan,
    root: &Root,
    is_init: bool,
    fds: Vec<OwnedFd>,
) -> Result<Option<OwnedFd>, Failure> {
    let Some(size) = process.terminal else {
        let [stdin, stdout, stderr] = fds.as_slice() else {
            let message = format!("the plan came with {} standard descriptors, not 3", fds.len());
            return Err(Failure::new(FailureKind::Internal, message));
        };
        for (fd, standard) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
            replace(fd, standard)?;
        }
        return Ok(None);
    };
    let (master, slave) = open_terminal(root, size)?;
    fchown(&slave, Some(Uid::from_raw(process.user.uid)), None).trying(|| "give the terminal to its user".into())?;
    if is_init {
        make_console(root, &slave)?;
    }
    for standard in 0..3 {
        replace(&slave, standard)?;
    }
    Ok(Some(master))
}

/// Makes the terminal, which is descriptor 0, the controlling one of the session that this process has begun.
pub(super) fn control(process: &ProcessPlan) -> Result<(), Failure> {
    if process.terminal.is_none() {
        return Ok(());
    }
    ioctl_tiocsctty(std::io::stdin()).trying(|| "make the terminal the controlling one".into())
}

fn open_terminal(root: &Root, size: TerminalSize) -> Result<(OwnedFd, OwnedFd), Failure> {
    let what = || "open /dev/pts/ptmx for a terminal (is a devpts mounted on /dev/pts?)".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master = root
        .open(Path::new("/dev/pts/ptmx"), flags)
        .map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: {error}", what())))?;
    // The path is the container's; what it led to must be a real multiplexer.
    let device = fstat(&master).trying(what)?.st_rdev;
    let magic = fstatfs(&master).trying(what)?.f_type as u64;
    if magic != DEVPTS_MAGIC || (major(device), minor(device)) != (5, 2) {
        return Err(Failure::new(FailureKind::Invalid, format!("{}: it is no terminal multiplexer", what())));
    }
    unlockpt(&master).trying(|| "unlock the terminal".into())?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
    let slave = slave.trying(|| "open the terminal's slave side".into())?;
    if size != TerminalSize::default() {
        let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).trying(|| "set the terminal's size".into())?;
    }
    Ok((master, slave))
}

/// Shows the terminal as /dev/console: on what the image has there, unless that leads elsewhere, or on a new file.
fn make_console(root: &Root, slave: &OwnedFd) -> Result<(), Failure> {
    let what = || "bind the terminal to /dev/console".to_owned();
    let (parent, name) = root.parent(Path::new("/dev/console")).trying(what)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    match openat(&parent, name, flags, Mode::from_raw_mode(0o600)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).trying(what),
    }
    // Found, not opened: opening a device may have effects.
    let place = openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).trying(what)?;
    let kind = FileType::from_raw_mode(fstat(&place).trying(what)?.st_mode);
    if !kind.is_file() && !kind.is_char_device() {
        let message = format!("{}: the image holds something else there", what());
        return Err(Failure::new(FailureKind::Invalid, message));
    }
    let copy = clone_tree(slave.as_fd(), false).trying(what)?;
    attach_mount(copy.as_fd(), place.as_fd()).trying(what)
}

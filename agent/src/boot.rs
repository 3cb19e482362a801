//! From the kernel's hand to a machine in which containers can live; PID 1 only. Nothing here that is not needed
//! before the first call: the pod waits for it.
//!
//! - The root becomes a read-only mount of its own on top of the kernel's initial one. A container cannot `pivot_root`
//!   away from the kernel's initial root; and read-only it keeps the agent's binary from being overwritten through a
//!   container's `/proc/<pid>/exe` (CVE-2019-5736).
//! - /proc, /sys, /dev, /run, cgroup v2, and the loopback interface, which the pod's containers share.
//! - The agent itself is the last that the kernel kills when memory runs out.

use std::{fs, io, os::fd::AsFd, path::Path};

use caisson_netlink::{Socket, link};
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree},
    process::{DumpableBehavior, set_dumpable_behavior},
};

/// Where cgroup v2 is mounted.
pub const CGROUP_MOUNT: &str = "/sys/fs/cgroup";

/// A step of booting that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct BootError {
    what: &'static str,
    error: io::Error,
}

fn step<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> Result<T, BootError> {
    result.map_err(|error| BootError { what, error: error.into() })
}

/// Prepares the guest.
///
/// # Errors
/// The first step that failed; the machine is of no use then.
pub fn prepare() -> Result<(), BootError> {
    let (nosuid, nodev, noexec) = (MountFlags::NOSUID, MountFlags::NODEV, MountFlags::NOEXEC);
    for directory in ["/proc", "/sys", "/dev", "/run"] {
        match fs::create_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return step("make a mount point", Err(error));
            }
            _ => {}
        }
    }
    step("make the root a mount of its own", own_root())?;
    let none = None::<&std::ffi::CStr>;
    step("mount /proc", mount("proc", "/proc", "proc", nosuid | nodev | noexec, none))?;
    step("mount /sys", mount("sysfs", "/sys", "sysfs", nosuid | nodev | noexec, none))?;
    step("mount /dev", mount("devtmpfs", "/dev", "devtmpfs", nosuid | noexec, Some(c"mode=0755")))?;
    step("open the standard descriptors", standard_descriptors())?;
    step("mount /run", mount("tmpfs", "/run", "tmpfs", nosuid | nodev, Some(c"mode=0755")))?;
    step("mount cgroup v2", mount("cgroup2", CGROUP_MOUNT, "cgroup2", nosuid | nodev | noexec, Some(c"nsdelegate")))?;
    // A stage shares the agent's memory for the moment between its birth, which may be in a container, and its exec.
    step("make the agent's memory unreadable", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    step("protect the agent from the OOM killer", fs::write("/proc/self/oom_score_adj", "-1000"))?;
    step("bring the loopback interface up", loopback_up())
}

/// The kernel leaves descriptors 0 to 2 closed where there is no console. A socket that got one of these numbers would
/// be taken for an output. They stay open in the stages, which would meet the same.
fn standard_descriptors() -> io::Result<()> {
    loop {
        // Not close-on-exec, unlike what the standard library opens.
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        std::mem::forget(null);
    }
}

/// Puts a read-only copy of the root mount on top of it and makes that the root.
fn own_root() -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let root = open_tree(CWD, "/", flags)?;
    caisson_mount::restrict(root.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, false)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(&root)?;
    Ok(rustix::process::chroot(".")?)
}

/// The kernel then gives it 127.0.0.1 and ::1.
fn loopback_up() -> io::Result<()> {
    const LOOPBACK: u32 = 1; // always
    let up = link::set_flags(LOOPBACK, libc::IFF_UP, libc::IFF_UP);
    Socket::open()?.request(&up).map_err(|refused| refused.error)
}

/// The kernel's log, in which the agent's own lines appear; None without /dev/kmsg.
pub fn kernel_log() -> Option<fs::File> {
    fs::OpenOptions::new().write(true).open(Path::new("/dev/kmsg")).ok()
}

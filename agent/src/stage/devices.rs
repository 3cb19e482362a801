//! Device nodes and the links that programs expect in /dev.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, Uid, chownat, makedev, mknodat, statat, symlinkat, unlinkat},
    io::Errno,
};

use super::{inroot::Root, mounts::attach};
use crate::plan::{DeviceKind, DevicePlan, Failure, FailureKind, Trying, View};

/// Links of /dev, as the OCI specification names them.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
];

/// `given` are the nodes, as mounts, that the container cannot make itself.
pub(super) fn make(root: &Root, view: &View, given: Vec<Option<OwnedFd>>) -> Result<(), Failure> {
    for (device, given) in view.devices.iter().zip(given) {
        match given {
            None => node(root, device)?,
            Some(mount) => {
                let what = || format!("make the device {}", device.path.display());
                let place = root.make_file(&device.path).trying(what)?;
                attach(mount.as_fd(), place.as_fd()).trying(what)?;
            }
        }
    }
    for (path, target) in LINKS {
        link(root, path, target, false).trying(|| format!("link {path} to {target}"))?;
    }
    // The container's own devpts must answer, not whatever the image holds.
    link(root, "/dev/ptmx", "pts/ptmx", true).trying(|| "link /dev/ptmx to pts/ptmx".into())
}

fn node(root: &Root, device: &DevicePlan) -> Result<(), Failure> {
    let what = || format!("make the device {}", device.path.display());
    let (parent, name) = root.parent(&device.path).trying(what)?;
    let kind = match device.kind {
        DeviceKind::Char => FileType::CharacterDevice,
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Fifo => FileType::Fifo,
    };
    let number = makedev(device.major, device.minor);
    match mknodat(&parent, name, kind, Mode::from_raw_mode(device.mode), number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).trying(what)?;
            if FileType::from_raw_mode(found.st_mode) != kind || found.st_rdev != number {
                let message = format!("{}: the image holds something else there", what());
                return Err(Failure::new(FailureKind::Invalid, message));
            }
        }
        error => return error.trying(what),
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).trying(what)
}

fn link(root: &Root, path: &str, target: &str, replace: bool) -> rustix::io::Result<()> {
    let (parent, name) = root.parent(Path::new(path))?;
    if replace {
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            error => return error,
        }
    }
    match symlinkat(target, parent.as_fd(), name) {
        Err(Errno::EXIST) if !replace => Ok(()),
        result => result,
    }
}

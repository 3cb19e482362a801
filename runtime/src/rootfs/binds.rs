//! Sources of bind mounts: opened in the host's view ([`crate::host::namespaces`]), looked at, and copied as mounts of their
//! own that nobody has seen yet. On the copy nothing runs, opens as a device or has its set-id bits, and a read-only
//! one is read-only with all below it, for caisson-fsd as for everybody: whatever a guest does, the host's kernel does
//! not write there.
//!
//! What comes later on the host's side (a mount below the source) does not reach the copy.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, fstatfs, openat, readlinkat, statx},
    mount::{OpenTreeFlags, open_tree},
    path::DecInt,
};

use crate::{
    rootfs::mount::restrict_tree,
    spec::{binds::Bind, devices::is_guests_own},
};

/// File systems that are windows into the host's kernel: names in mountinfo, and numbers (linux/magic.h) where they can
/// be a source by themselves.
const KERNELS: [(&str, u32); 22] = [
    ("proc", 0x9fa0),
    ("sysfs", 0x6265_6572),
    ("cgroup", 0x0027_e0eb),
    ("cgroup2", 0x6367_7270),
    ("devpts", 0x1cd1),
    ("mqueue", 0x1980_0202),
    ("securityfs", 0x7363_6673),
    ("debugfs", 0x6462_6720),
    ("tracefs", 0x7472_6163),
    ("bpf", 0xcafe_4a11),
    ("pstore", 0x6165_676c),
    ("efivarfs", 0xde5e_81e4),
    ("configfs", 0x6265_6570),
    ("fusectl", 0x6573_5543),
    ("binfmt_misc", 0x4249_4e4d),
    ("hugetlbfs", 0x9584_58f6),
    ("selinuxfs", 0xf97c_ff8c),
    ("smackfs", 0x4341_5d53),
    ("nsfs", 0x6e73_6673),
    ("resctrl", 0x0765_5821),
    ("rpc_pipefs", 0x6759_6969),
    // Known by its name only: its number is tmpfs's.
    ("devtmpfs", 0),
];

/// A bind mount that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {source_path:?} {reason}")]
pub struct BindError {
    field: String,
    source_path: PathBuf,
    reason: String,
}

/// A source that was opened.
#[derive(Debug)]
pub enum Source {
    /// A copy of its mount that is mounted nowhere.
    Tree {
        /// The copy.
        tree: OwnedFd,
        /// A directory, or a regular file.
        directory: bool,
    },
    /// A character device that the guest has itself: major and minor number.
    Device(u32, u32),
    /// What the mount at this earlier position has. One mount for both, so that both are one file to the guest: locks, sockets,
    /// FIFOs and shared mappings meet.
    Same(u32),
}

/// What makes two sources one: the mount and the file in it, and what may be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    mount: u64,
    inode: u64,
    recursive: bool,
    read_only: bool,
}

/// What a source turned out to be.
enum Kind {
    Directory,
    File,
    Device(u32, u32),
}

/// Opens all sources; for [`crate::host::namespaces::HostView::run`].
///
/// # Errors
/// [`BindError`] names the mount, its source and why it cannot be.
pub fn open(binds: &[Bind]) -> Result<Vec<(u32, Source)>, BindError> {
    let mut known: Vec<(Identity, u32)> = Vec::new();
    let mut sources = Vec::with_capacity(binds.len());
    for bind in binds {
        let (source, kind, identity) = look(bind)?;
        let first = known.iter().find(|(other, _)| *other == identity);
        let opened = match (kind, first) {
            (Kind::Device(major, minor), _) => Source::Device(major, minor),
            (_, Some((_, index))) => Source::Same(*index),
            (Kind::Directory, None) => copy(bind, &source, true)?,
            (Kind::File, None) => copy(bind, &source, false)?,
        };
        if matches!(opened, Source::Tree { .. }) {
            known.push((identity, bind.index));
        }
        sources.push((bind.index, opened));
    }
    Ok(sources)
}

/// Looks at all sources without taking anything.
///
/// # Errors
/// As [`open`].
pub fn check(binds: &[Bind]) -> Result<(), BindError> {
    binds.iter().try_for_each(|bind| look(bind).map(drop))
}

fn failed(bind: &Bind, reason: impl Into<String>) -> BindError {
    BindError { field: bind.field(), source_path: bind.source.clone(), reason: reason.into() }
}

fn copy(bind: &Bind, source: &OwnedFd, directory: bool) -> Result<Source, BindError> {
    let recursive = if bind.recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(source, c"", flags | recursive)
        .map_err(|errno| failed(bind, format!("cannot be copied as a mount: {errno}")))?;
    restrict_tree(tree.as_fd(), bind.read_only)
        .map_err(|error| failed(bind, format!("cannot be made nosuid, nodev and noexec: {error}")))?;
    // What was mounted below it between the look and the copy is in the copy.
    look_below(bind, source)?;
    Ok(Source::Tree { tree, directory })
}

fn look(bind: &Bind) -> Result<(OwnedFd, Kind, Identity), BindError> {
    let system = |what: &'static str| move |error: io::Error| failed(bind, format!("cannot be {what}: {error}"));
    let source = openat(CWD, &bind.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| system("opened")(errno.into()))?;
    let stat = statx(&source, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
        .map_err(|errno| system("looked at")(errno.into()))?;
    let identity =
        Identity { mount: stat.stx_mnt_id, inode: stat.stx_ino, recursive: bind.recursive, read_only: bind.read_only };
    let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::Directory => Kind::Directory,
        FileType::RegularFile => Kind::File,
        FileType::CharacterDevice if is_guests_own(stat.stx_rdev_major, stat.stx_rdev_minor) => {
            let device = Kind::Device(stat.stx_rdev_major, stat.stx_rdev_minor);
            return Ok((source, device, identity));
        }
        FileType::CharacterDevice | FileType::BlockDevice => {
            let number = format!("{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
            return Err(failed(
                bind,
                format!("is the host's device {number}, which cannot work in a machine of its own"),
            ));
        }
        FileType::Socket => {
            return Err(failed(bind, "is a socket: nobody in another machine's kernel can connect to it"));
        }
        FileType::Fifo => return Err(failed(bind, "is a FIFO: its two ends would be in different kernels")),
        other => return Err(failed(bind, format!("is neither a file nor a directory but {other:?}"))),
    };
    let number = fstatfs(&source).map_err(|errno| system("looked at")(errno.into()))?.f_type;
    // The field's width differs between C libraries; the numbers have 32 bits.
    let number = number as u32;
    if let Some((name, _)) = KERNELS.iter().find(|(_, magic)| *magic != 0 && *magic == number) {
        return Err(failed(
            bind,
            format!("is on {name}, a file system of the host's kernel: mount the guest's own instead"),
        ));
    }
    look_below(bind, &source)?;
    Ok((source, kind, identity))
}

/// Checks where the source really lies, and what is mounted below it.
fn look_below(bind: &Bind, source: &OwnedFd) -> Result<(), BindError> {
    let proc = openat(CWD, c"/proc/thread-self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let path = proc.and_then(|proc| readlinkat(proc, DecInt::from_fd(source), Vec::new()));
    let path = path.map_err(|errno| failed(bind, format!("cannot be found again: {errno}")))?;
    let path = Path::new(OsStr::from_bytes(path.as_bytes())).to_owned();
    if path.starts_with("/dev") {
        let reason = if path.starts_with("/dev/shm") {
            "is shared memory of the host's processes, which cannot be shared with another kernel: mount a tmpfs instead"
        } else {
            "is in the host's /dev, whose devices cannot work in a machine of its own"
        };
        return Err(failed(bind, reason));
    }
    if bind.recursive {
        let mounts = fs::read("/proc/thread-self/mountinfo")
            .map_err(|error| failed(bind, format!("cannot be searched for mounts below: {error}")))?;
        if let Some((kind, point)) = kernels_below(&String::from_utf8_lossy(&mounts), &path) {
            let reason = format!(
                "has {kind}, a file system of the host's kernel, below it at {}: use bind instead of rbind",
                point.display()
            );
            return Err(failed(bind, reason));
        }
    }
    Ok(())
}

/// The first file system of the kernel's that is mounted below `path`: its type and where.
fn kernels_below(mountinfo: &str, path: &Path) -> Option<(&'static str, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = PathBuf::from(unescape(left.split(' ').nth(4)?));
        let kind = right.split(' ').next()?;
        let (name, _) = KERNELS.iter().find(|(name, _)| *name == kind)?;
        (point != path && point.starts_with(path)).then_some((*name, point))
    })
}

/// mountinfo writes blanks, tabs, newlines and backslashes as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                plain.push(char::from(code));
                plain.push_str(part.get(3..).unwrap_or_default());
            }
            _ => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests;

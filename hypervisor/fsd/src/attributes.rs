//! What the kernel says of a file, in the words of FUSE.

use std::{
    ffi::CStr,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
};

use fuse_backend_rs::abi::fuse_abi::{Attr, stat64, statvfs64};
use rustix::{
    fs::{AtFlags, FileType, Statx, StatxFlags, fstatfs, makedev, statx},
    io::Errno,
};

use crate::nodes::Key;

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// Looks at an `O_PATH` descriptor.
///
/// # Errors
/// The system call's.
pub fn examine(file: impl AsFd) -> Result<Statx, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, WANTED)
}

/// Looks at what `name` in a directory is; a symlink is not followed.
///
/// # Errors
/// The system call's.
pub fn examine_name(directory: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// Whether a file cannot be changed by the mount that it was reached by.
pub fn is_read_only(file: impl AsFd) -> bool {
    file_system(file).is_ok_and(|state| state.f_flag & libc::ST_RDONLY != 0)
}

/// Whether a file is on an overlay. A file system that does not say what it is is none.
pub fn is_overlay(file: impl AsFd) -> bool {
    fstatfs(file).is_ok_and(|state| state.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}

/// The file's identity. A directory is another one on each mount, because a directory has one place in the guest's tree of
/// names; any other file is the same whatever way it was reached, so that locks, sockets and shared mappings meet.
pub fn key(stat: &Statx) -> Key {
    let mount = if kind(stat) == FileType::Directory { stat.stx_mnt_id } else { 0 };
    Key { mount, device: (stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino }
}

/// The file's type.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// The attributes that the guest gets, with this inode number.
pub fn attributes(stat: &Statx, ino: u64) -> stat64 {
    let attr = Attr {
        ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec as u64,
        mtime: stat.stx_mtime.tv_sec as u64,
        ctime: stat.stx_ctime.tv_sec as u64,
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: makedev(stat.stx_rdev_major, stat.stx_rdev_minor) as u32,
        blksize: stat.stx_blksize,
        flags: 0,
    };
    attr.into()
}

/// The state of the file system that a file is on.
///
/// # Errors
/// The system call's.
pub fn file_system(file: impl AsFd) -> Result<statvfs64, Errno> {
    let mut space = MaybeUninit::<statvfs64>::zeroed();
    // SAFETY: the descriptor is open, the pointer is to room for the struct.
    let result = unsafe { libc::fstatvfs64(file.as_fd().as_raw_fd(), space.as_mut_ptr()) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: zeroes are a valid statvfs, and the call filled it in.
    Ok(unsafe { space.assume_init() })
}

//! mount_setattr(2), by which the shim, the file server and the agent take set-id bits, devices, programs or writing away from
//! whole trees of mounts: neither rustix 1.1 nor nix 0.31 has it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use libc::mount_attr;
use rustix::mount::{MountAttrFlags, MountPropagationFlags};

/// What no file that is served to a guest needs on its host.
pub const NOSUID_NODEV_NOEXEC: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Takes away what `attributes` name, from the mount whose root `mount` is, and with `recursive` from everything mounted below it.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn restrict(mount: BorrowedFd<'_>, attributes: MountAttrFlags, recursive: bool) -> io::Result<()> {
    set_attributes(mount, attributes, MountAttrFlags::empty(), MountPropagationFlags::empty(), recursive)
}

/// Changes the mount whose root `mount` is, and with `recursive` everything mounted below it.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    clear: MountAttrFlags,
    propagation: MountPropagationFlags,
    recursive: bool,
) -> io::Result<()> {
    let attributes = mount_attr {
        attr_set: u64::from(set.bits()),
        attr_clr: u64::from(clear.bits()),
        propagation: u64::from(propagation.bits()),
        userns_fd: 0,
    };
    call(mount, &attributes, recursive)
}

/// Lets a mount that is mounted nowhere show the ids of its files as the user namespace `users` has them.
///
/// # Errors
/// What mount_setattr(2) says: EINVAL for a file system that cannot do this.
pub fn map_ids(mount: BorrowedFd<'_>, users: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let userns_fd = u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    call(mount, &attributes, recursive)
}

fn call(mount: BorrowedFd<'_>, attributes: &mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated literal, and the kernel reads exactly size_of::<mount_attr>() bytes of
    // `attributes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

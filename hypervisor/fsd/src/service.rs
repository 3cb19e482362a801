//! Operations that fuse-backend-rs has no place for, and what several of its operations share.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Statx, XattrFlags, chmodat, openat, setxattr, syncfs},
    io::Errno,
    path::DecInt,
};

use crate::{
    attributes::examine,
    files::{Access, out_of_descriptors, reopen},
    identity::{creating_as, without_fsetid},
    nodes::Node,
    tree::{Tree, component},
    wire::is_guests,
};

/// Serves one [`Tree`]; any number of threads may do so at once.
#[derive(Debug)]
pub struct Service {
    /// What is served.
    pub tree: Tree,
}

impl Service {
    /// Copies inside the server between two files; returns the bytes copied.
    ///
    /// # Errors
    /// Those of [`Tree::file`], the system call's.
    pub fn copy_range(&self, from: (u64, u64), to: (u64, u64), len: u64) -> Result<usize, Errno> {
        let source = self.tree.file(from.0, Access::Read)?;
        let target = self.tree.file(to.0, Access::Write)?;
        let (mut from_offset, mut to_offset) = (from.1, to.1);
        // A copy must end soon. The guest asks again for the rest.
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(16 << 20);
        // Linux says nothing of set-id bits in this request, and takes them away itself for a caller without CAP_FSETID.
        without_fsetid(true, || {
            rustix::fs::copy_file_range(&**source, Some(&mut from_offset), &**target, Some(&mut to_offset), len)
        })?
    }

    /// Writes everything back that the host holds of the file systems that the guest knows files of.
    ///
    /// # Errors
    /// The system calls'.
    pub fn sync_file_systems(&self) -> Result<(), Errno> {
        self.tree.each_file_system(|file| syncfs(file))
    }

    /// Creates a file without a name in `parent`.
    ///
    /// # Errors
    /// ENFILE if the guest knows too many files, EOPNOTSUPP if the file system cannot, the system calls'.
    pub fn create_unnamed(&self, (uid, gid): (u32, u32), parent: u64, mode: u32, umask: u32) -> Result<Entry, Errno> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        self.create_open(parent, (uid, gid, umask), |directory| {
            openat(directory, c".", flags, Mode::from_raw_mode(mode & 0o7777))
        })
    }

    pub(crate) fn create_open(
        &self,
        parent: u64,
        (uid, gid, umask): (u32, u32, u32),
        create: impl Fn(&Node) -> Result<OwnedFd, Errno>,
    ) -> Result<Entry, Errno> {
        let claim = self.tree.claim()?;
        let directory = self.tree.node(parent)?;
        let attempt = || creating_as(uid, gid, umask, || create(&directory));
        let file = self.tree.retry_without_space(attempt).map_err(out_of_descriptors)?;
        let entry = self.tree.enter_created(&directory, &file, claim)?;
        self.tree.keep_created(entry.inode, file);
        Ok(entry)
    }

    /// Attributes of a node, as the kernel says them, with its inode number in the guest.
    ///
    /// # Errors
    /// ESTALE, the system call's.
    pub fn statx(&self, node: u64) -> Result<(Statx, u64, Duration), Errno> {
        let node = self.tree.node(node)?;
        let stat = self.tree.identify(&node)?;
        let ino = self.tree.ino((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino);
        Ok((stat, ino, self.tree.timeout(&node)))
    }

    /// A file or directory, open for ioctl(2).
    ///
    /// # Errors
    /// ENOTTY for what is neither, ESTALE, the system call's.
    pub fn open_for_ioctl(&self, node: u64) -> Result<File, Errno> {
        let node = self.tree.node(node)?;
        let directory = if node.kind == FileType::Directory { OFlags::DIRECTORY } else { OFlags::empty() };
        reopen(&node, OFlags::RDONLY | directory, self.tree.proc_fds()).map_err(|errno| match errno {
            Errno::INVAL => Errno::NOTTY,
            other => other,
        })
    }

    /// Sets an extended attribute; `without_setgid` is set where Linux takes the setgid bit away with a new ACL.
    ///
    /// # Errors
    /// EPERM for one that is not the guest's, ESTALE, the system calls'.
    pub fn set_attribute(
        &self,
        node: u64,
        (name, value): (&CStr, &[u8]),
        flags: u32,
        without_setgid: bool,
    ) -> Result<(), Errno> {
        check_name(name, Errno::PERM)?;
        let node = self.tree.node(node)?;
        self.tree.change(&node, || {
            setxattr(DecInt::from_fd(&*node), name, value, XattrFlags::from_bits_retain(flags))?;
            if without_setgid {
                let mode = Mode::from_raw_mode(u32::from(examine(&*node)?.stx_mode) & 0o7777);
                if mode.contains(Mode::SGID) {
                    let proc_fds = self.tree.proc_fds();
                    chmodat(proc_fds, DecInt::from_fd(&*node), mode.difference(Mode::SGID), AtFlags::empty())?;
                }
            }
            Ok(())
        })
    }

    pub(crate) fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl Fn(BorrowedFd) -> Result<(), Errno>,
    ) -> io::Result<Entry> {
        component(name)?;
        let claim = self.tree.claim()?;
        let directory = self.tree.node(parent)?;
        let attempt = || creating_as(context.uid, context.gid, umask, || make(directory.as_fd()));
        self.tree.retry_without_space(attempt)?;
        // By its name once more: unlike open(2) these calls return no descriptor of what they have made.
        Ok(self.tree.lookup_made(&directory, name, claim)?)
    }
}

/// Refuses an attribute that is not the guest's.
///
/// # Errors
/// `refusal`.
pub fn check_name(name: &CStr, refusal: Errno) -> Result<(), Errno> {
    if is_guests(name) { Ok(()) } else { Err(refusal) }
}

//! What of a tree is open: regular files, directories, and a file of each file system for a while.

use std::{collections::HashMap, fs::File, os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{Tree, lock};
use crate::{
    budget::Claim,
    directory::{self, Directory},
    files::{Access, OpenFile, reopen, reopen_path},
    nodes::{Node, Path},
};

impl Tree {
    /// A regular file, open.
    ///
    /// # Errors
    /// ESTALE, EISDIR or EINVAL for what is not a regular file, the system call's.
    pub fn file(&self, node: u64, access: Access) -> Result<Arc<OpenFile>, Errno> {
        let owner = (self.connection, node);
        if let Some(open) = self.files.get(owner, access) {
            return Ok(open);
        }
        let node = self.node(node)?;
        let open = || reopen(&node, access.flags(), &self.proc_fds);
        let file = if access == Access::Read { open()? } else { self.change(&node, open)? };
        Ok(self.files.put(owner, file, access))
    }

    /// Keeps a file that was just created open.
    pub fn keep_created(&self, node: u64, file: OwnedFd) {
        self.files.put((self.connection, node), file.into(), Access::Write);
    }

    /// Notes that the guest has a file open for writing, and will say when it closes it.
    pub fn add_writer(&self, node: u64) {
        self.nodes().add_writer(node);
    }

    /// Notes that it has closed it.
    pub fn remove_writer(&self, node: u64) {
        let last = self.nodes().remove_writer(node);
        if last {
            self.files.close_for_writing((self.connection, node));
        }
    }

    /// Lends a directory or file of each mount that the guest knows directories or files on, open: what syncfs(2) needs. What
    /// else there is (symlinks, sockets) cannot be opened, and holds no data that would have to be written.
    ///
    /// # Errors
    /// That of opening, if no file of a mount can be opened, and that of `use_it`; the other mounts have their turn anyway.
    pub fn each_file_system(&self, mut use_it: impl FnMut(&File) -> Result<(), Errno>) -> Result<(), Errno> {
        /// Files of a mount that are tried.
        const TRIED: usize = 16;
        let mut mounts: HashMap<u64, Vec<(FileType, Arc<Path>)>> = HashMap::new();
        for node in self.nodes().all() {
            if ![FileType::Directory, FileType::RegularFile].contains(&node.kind) {
                continue;
            }
            for (mount, path) in node.mounts().filter(|(mount, _)| *mount != self.root_mount) {
                let known = mounts.entry(mount).or_default();
                if known.len() < TRIED {
                    known.push((node.kind, path.clone()));
                }
            }
        }
        let open = |(kind, path): (FileType, Arc<Path>)| {
            let directory = if kind == FileType::Directory { OFlags::DIRECTORY } else { OFlags::empty() };
            reopen_path(kind, &*path, OFlags::RDONLY | directory, &self.proc_fds)
        };
        let first = |paths: Vec<_>| {
            let mut last = Err(Errno::IO);
            for path in paths {
                last = open(path);
                if last.is_ok() {
                    break;
                }
            }
            last
        };
        let results = mounts.into_values().map(|paths| first(paths).and_then(|file| use_it(&file)));
        results.fold(Ok(()), Result::and)
    }

    /// Sees to it that opening a file for a lock does not give it another identity.
    ///
    /// # Errors
    /// ESTALE if there is no such node.
    pub fn settle(&self, node: u64) -> Result<(), Errno> {
        let node = self.node(node)?;
        if !node.settled {
            // One that cannot be written is opened for reading, which changes nothing.
            let _ = self.change(&node, || reopen(&node, OFlags::RDWR, &self.proc_fds));
        }
        Ok(())
    }

    /// A file, opened for a lock with a part of the budget: for writing if that is asked for and can be, because a lock
    /// against readers needs it.
    ///
    /// # Errors
    /// ESTALE, EISDIR and EINVAL for what is not a regular file, ENOLCK if nothing is left of the budget, the system call's.
    pub fn open_for_lock(&self, node: u64, write: bool) -> Result<(File, Claim), Errno> {
        let claim = self.claim().map_err(|_| Errno::NOLCK)?;
        let node = self.node(node)?;
        if write && let Ok(file) = reopen(&node, OFlags::RDWR, &self.proc_fds) {
            return Ok((file, claim));
        }
        Ok((reopen(&node, OFlags::RDONLY, &self.proc_fds)?, claim))
    }

    /// Opens a directory and returns its handle.
    ///
    /// # Errors
    /// ENFILE if too many are open, ENOTDIR, the system call's.
    pub fn open_directory(&self, node: &Node) -> Result<u64, Errno> {
        let claim = self.files.claim(directory::UNITS)?;
        let file = reopen(node, OFlags::RDONLY | OFlags::DIRECTORY, &self.proc_fds)?;
        Ok(lock(&self.directories).insert(node.id, Directory::new(file, claim)))
    }

    /// Closes a directory.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn close_directory(&self, node: u64, handle: u64) -> Result<(), Errno> {
        let closed = lock(&self.directories).remove(node, handle);
        closed.map(drop)
    }

    /// An open directory.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn directory(&self, node: u64, handle: u64) -> Result<Arc<Directory>, Errno> {
        lock(&self.directories).get(node, handle)
    }
}

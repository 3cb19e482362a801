//! Descriptors for reading and writing, opened when a request needs one and kept for the next.
//!
//! The guest never opens or closes a file here (see [`crate::handshake`]), so nothing says when a descriptor is done
//! with. A small table keeps the latest ones: a slot for each remainder of the node number, so that the guest can hold
//! at most [`SLOTS`] files open whatever it does.

use std::{fs::File, os::fd::AsFd};

use rustix::{
    fs::{FileType, Mode, OFlags, openat},
    io::Errno,
    path::DecInt,
};

use crate::nodes::Node;

/// Files kept open.
pub const SLOTS: usize = 64;

/// What a file is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing and reading.
    Write,
}

/// See the module's introduction.
#[derive(Debug)]
pub struct OpenFiles {
    slots: Vec<Option<(u64, Access, File)>>,
}

impl Default for OpenFiles {
    fn default() -> Self {
        Self { slots: (0..SLOTS).map(|_| None).collect() }
    }
}

impl OpenFiles {
    /// The file of node `id`, opened for at least `access`. `proc_fds` is `/proc/self/fd`.
    ///
    /// # Errors
    /// EISDIR or EINVAL for what is not a regular file; the system call's.
    pub fn get(&mut self, id: u64, node: &Node, access: Access, proc_fds: impl AsFd) -> Result<&mut File, Errno> {
        let open = self.is_open(id, access);
        // A remainder below SLOTS.
        let slot = self.slots.get_mut(id as usize % SLOTS).ok_or(Errno::INVAL)?;
        if !open {
            let file = match access {
                Access::Read => reopen(node, OFlags::RDONLY, &proc_fds),
                // Linux opens a file that can only be appended to (chattr +a) in no other way.
                Access::Write => match reopen(node, OFlags::RDWR, &proc_fds) {
                    Err(Errno::PERM) => reopen(node, OFlags::RDWR | OFlags::APPEND, &proc_fds),
                    opened => opened,
                },
            };
            *slot = Some((id, access, file?));
        }
        slot.as_mut().map(|(_, _, file)| file).ok_or(Errno::INVAL)
    }

    /// Whether node `id` is open for at least `access`.
    pub fn is_open(&self, id: u64, access: Access) -> bool {
        let slot = self.slots.get(id as usize % SLOTS).and_then(Option::as_ref);
        slot.is_some_and(|(of, with, _)| *of == id && *with >= access)
    }

    /// Keeps a file that was just created.
    pub fn put(&mut self, id: u64, file: File) {
        if let Some(slot) = self.slots.get_mut(id as usize % SLOTS) {
            *slot = Some((id, Access::Write, file));
        }
    }

    /// Closes the file of a node that is gone.
    pub fn forget(&mut self, id: u64) {
        if let Some(slot) = self.slots.get_mut(id as usize % SLOTS) {
            slot.take_if(|(of, _, _)| *of == id);
        }
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.slots.fill_with(|| None);
    }
}

/// Opens what an `O_PATH` descriptor names; regular files and directories only, since opening anything else (a device that
/// the guest made, a pipe) could act or wait.
///
/// # Errors
/// EISDIR or EINVAL for another type; the system call's.
pub fn reopen(node: &Node, flags: OFlags, proc_fds: impl AsFd) -> Result<File, Errno> {
    let directory = flags.contains(OFlags::DIRECTORY);
    match node.kind {
        FileType::RegularFile if !directory => {}
        FileType::Directory if directory => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ if directory => return Err(Errno::NOTDIR),
        _ => return Err(Errno::INVAL),
    }
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let name = DecInt::from_fd(&node.path);
    Ok(openat(proc_fds, name, flags, Mode::empty()).map_err(out_of_descriptors)?.into())
}

/// The guest is out of files, whichever of our limits that is.
pub fn out_of_descriptors(errno: Errno) -> Errno {
    if errno == Errno::MFILE { Errno::NFILE } else { errno }
}

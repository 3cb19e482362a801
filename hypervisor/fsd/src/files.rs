//! Descriptors for reading and writing, opened when a request needs one and kept for the next.
//!
//! The guest hardly ever opens or closes a file here (see [`crate::handshake`]), so nothing says when a descriptor is done
//! with. The latest [`CACHED`] stay open, for all connections together, as long as the budget has room for them: a file
//! that the guest knows goes before one that is only open. A request holds the file that it uses, so closing one here
//! disturbs no other thread. Without room, a file is open for the time of its request.

use std::{
    collections::HashMap,
    fs::File,
    mem::ManuallyDrop,
    ops::Deref,
    os::fd::{AsFd, AsRawFd, FromRawFd},
    sync::{Arc, Mutex, MutexGuard},
};

use rustix::{
    fs::{FileType, Mode, OFlags, openat},
    io::Errno,
    path::DecInt,
};

use crate::{
    budget::{Budget, Claim},
    nodes::Node,
};

/// Files kept open.
pub const CACHED: usize = 512;

/// What a file is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reading.
    Read,
    /// Appending and reading: all that Linux allows with a file that can only be appended to (chattr +a).
    Append,
    /// Writing anywhere and reading.
    Write,
}

impl Access {
    /// How open(2) is asked for it.
    pub fn flags(self) -> OFlags {
        match self {
            Self::Read => OFlags::RDONLY,
            Self::Append => OFlags::RDWR.union(OFlags::APPEND),
            Self::Write => OFlags::RDWR,
        }
    }
}

/// A regular file that is open.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    /// What it was opened for.
    pub access: Access,
    _claim: Option<Claim>,
}

impl Deref for OpenFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl OpenFile {
    /// Lends the file to an interface that wants it for itself (that of fuse-backend-rs), though it changes nothing of it.
    pub fn lend<T>(&self, use_it: impl FnOnce(&mut File) -> T) -> T {
        // SAFETY: the descriptor is open for as long as `self` is borrowed, and ManuallyDrop leaves it open.
        let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(self.file.as_raw_fd()) });
        use_it(&mut file)
    }
}

/// A connection's number and a node's number on it.
pub type Owner = (usize, u64);

#[derive(Debug, Default)]
struct Slots {
    open: HashMap<Owner, (u64, Arc<OpenFile>)>,
    /// Counts uses, so that the slot with the smallest number is the one that was used least recently.
    clock: u64,
}

impl Slots {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn take_oldest(&mut self) -> Option<Arc<OpenFile>> {
        let oldest = *self.open.iter().min_by_key(|(_, (used, _))| *used)?.0;
        self.open.remove(&oldest).map(|(_, file)| file)
    }
}

/// See the module's introduction.
#[derive(Debug)]
pub struct OpenFiles {
    budget: Arc<Budget>,
    slots: Mutex<Slots>,
}

impl OpenFiles {
    /// Keeps none open yet, and counts all in `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, slots: Mutex::default() }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes a part of the budget for something else than these files, which are closed if that makes room.
    ///
    /// # Errors
    /// ENFILE if it does not.
    pub fn claim(&self, units: usize) -> Result<Claim, Errno> {
        loop {
            if let Some(claim) = self.budget.claim(units) {
                return Ok(claim);
            }
            // The lock is not held while a file is closed.
            let oldest = self.slots().take_oldest();
            drop(oldest.ok_or(Errno::NFILE)?);
        }
    }

    /// The file of `owner`, if it is open for at least `access`.
    pub fn get(&self, owner: Owner, access: Access) -> Option<Arc<OpenFile>> {
        let mut slots = self.slots();
        let now = slots.tick();
        let (used, file) = slots.open.get_mut(&owner).filter(|(_, file)| file.access >= access)?;
        *used = now;
        Some(file.clone())
    }

    /// Keeps a file that was just opened, if there is room for it.
    pub fn put(&self, owner: Owner, file: File, access: Access) -> Arc<OpenFile> {
        let claim = self.claim(1).ok();
        let keep = claim.is_some();
        let file = Arc::new(OpenFile { file, access, _claim: claim });
        if keep {
            let mut slots = self.slots();
            // Another thread may have opened it for more.
            if slots.open.get(&owner).is_none_or(|(_, open)| open.access <= access) {
                let now = slots.tick();
                let replaced = slots.open.insert(owner, (now, file.clone()));
                let oldest = if slots.open.len() > CACHED { slots.take_oldest() } else { None };
                drop(slots);
                drop((replaced, oldest));
            }
        }
        file
    }

    /// Closes the file of a node that is gone.
    pub fn close(&self, owner: Owner) {
        let closed = self.slots().open.remove(&owner);
        drop(closed);
    }

    /// Closes the file of a node if it is open for more than reading: the host's processes cannot execute such a file.
    pub fn close_for_writing(&self, owner: Owner) {
        let mut slots = self.slots();
        if slots.open.get(&owner).is_some_and(|(_, file)| file.access > Access::Read) {
            let closed = slots.open.remove(&owner);
            drop(slots);
            drop(closed);
        }
    }

    /// Closes all of a connection.
    pub fn clear(&self, connection: usize) {
        let mut slots = self.slots();
        let (gone, open) = std::mem::take(&mut slots.open).into_iter().partition(|((of, _), _)| *of == connection);
        slots.open = open;
        drop(slots);
        drop::<HashMap<_, _>>(gone);
    }
}

/// Opens what an `O_PATH` descriptor names; regular files and directories only, since opening anything else (a device that
/// the guest made, a pipe) could act or wait.
///
/// # Errors
/// EISDIR or EINVAL for another type; the system call's.
pub fn reopen(node: &Node, flags: OFlags, proc_fds: impl AsFd) -> Result<File, Errno> {
    reopen_path(node.kind, &node.path, flags, proc_fds)
}

/// The same, of one of a node's descriptors.
///
/// # Errors
/// See [`reopen`].
pub fn reopen_path(kind: FileType, path: impl AsFd, flags: OFlags, proc_fds: impl AsFd) -> Result<File, Errno> {
    let directory = flags.contains(OFlags::DIRECTORY);
    match kind {
        FileType::RegularFile if !directory => {}
        FileType::Directory if directory => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ if directory => return Err(Errno::NOTDIR),
        _ => return Err(Errno::INVAL),
    }
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let name = DecInt::from_fd(path);
    Ok(openat(proc_fds, name, flags, Mode::empty()).map_err(out_of_descriptors)?.into())
}

/// The guest is out of files, whichever of our limits that is.
pub fn out_of_descriptors(errno: Errno) -> Errno {
    if errno == Errno::MFILE { Errno::NFILE } else { errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any_file() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn open_files_go_before_what_the_guest_knows() {
        let files = OpenFiles::new(Budget::new(3));
        for node in 1..=3 {
            files.put((0, node), any_file(), Access::Read);
        }
        files.get((0, 1), Access::Read).unwrap();
        let claims = [files.claim(1).unwrap(), files.claim(1).unwrap()];
        assert!(files.get((0, 1), Access::Read).is_some(), "the one that was used last");
        assert!(files.get((0, 2), Access::Read).is_none() && files.get((0, 3), Access::Read).is_none());
        let last = files.claim(1).unwrap();
        assert_eq!(files.claim(1).map(drop), Err(Errno::NFILE));
        // Then a file is open only while it is used.
        let file = files.put((0, 4), any_file(), Access::Write);
        file.metadata().unwrap();
        assert!(files.get((0, 4), Access::Read).is_none());
        drop((claims, last));
        assert_eq!(files.budget.used(), 0);
    }

    #[test]
    fn a_file_that_is_in_use_counts_until_it_is_closed() {
        let files = OpenFiles::new(Budget::new(1));
        let file = files.put((0, 1), any_file(), Access::Read);
        assert_eq!(files.claim(1).map(drop), Err(Errno::NFILE));
        drop(file);
        assert!(files.claim(1).is_ok());
    }

    #[test]
    fn a_file_is_kept_for_the_most_that_it_was_opened_for() {
        let files = OpenFiles::new(Budget::new(9));
        files.put((0, 1), any_file(), Access::Append);
        assert!(files.get((0, 1), Access::Write).is_none());
        files.put((0, 1), any_file(), Access::Write);
        files.put((0, 1), any_file(), Access::Read);
        assert!(files.get((0, 1), Access::Append).is_some_and(|file| file.access == Access::Write));
        files.put((1, 1), any_file(), Access::Read);
        files.close_for_writing((1, 1));
        files.close_for_writing((0, 1));
        assert!(files.get((0, 1), Access::Read).is_none() && files.get((1, 1), Access::Read).is_some());
        files.clear(1);
        assert!(files.get((1, 1), Access::Read).is_none());
    }

    #[test]
    fn no_more_than_so_many_are_kept_open() {
        let files = OpenFiles::new(Budget::new(CACHED * 2));
        for node in 0..CACHED as u64 + 9 {
            files.put((0, node), any_file(), Access::Read);
        }
        assert_eq!(files.budget.used(), CACHED);
    }
}

//! Locks of files that the host's processes and other pods use as well.
//!
//! A guest's lock becomes a lock of the host's kernel, on an open file description of its own for each lock owner (a process of
//! the guest, or an open file description there): OFD locks for fcntl(2), flock(2) locks for flock(2). So the host's kernel
//! decides who has a lock, and nothing stays when this process ends.
//!
//! No request waits. The guest's kernel asks again for a lock that somebody else has (guest-image/kernel/patches), because
//! virtio-fs has no way to take a waiting request back when its process is killed.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

use fuse_backend_rs::api::filesystem::FileLock;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{budget::Claim, ranges::Ranges};

/// Owners that may hold locks at once, each with a descriptor.
const MAX_OWNERS: usize = 1024;

/// Ranges that all owners may have locked at once: the host's kernel has some memory in use for each.
const MAX_RANGES: usize = 16384;

/// FUSE_LK_FLOCK of include/uapi/linux/fuse.h.
const FLOCK: u32 = 1;

/// Whose locks on which file, and which of the two kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    node: u64,
    owner: u64,
    flock: bool,
}

#[derive(Debug)]
struct Held {
    file: File,
    ranges: Ranges,
    _claim: Claim,
}

/// All that the guest holds.
#[derive(Debug, Default)]
pub struct Locks {
    held: HashMap<Key, Held>,
    /// Of all owners.
    ranges: usize,
}

impl Locks {
    /// Takes a lock or gives it back. `open` opens the file with a part of the budget, for writing if that is asked for and possible.
    ///
    /// # Errors
    /// EAGAIN if somebody else has it, ENOLCK if too many locks are held, EINVAL, the system calls'.
    pub fn set(
        &mut self,
        (node, owner): (u64, u64),
        lock: FileLock,
        flags: u32,
        open: impl FnOnce(bool) -> Result<(File, Claim), Errno>,
    ) -> Result<(), Errno> {
        let key = Key { node, owner, flock: flags & FLOCK != 0 };
        let kind = i16::try_from(lock.lock_type).map_err(|_| Errno::INVAL)?;
        if ![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK].contains(&i32::from(kind)) {
            return Err(Errno::INVAL);
        }
        let release = kind == libc::F_UNLCK as i16;
        if !self.held.contains_key(&key) {
            if release {
                return Ok(());
            }
            if self.held.len() >= MAX_OWNERS {
                return Err(Errno::NOLCK);
            }
            let (file, claim) = open(!key.flock)?;
            self.held.insert(key, Held { file, ranges: Ranges::default(), _claim: claim });
        }
        let held = self.held.get_mut(&key).ok_or(Errno::NOLCK)?;
        if self.ranges >= MAX_RANGES && (!release || held.ranges.are_split_by(lock.start, lock.end)) {
            self.remove_if_empty(&key);
            return Err(Errno::NOLCK);
        }
        let before = held.ranges.len();
        let done = if key.flock {
            let operation = match i32::from(kind) {
                libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
                libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
                _ => FlockOperation::NonBlockingUnlock,
            };
            flock(&held.file, operation)
        } else {
            description(kind, &lock).and_then(|mut lock| call(&held.file, libc::F_OFD_SETLK, &mut lock))
        };
        if done.is_ok() {
            let (first, last) = if key.flock { (0, u64::MAX) } else { (lock.start, lock.end) };
            if release {
                held.ranges.remove(first, last);
            } else {
                held.ranges.insert(first, last);
            }
        }
        self.ranges = (self.ranges + held.ranges.len()).saturating_sub(before);
        self.remove_if_empty(&key);
        done
    }

    fn remove_if_empty(&mut self, key: &Key) {
        if self.held.get(key).is_some_and(|held| held.ranges.is_empty()) {
            self.held.remove(key);
        }
    }

    /// The lock that stands in the way of `lock`, or one of type F_UNLCK.
    ///
    /// # Errors
    /// EINVAL, the system calls'.
    pub fn get(
        &self,
        (node, owner): (u64, u64),
        lock: FileLock,
        open: impl FnOnce(bool) -> Result<(File, Claim), Errno>,
    ) -> Result<FileLock, Errno> {
        let kind = i16::try_from(lock.lock_type).map_err(|_| Errno::INVAL)?;
        let mut found = description(kind, &lock)?;
        match self.held.get(&Key { node, owner, flock: false }) {
            Some(held) => call(&held.file, libc::F_OFD_GETLK, &mut found)?,
            None => call(open(true)?.0, libc::F_OFD_GETLK, &mut found)?,
        }
        let start = u64::try_from(found.l_start).map_err(|_| Errno::IO)?;
        let end = match u64::try_from(found.l_len).map_err(|_| Errno::IO)? {
            0 => i64::MAX as u64,
            len => start.saturating_add(len - 1),
        };
        // A pid of the host means nothing in the guest.
        Ok(FileLock { start, end, lock_type: u32::try_from(found.l_type).map_err(|_| Errno::IO)?, pid: 0 })
    }

    /// Ends the locks of a node that is gone.
    pub fn forget(&mut self, node: u64) {
        if self.held.is_empty() {
            return;
        }
        self.held.retain(|key, _| key.node != node);
        self.ranges = self.held.values().map(|held| held.ranges.len()).sum();
    }

    /// Ends all.
    pub fn clear(&mut self) {
        self.held.clear();
        self.ranges = 0;
    }
}

/// The lock as fcntl(2) takes it. FUSE gives the last byte, which is i64::MAX for "to the end, whatever it will be".
fn description(kind: i16, lock: &FileLock) -> Result<libc::flock64, Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let end = i64::try_from(lock.end).map_err(|_| Errno::INVAL)?;
    let len = match end {
        i64::MAX => 0,
        _ => end.checked_sub(start).and_then(|len| len.checked_add(1)).filter(|len| *len > 0).ok_or(Errno::INVAL)?,
    };
    Ok(libc::flock64 { l_type: kind, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 })
}

fn call(file: impl AsFd, command: i32, lock: &mut libc::flock64) -> Result<(), Errno> {
    // SAFETY: the descriptor is open, and both commands read and write a flock64, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, lock as *mut libc::flock64) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

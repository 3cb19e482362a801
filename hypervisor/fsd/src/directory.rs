//! Listing directories.
//!
//! Entries come in the kernel's order with the kernel's positions. The directory stays open while the guest lists it, and
//! entries that did not fit into a reply wait for the next request, so that the kernel is never asked to go back to a
//! position: tmpfs counts entries (before Linux 6.6), and would skip some after others were removed (`rm -r`).

use std::{
    collections::{HashMap, VecDeque},
    ffi::CString,
    fs::File,
    mem::MaybeUninit,
    sync::{Arc, Mutex},
};

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::{
    fs::{FileType, RawDir, SeekFrom, seek},
    io::Errno,
};

use crate::{budget::Claim, tree::Tree};

/// Room for entries from the kernel, bytes. A guest asks for a page at a time.
const BUFFER: usize = 4096;

/// What an open directory takes of the budget: the descriptor, and entries that wait, some 12 KiB at most.
pub const UNITS: usize = 5;

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    /// The directory itself.
    pub file: File,
    listing: Mutex<Listing>,
    _claim: Claim,
}

#[derive(Debug, Default)]
struct Listing {
    /// Where the guest goes on if it lists in order: before the first waiting entry.
    position: u64,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    inode: u64,
    /// The position after it.
    next: u64,
    kind: FileType,
    name: CString,
}

impl Directory {
    /// A directory that was just opened.
    pub fn new(file: File, claim: Claim) -> Self {
        Self { file, listing: Mutex::default(), _claim: claim }
    }

    /// Gives entries from `offset` on to `add`, until it returns 0 (which it also does when it has no room) or the
    /// directory ends.
    ///
    /// # Errors
    /// The system calls', and that of `add`; only before the first entry, since the others must reach the guest.
    fn each(
        &self,
        offset: u64,
        mut add: impl FnMut(&CString, DirEntry) -> std::io::Result<usize>,
    ) -> Result<(), Errno> {
        let listing = &mut *self.listing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if offset != listing.position {
            listing.waiting.clear();
            listing.position = seek(&self.file, SeekFrom::Start(offset))?;
        }
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut first = true;
        loop {
            while let Some(Waiting { inode, next, kind, name }) = listing.waiting.front() {
                let view = DirEntry { ino: *inode, offset: *next, type_: directory_type(*kind), name: name.as_bytes() };
                match add(name, view) {
                    Ok(0) => return Ok(()),
                    Ok(_) => listing.position = *next,
                    Err(error) if first => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
                    Err(_) => return Ok(()),
                }
                first = false;
                listing.waiting.pop_front();
            }
            match self.read(&mut buffer, &mut listing.waiting) {
                Ok(()) if listing.waiting.is_empty() => return Ok(()),
                Ok(()) => {}
                Err(errno) if first => return Err(errno),
                Err(_) => return Ok(()),
            }
        }
    }

    /// Reads the next entries; none at the end.
    fn read(&self, buffer: &mut [MaybeUninit<u8>], waiting: &mut VecDeque<Waiting>) -> Result<(), Errno> {
        let mut entries = RawDir::new(&self.file, buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            waiting.push_back(Waiting {
                inode: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
                name: entry.file_name().to_owned(),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// The directories that the guest has open.
#[derive(Debug, Default)]
pub struct Directories {
    /// By handle: the node and its directory.
    open: HashMap<u64, (u64, Arc<Directory>)>,
    last: u64,
}

impl Directories {
    /// Keeps a directory and returns its handle.
    pub fn insert(&mut self, node: u64, directory: Directory) -> u64 {
        self.last += 1;
        self.open.insert(self.last, (node, Arc::new(directory)));
        self.last
    }

    /// An open directory.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn get(&self, node: u64, handle: u64) -> Result<Arc<Directory>, Errno> {
        match self.open.get(&handle) {
            Some((of, directory)) if *of == node => Ok(directory.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// Takes a directory out.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn remove(&mut self, node: u64, handle: u64) -> Result<Arc<Directory>, Errno> {
        let directory = self.get(node, handle)?;
        self.open.remove(&handle);
        Ok(directory)
    }
}

/// Adds entries from `offset` on.
///
/// # Errors
/// See [`Directory`]; EBADF if the handle is not one of this node.
pub fn list(
    tree: &Tree,
    node: u64,
    handle: u64,
    offset: u64,
    add: &mut dyn FnMut(DirEntry) -> std::io::Result<usize>,
) -> Result<(), Errno> {
    let directory = tree.directory(node, handle)?;
    let device = tree.node(node)?.key.device;
    directory.each(offset, |_, entry| add(DirEntry { ino: tree.ino(device, entry.ino), ..entry }))
}

/// The same, with each entry's attributes and a reference to it for the guest.
///
/// # Errors
/// See [`Directory`]; EBADF if the handle is not one of this node.
pub fn list_plus(
    tree: &Tree,
    node: u64,
    handle: u64,
    offset: u64,
    add: &mut dyn FnMut(DirEntry, Entry) -> std::io::Result<usize>,
) -> Result<(), Errno> {
    let directory = tree.directory(node, handle)?;
    let device = tree.node(node)?.key.device;
    directory.each(offset, |name, entry| {
        // Without a node number the guest takes the name alone. So for "." and "..", and for what cannot be looked up
        // (it is gone, or the guest knows too many files): a listing must not fail for one entry.
        let found = tree.lookup(node, name).unwrap_or_default();
        let known = found.inode;
        let inode = if known == 0 { tree.ino(device, entry.ino) } else { found.attr.st_ino };
        let added = add(DirEntry { ino: inode, ..entry }, found);
        if known != 0 && !matches!(added, Ok(1..)) {
            tree.forget(known, 1);
        }
        added
    })
}

fn directory_type(kind: FileType) -> u32 {
    let kind = match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    };
    u32::from(kind)
}

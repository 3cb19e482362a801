//! Listing directories.
//!
//! Entries come in the kernel's order with the kernel's positions; a listing goes on at the position that the guest names.
//! The directory stays open meanwhile, so that entries which are removed between two requests do not shift the rest
//! (`rm -r` on tmpfs) and overlayfs merges its layers once.

use std::{ffi::CStr, fs::File, mem::MaybeUninit};

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::{
    fs::{FileType, RawDir, SeekFrom, seek},
    io::Errno,
};

use crate::tree::Tree;

/// Room for entries from the kernel, bytes. A guest asks for a page at a time; with attributes, fewer entries fill it.
const BUFFER: usize = 4096;
const BUFFER_PLUS: usize = 1024;

/// Adds entries from `offset` on until `add` returns 0 or the directory ends.
///
/// # Errors
/// The system calls'; that of `add`.
pub fn list(
    directory: &File,
    size: u32,
    offset: u64,
    add: &mut dyn FnMut(DirEntry) -> std::io::Result<usize>,
) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    each(directory, size, offset, &mut buffer, |_, entry| add(entry))
}

/// The same, with each entry's attributes and a reference to it for the guest.
///
/// # Errors
/// The system calls'; that of `add`.
pub fn list_plus(
    tree: &mut Tree,
    node: u64,
    handle: u64,
    size: u32,
    offset: u64,
    add: &mut dyn FnMut(DirEntry, Entry) -> std::io::Result<usize>,
) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER_PLUS];
    let directory =
        tree.directory(node, handle)?.try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    each(&directory, size, offset, &mut buffer, |name, entry| {
        // Without a node number the guest takes the name alone. So for "." and "..", and for what cannot be looked up
        // (it is gone, or the guest knows too many files): a listing must not fail for one entry.
        let found = tree.lookup(node, name).unwrap_or_default();
        let known = found.inode;
        let inode = if known == 0 { entry.ino } else { found.attr.st_ino };
        let added = add(DirEntry { ino: inode, ..entry }, found);
        if known != 0 && !matches!(added, Ok(1..)) {
            tree.forget(known, 1);
        }
        added
    })
}

fn each(
    directory: &File,
    size: u32,
    offset: u64,
    buffer: &mut [MaybeUninit<u8>],
    mut add: impl FnMut(&CStr, DirEntry) -> std::io::Result<usize>,
) -> Result<(), Errno> {
    if size == 0 {
        return Ok(());
    }
    seek(directory, SeekFrom::Start(offset))?;
    let mut entries = RawDir::new(directory, buffer);
    let mut first = true;
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            // What is added already bears references, so it has to reach the guest.
            Err(errno) if first => return Err(errno),
            Err(_) => return Ok(()),
        };
        let name = entry.file_name();
        let view = DirEntry {
            ino: entry.ino(),
            offset: entry.next_entry_cookie(),
            type_: kind(entry.file_type()),
            name: name.to_bytes(),
        };
        match add(name, view) {
            Ok(0) => return Ok(()),
            Ok(_) => first = false,
            Err(e) if first => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
            Err(_) => return Ok(()),
        }
    }
    Ok(())
}

fn kind(kind: FileType) -> u32 {
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

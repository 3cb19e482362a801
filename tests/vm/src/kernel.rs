//! ELF files around a few bytes of code: kernels that boot in no time and do one thing.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::fd::OwnedFd,
};

/// Where the code is loaded and begins.
pub const ENTRY: u64 = 0x10_0000;
/// Where the code is in the file.
pub const OFFSET: u64 = 0x1000;

/// One program header.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub memory_size: u64,
}

/// An ELF file with these program headers and `code` at [`OFFSET`].
pub fn elf(entry: u64, segments: &[Segment], code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(entry.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 14]);
    file.extend(56u16.to_le_bytes());
    file.extend((segments.len() as u16).to_le_bytes());
    file.resize(64, 0);
    for segment in segments {
        file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for word in [segment.offset, segment.address, segment.address, segment.file_size, segment.memory_size, 4096] {
            file.extend(word.to_le_bytes());
        }
    }
    file.resize(OFFSET as usize, 0);
    file.extend(code);
    file
}

/// A kernel that is just `code`.
pub fn flat(code: &[u8]) -> Vec<u8> {
    let size = code.len() as u64;
    elf(ENTRY, &[Segment { address: ENTRY, offset: OFFSET, file_size: size, memory_size: size + 0x1_0000 }], code)
}

/// A file with this content that nobody else can name.
pub fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(content).expect("writing a temporary file");
    file.seek(SeekFrom::Start(0)).expect("a temporary file seeks");
    file
}

/// The same as a descriptor to hand over.
pub fn descriptor(content: &[u8]) -> OwnedFd {
    file(content).into()
}

//! Puts a kernel into guest memory, ready for its first instruction (Linux's 64-bit boot protocol).
//!
//! Nothing is copied that can be mapped: kernel and initramfs are private mappings of their files, so machines share
//! the pages that they do not write, and those that they never touch are never read.

mod cmdline;
mod elf;
mod mptable;
mod params;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

pub use self::{
    cmdline::{CommandLine, CommandLineError},
    elf::ElfError,
    params::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES},
};
use self::{
    elf::{HEADER_SIZE, Header, Piece},
    params::Initramfs,
};
use crate::{
    layout::{COMMAND_LINE, MP_TABLE, PAGE_SIZE},
    memory::{MemoryError, map_file},
    virtio::GuestMemory,
};

/// A file that the parent handed over, with the size that it had then.
#[derive(Debug)]
pub struct Image {
    /// Readable.
    pub file: OwnedFd,
    /// Bytes. Mapping more than the file has would kill the monitor when the guest goes there.
    pub size: u64,
}

/// A machine that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// Nothing in it, or truncated while we read it.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// An empty initramfs.
    #[error("initramfs is empty: is it truncated?")]
    EmptyInitramfs,
    /// No place for it.
    #[error(
        "initramfs of {size} bytes does not fit between the kernel's end at {from:#x} and {to:#x}: give the machine more memory"
    )]
    Initramfs {
        /// Bytes.
        size: u64,
        /// End of the kernel.
        from: u64,
        /// End of low memory.
        to: u64,
    },
    /// Mapping.
    #[error(transparent)]
    Map(#[from] MemoryError),
    /// Writing to guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Loads everything; gives the guest address of the first instruction.
///
/// # Errors
/// See [`BootError`]; memory is then in an unknown state.
pub fn load(
    memory: &GuestMemory,
    kernel: &Image,
    initramfs: Option<&Image>,
    command_line: CommandLine,
    processors: u8,
) -> Result<GuestAddress, BootError> {
    let command_line = command_line.finish()?;
    let low_end = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let (entry, kernel_end) = load_kernel(memory, kernel, low_end)?;
    let initramfs = initramfs.map(|image| load_initramfs(memory, image, kernel_end, low_end)).transpose()?;
    memory.write_slice(&command_line, COMMAND_LINE)?;
    memory.write_slice(&mptable::build(processors), MP_TABLE)?;
    params::write(memory, command_line.len(), initramfs)?;
    Ok(GuestAddress(entry))
}

fn load_kernel(memory: &GuestMemory, image: &Image, low_end: u64) -> Result<(u64, u64), BootError> {
    let read = |source: io::Error| BootError::Read { what: "kernel", source };
    if image.size < HEADER_SIZE as u64 {
        return Err(ElfError::NoHeader(image.size).into());
    }
    let mut header = [0; HEADER_SIZE];
    read_exact(image, &mut header, 0).map_err(read)?;
    let header = Header::parse(&header, image.size)?;
    let mut program_headers = vec![0; header.program_headers_len];
    read_exact(image, &mut program_headers, header.program_headers).map_err(read)?;
    let kernel = header.plan(&program_headers, image.size, low_end)?;
    for segment in &kernel.segments {
        let pieces = segment.pieces();
        if let Some(Piece { address, offset, len }) = pieces.mapped {
            map_file(memory, GuestAddress(address), len, image.file.as_fd(), offset)?;
        }
        for piece in [pieces.head, pieces.tail].into_iter().flatten() {
            copy(memory, image, piece).map_err(|error| match error {
                CopyError::Read(error) => read(error),
                CopyError::Memory(error) => error.into(),
            })?;
        }
    }
    Ok((kernel.entry, kernel.end()))
}

enum CopyError {
    Read(io::Error),
    Memory(GuestMemoryError),
}

/// Copies in pieces of bounded size: a segment whose file offset and address do not match in the page may be large.
fn copy(memory: &GuestMemory, image: &Image, piece: Piece) -> Result<(), CopyError> {
    let mut buffer = vec![0; piece.len.min(64 << 10) as usize];
    let mut done = 0;
    while done < piece.len {
        let count = (piece.len - done).min(buffer.len() as u64) as usize;
        let part = buffer.get_mut(..count).unwrap_or_default();
        read_exact(image, part, piece.offset + done).map_err(CopyError::Read)?;
        memory.write_slice(part, GuestAddress(piece.address + done)).map_err(CopyError::Memory)?;
        done += count as u64;
    }
    Ok(())
}

/// At the very end of low memory: far from what the kernel allocates first.
fn load_initramfs(memory: &GuestMemory, image: &Image, from: u64, to: u64) -> Result<Initramfs, BootError> {
    if image.size == 0 {
        return Err(BootError::EmptyInitramfs);
    }
    let no_room = || BootError::Initramfs { size: image.size, from, to };
    let mapped = image.size.checked_next_multiple_of(PAGE_SIZE).ok_or_else(no_room)?;
    let start =
        to.checked_sub(mapped).filter(|start| *start >= from.next_multiple_of(PAGE_SIZE)).ok_or_else(no_room)?;
    map_file(memory, GuestAddress(start), mapped, image.file.as_fd(), 0)?;
    // Both lie below the gap at 3 GiB.
    Ok(Initramfs { address: start as u32, size: image.size as u32 })
}

fn read_exact(image: &Image, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match rustix::io::pread(&image.file, &mut *buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buffer = buffer.get_mut(n..).unwrap_or_default();
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

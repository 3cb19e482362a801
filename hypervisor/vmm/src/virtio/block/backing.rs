//! What a disk's bytes are kept in, and the system calls that it takes. All of them may block for as long as the storage
//! below likes, so only the disk's own thread makes them ([`super::engine`]).

use std::{io, os::fd::OwnedFd};

use rustix::fs::{FallocateFlags, fallocate, fdatasync, ioctl_blksszget};

use super::request::{SECTOR, Segment};

/// Zeros are written in pieces of this size where the file cannot make them itself.
const ZEROES: usize = 64 << 10;

/// A file or block device; tests have their own.
pub trait Backing: Send + 'static {
    /// The block size that a partition table or file system on it counts in, bytes.
    fn block_size(&self) -> u32 {
        SECTOR as u32
    }

    /// Reads at `position`; may read less.
    ///
    /// # Errors
    /// The system call's.
    fn read_at(&self, data: &mut [u8], position: u64) -> io::Result<usize>;

    /// Writes at `position`; may write less.
    ///
    /// # Errors
    /// The system call's.
    fn write_at(&self, data: &[u8], position: u64) -> io::Result<usize>;

    /// fallocate(2); the file keeps its size.
    ///
    /// # Errors
    /// The system call's.
    fn fallocate(&self, mode: FallocateFlags, position: u64, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The system call's.
    fn sync(&self) -> io::Result<()>;
}

impl Backing for OwnedFd {
    fn block_size(&self) -> u32 {
        // A regular file has none.
        ioctl_blksszget(self).unwrap_or(SECTOR as u32)
    }

    fn read_at(&self, data: &mut [u8], position: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(self, data, position)?)
    }

    fn write_at(&self, data: &[u8], position: u64) -> io::Result<usize> {
        Ok(rustix::io::pwrite(self, data, position)?)
    }

    fn fallocate(&self, mode: FallocateFlags, position: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(self, mode | FallocateFlags::KEEP_SIZE, position, len)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self)?)
    }
}

/// Fills all of `data`.
///
/// # Errors
/// The system call's; UnexpectedEof if the file has become shorter than it was.
pub fn read_all(backing: &impl Backing, mut data: &mut [u8], mut position: u64) -> io::Result<()> {
    while !data.is_empty() {
        let count = moved(retry(|| backing.read_at(data, position))?)?;
        data = data.get_mut(count..).unwrap_or_default();
        position += count as u64;
    }
    Ok(())
}

/// Writes all of `data`.
///
/// # Errors
/// The system call's.
pub fn write_all(backing: &impl Backing, mut data: &[u8], mut position: u64) -> io::Result<()> {
    while !data.is_empty() {
        let count = moved(retry(|| backing.write_at(data, position))?)?;
        data = data.get(count..).unwrap_or_default();
        position += count as u64;
    }
    Ok(())
}

/// Gives the blocks of a range back.
///
/// # Errors
/// The system call's.
pub fn discard(backing: &impl Backing, segment: Segment) -> io::Result<()> {
    match allocate(backing, FallocateFlags::PUNCH_HOLE, segment) {
        // A discard is advice: what cannot forget keeps its bytes.
        Err(error) if cannot(&error) => Ok(()),
        done => done,
    }
}

/// Makes a range read as zeros.
///
/// # Errors
/// The system call's.
pub fn write_zeroes(backing: &impl Backing, segment: Segment) -> io::Result<()> {
    let mode = if segment.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    match allocate(backing, mode, segment) {
        Err(error) if cannot(&error) => {
            let zeroes = vec![0; ZEROES];
            let mut done = 0;
            while done < segment.len {
                let piece = zeroes.get(..(segment.len - done).min(ZEROES as u64) as usize).unwrap_or_default();
                write_all(backing, piece, segment.position + done)?;
                done += piece.len() as u64;
            }
            Ok(())
        }
        done => done,
    }
}

fn allocate(backing: &impl Backing, mode: FallocateFlags, segment: Segment) -> io::Result<()> {
    // fallocate(2) refuses an empty range.
    if segment.len == 0 { Ok(()) } else { retry(|| backing.fallocate(mode, segment.position, segment.len)) }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn moved(count: usize) -> io::Result<usize> {
    if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(count) }
}

/// Whether the file or device cannot do it, as opposed to having failed at it. A block device answers EINVAL for a range
/// that is not a multiple of its own logical block, which virtio allows.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::ENOTTY))
}

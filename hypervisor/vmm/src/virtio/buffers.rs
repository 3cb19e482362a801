//! One direction of a descriptor chain: a list of ranges that were checked to lie in guest memory, addressed as if
//! they were one run of bytes.
//!
//! This file is the only place where a guest-chosen range meets a system call. The guest goes on running and may change the
//! bytes at any time, so they are only ever copied or handed to the kernel as an iovec, never borrowed as a slice.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use smallvec::SmallVec;
use vm_memory::{ByteValued, VolatileSlice};

/// Linux takes at most this many iovecs in one call (UIO_MAXIOV, include/uapi/linux/uio.h).
const MAX_IOVECS: usize = 1024;

/// A device asked for bytes that the chain does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain has {have} bytes, the request needs {need}")]
pub struct BufferError {
    /// Bytes in this direction of the chain.
    pub have: usize,
    /// Bytes that were needed from its beginning.
    pub need: usize,
}

/// Where a packet is that [`Buffers::read_packet`] has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its length.
    pub len: usize,
    /// Up to this byte it is in the head and in the chain, from there on in the rest.
    pub in_chain: usize,
}

/// The readable or the writable part of a chain. Empty ranges are not kept.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: SmallVec<[VolatileSlice<'m>; 8]>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Adds a range at the end; false if the total length would overflow u32 (a used element's length is a u32).
    pub(super) fn push(&mut self, slice: VolatileSlice<'m>) -> bool {
        let len = self.len.saturating_add(slice.len());
        if u32::try_from(len).is_err() {
            return false;
        }
        if !slice.is_empty() {
            self.slices.push(slice);
        }
        self.len = len;
        true
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out, starting at `offset`.
    ///
    /// # Errors
    /// If the chain is shorter; then nothing was copied.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), BufferError> {
        let mut rest = into;
        self.each(offset, rest.len(), |slice| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        })
    }

    /// Copies a plain value out, starting at `offset`.
    ///
    /// # Errors
    /// If the chain is shorter.
    pub fn read_obj<T: ByteValued + Default>(&self, offset: usize) -> Result<T, BufferError> {
        let mut value = T::default();
        self.read(offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// Copies bytes in, starting at `offset`.
    ///
    /// # Errors
    /// If the chain is shorter; then nothing was copied.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), BufferError> {
        let mut rest = from;
        self.each(offset, rest.len(), |slice| {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        })
    }

    /// Receives from a stream or pipe into the range `offset..offset + len` with one `readv`.
    /// `None` for `position` reads at the descriptor's own position, otherwise at that one of a file (`preadv`).
    ///
    /// # Errors
    /// InvalidInput if the chain is shorter; else the system call's. Fewer bytes than asked may arrive.
    pub fn read_from(&self, fd: BorrowedFd, position: Option<u64>, offset: usize, len: usize) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, len)?;
        let (count, raw) = (iovecs.len() as libc::c_int, fd.as_raw_fd());
        // SAFETY: each iovec is a range of guest memory, which stays mapped for 'm and belongs to the guest: no Rust
        // reference to these bytes exists, so the kernel may write them.
        let n = unsafe {
            match position {
                None => libc::readv(raw, iovecs.as_ptr(), count),
                Some(at) => libc::preadv64(raw, iovecs.as_ptr(), count, file_offset(at)?),
            }
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the range `offset..offset + len` to a stream or pipe with one `writev`.
    /// `None` for `position` writes at the descriptor's own position, otherwise at that one of a file (`pwritev`).
    ///
    /// # Errors
    /// InvalidInput if the chain is shorter; else the system call's. Fewer bytes than asked may be taken.
    pub fn write_to(&self, fd: BorrowedFd, position: Option<u64>, offset: usize, len: usize) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, len)?;
        let (count, raw) = (iovecs.len() as libc::c_int, fd.as_raw_fd());
        // SAFETY: each iovec is a range of guest memory, which stays mapped for 'm; the kernel only reads it.
        let n = unsafe {
            match position {
                None => libc::writev(raw, iovecs.as_ptr(), count),
                Some(at) => libc::pwritev64(raw, iovecs.as_ptr(), count, file_offset(at)?),
            }
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the whole as one packet to a non-blocking packet socket, with `header` in the place of the chain's own
    /// first `header.len()` bytes (which the guest could change after they were checked).
    ///
    /// # Errors
    /// InvalidInput if the chain is shorter than the header or has more than 1023 ranges; else the system call's. A
    /// packet is sent whole or not at all.
    pub fn send_packet(&self, socket: BorrowedFd, header: &[u8]) -> io::Result<()> {
        let body = self.len.checked_sub(header.len()).ok_or_else(|| self.short(header.len()))?;
        let mut iovecs: SmallVec<[libc::iovec; 16]> = SmallVec::new();
        iovecs.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
        iovecs.extend(self.iovecs(header.len(), body)?);
        if iovecs.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a zeroed msghdr is valid: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        // At most MAX_IOVECS; the type differs between C libraries.
        message.msg_iovlen = iovecs.len() as _;
        // SAFETY: the iovecs point to `header` and to guest memory that stays mapped for 'm; the kernel only reads them.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives one packet from a non-blocking packet socket: its first `header.len()` bytes into `header`, the rest into
    /// the chain from byte `header.len()` on. Returns the packet's length, of which no more than the chain's length
    /// was kept.
    ///
    /// # Errors
    /// InvalidInput if the chain is shorter than the header; else the system call's.
    pub fn receive_packet(&self, socket: BorrowedFd, header: &mut [u8]) -> io::Result<usize> {
        let body = self.len.checked_sub(header.len()).ok_or_else(|| self.short(header.len()))?;
        let mut iovecs: SmallVec<[libc::iovec; 16]> = SmallVec::new();
        iovecs.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
        iovecs.extend(self.iovecs(header.len(), body)?);
        iovecs.truncate(MAX_IOVECS);
        // SAFETY: a zeroed msghdr is valid: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        // At most MAX_IOVECS; the type differs between C libraries.
        message.msg_iovlen = iovecs.len() as _;
        // SAFETY: the iovecs point to `header`, borrowed mutably, and to guest memory that stays mapped for 'm and to whose
        // bytes no Rust reference exists.
        let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the whole as one packet to a descriptor that takes a packet with each `writev` (a tap), with `head` in the place
    /// of the chain's own first `head.len()` bytes (which the guest could change after they were checked).
    ///
    /// # Errors
    /// InvalidInput if the chain is shorter than the head or has more than 1023 ranges; else the system call's.
    pub fn write_packet(&self, fd: BorrowedFd, head: &[u8]) -> io::Result<()> {
        let body = self.len.checked_sub(head.len()).ok_or_else(|| self.short(head.len()))?;
        let mut iovecs: SmallVec<[libc::iovec; 16]> = SmallVec::new();
        iovecs.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        iovecs.extend(self.iovecs(head.len(), body)?);
        if iovecs.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the iovecs point to `head` and to guest memory that stays mapped for 'm; the kernel only reads them.
        let n = unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives one packet from a descriptor that gives one with each `readv` (a tap): its first bytes into `head`, what follows
    /// into the chain from byte `head.len()` on, and what the chain has no room for into `rest`.
    ///
    /// # Errors
    /// The system call's.
    pub fn read_packet(&self, fd: BorrowedFd, head: &mut [u8], rest: &mut [u8]) -> io::Result<Received> {
        let mut iovecs: SmallVec<[libc::iovec; 16]> = SmallVec::new();
        iovecs.push(libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        iovecs.extend(self.iovecs(head.len().min(self.len), self.len.saturating_sub(head.len()))?);
        iovecs.truncate(MAX_IOVECS - 1);
        let in_chain: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        iovecs.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        // SAFETY: the iovecs point to `head` and `rest`, borrowed mutably, and to guest memory that stays mapped for 'm and to
        // whose bytes no Rust reference exists.
        let n = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        let len = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        Ok(Received { len, in_chain: in_chain.min(len) })
    }

    /// Adds the ranges of another one at the end; false if the total length would overflow u32, and then not all were added.
    pub fn append(&mut self, other: &Self) -> bool {
        other.slices.iter().all(|slice| self.push(*slice))
    }

    /// The ranges, in order.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.slices.iter()
    }

    fn short(&self, need: usize) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, BufferError { have: self.len, need })
    }

    /// At most [`MAX_IOVECS`] of them: a longer chain moves fewer bytes, as any short read or write.
    fn iovecs(&self, offset: usize, len: usize) -> io::Result<SmallVec<[libc::iovec; 16]>> {
        let mut iovecs = SmallVec::new();
        self.each(offset, len, |slice| {
            if iovecs.len() < MAX_IOVECS {
                let pointer = slice.ptr_guard_mut().as_ptr();
                iovecs.push(libc::iovec { iov_base: pointer.cast(), iov_len: slice.len() });
            }
        })
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        Ok(iovecs)
    }

    /// Calls `f` with the pieces of `offset..offset + len` in order.
    fn each(&self, offset: usize, len: usize, mut f: impl FnMut(VolatileSlice<'m>)) -> Result<(), BufferError> {
        let need = offset.saturating_add(len);
        if need > self.len {
            return Err(BufferError { have: self.len, need });
        }
        let (mut skip, mut rest) = (offset, len);
        for slice in &self.slices {
            if rest == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let count = rest.min(slice.len() - skip);
            // In bounds by the two checks above.
            let Ok(piece) = slice.subslice(skip, count) else { break };
            f(piece);
            skip = 0;
            rest -= count;
        }
        Ok(())
    }
}

fn file_offset(position: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests;

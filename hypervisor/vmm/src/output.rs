//! Writes that never wait: for the log and for the guest's console, whose readers may be slow or gone. What does not go
//! out at once is dropped and counted.
//!
//! A console must be non-blocking (crate::machine checks that). The log may go to a descriptor that is shared with other
//! processes (a terminal, a file), so that keeps its own mode; instead, each write is preceded by the question whether there
//! is room, and is small enough for the room that a pipe or socket of one writer then has.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// PIPE_BUF: a pipe that is writable has room for this much.
const MAX_WRITE: usize = 4096;

/// An output that drops what it cannot write at once.
#[derive(Clone, Debug)]
pub struct Output {
    fd: Arc<OwnedFd>,
    dropped: Arc<AtomicU64>,
}

impl Output {
    /// Writes to `fd`.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), dropped: Arc::default() }
    }

    /// Bytes dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn write_now(&self, bytes: &[u8]) -> usize {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&*self.fd, PollFlags::OUT)];
        match poll(&mut fds, Some(&now)) {
            Ok(1) if fds.iter().all(|fd| fd.revents() == PollFlags::OUT) => {
                rustix::io::write(&*self.fd, bytes).unwrap_or(0)
            }
            _ => 0,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.chunks(MAX_WRITE) {
            let written = self.write_now(piece);
            self.dropped.fetch_add((piece.len() - written) as u64, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pipe_costs_bytes_but_no_time() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(writer.into());
        let total = 1 << 20;
        output.write_all(&vec![b'x'; total]).unwrap();
        let kept = total as u64 - output.dropped();
        assert!((4096..=65536).contains(&kept), "a pipe holds 64 KiB, {kept} were kept");
    }

    #[test]
    fn a_reader_that_is_gone_does_not_matter() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(writer.into());
        output.write_all(b"lost").unwrap();
        assert_eq!(output.dropped(), 4);
    }
}

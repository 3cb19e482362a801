//! The end of a machine: the first reason that any thread declares is kept, and wakes the main thread once.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use caisson_protos::monitor::{ExitNotice, ExitReason};
use rustix::event::{EventfdFlags, eventfd};

/// Holds the first reason that was declared.
#[derive(Debug)]
pub struct End {
    notice: Mutex<Option<ExitNotice>>,
    event: OwnedFd,
}

impl End {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { notice: Mutex::new(None), event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)? })
    }

    /// The machine has ended; later declarations change nothing.
    pub fn declare(&self, reason: ExitReason, detail: impl Into<String>) {
        let mut notice = self.notice.lock().unwrap_or_else(PoisonError::into_inner);
        if notice.is_none() {
            *notice = Some(ExitNotice { reason, detail: detail.into() });
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Why it ended, if it has.
    pub fn notice(&self) -> Option<ExitNotice> {
        self.notice.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable once the machine has ended, and for ever.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn readable(end: &End) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(end.event(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn the_first_reason_counts() {
        let end = End::new().unwrap();
        assert!(!readable(&end));
        end.declare(ExitReason::Reset, "first");
        end.declare(ExitReason::TripleFault, "second");
        assert_eq!(end.notice().unwrap(), ExitNotice { reason: ExitReason::Reset, detail: "first".into() });
        assert!(readable(&end));
    }
}

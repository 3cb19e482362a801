//! Waiting for a change of one of the kernel's event files (cgroup.events, memory.events), without a clock.
//!
//! The kernel marks an open file of that kind as having an exceptional condition (POLLPRI) when it changes, and takes
//! the mark back when the file is read. So a reader that reads first and waits then misses nothing.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use tokio::io::{Interest, unix::AsyncFd};

/// As much as is read of an event file; it has a handful of short lines.
const MAX_EVENTS: usize = 4096;

/// An open event file.
#[derive(Debug)]
pub struct Watch(AsyncFd<File>);

impl Watch {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// If it is not there, or is no file that can be waited for.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a File has one descriptor, which stays open until it is dropped; and it is never taken out of the
        // AsyncFd.
        Ok(Self(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?))
    }

    /// What it says now.
    ///
    /// # Errors
    /// ENODEV when its cgroup is gone.
    pub fn read(&self) -> io::Result<String> {
        let mut bytes = vec![0; MAX_EVENTS];
        let length = self.0.get_ref().read_at(&mut bytes, 0)?;
        bytes.truncate(length);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until it may say something else than when it was last read.
    ///
    /// # Errors
    /// If the runtime ends.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// Waits until `found` finds something in it.
    ///
    /// # Errors
    /// When its cgroup is gone.
    pub async fn until<T>(&self, found: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        loop {
            if let Some(it) = found(&self.read()?) {
                return Ok(it);
            }
            self.changed().await?;
        }
    }
}

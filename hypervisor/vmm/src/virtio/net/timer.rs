//! When a limit lets packets pass again.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use vmm_sys_util::timerfd::TimerFd;

use super::super::DeviceError;

/// A timer that fires once.
#[derive(Debug)]
pub struct Timer {
    timer: TimerFd,
    running: bool,
}

impl Timer {
    /// One that does not run.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, running: false })
    }

    /// Readable when it has fired.
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether it will fire.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Makes it fire after `wait`, if it does not run already.
    ///
    /// # Errors
    /// The system call's.
    pub fn start(&mut self, wait: Duration) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        // Zero would stop it; far beyond a day nobody waits.
        let wait = wait.clamp(Duration::from_micros(1), Duration::from_secs(86_400));
        self.timer
            .reset(wait, None)
            .map_err(|error| DeviceError::Host { what: "setting the timer of a rate limit", source: error.into() })?;
        self.running = true;
        Ok(())
    }

    /// Stops it, or takes in that it has fired.
    pub fn stop(&mut self) {
        self.running = false;
        let _ = self.timer.clear();
    }
}

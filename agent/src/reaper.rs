//! Every child's end. As PID 1 the agent inherits each process whose parent has gone, and must wait for all of them.

use std::{
    io,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{containers::Containers, lifecycle::Exit};

/// Reaps children as the kernel reports them.
#[derive(Debug)]
pub struct Reaper(Signal);

impl Reaper {
    /// To be called before the first child exists.
    ///
    /// # Errors
    /// If the runtime cannot handle signals.
    pub fn new() -> io::Result<Self> {
        signal(SignalKind::child()).map(Self)
    }

    /// Tells `containers` of every child that ends, for ever.
    pub async fn run(mut self, containers: Arc<Containers>) {
        loop {
            // One signal may stand for many children, and a child may have ended before the first wait.
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                containers.reaped(pid.as_raw_pid(), exit_of(status));
            }
            if self.0.recv().await.is_none() {
                return;
            }
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => u32::try_from(code).unwrap_or(255),
        (None, Some(signal)) => 128 + u32::try_from(signal).unwrap_or(127),
        (None, None) => 255,
    };
    Exit { status: code, at_ns: now_ns() }
}

/// The wall clock, nanoseconds since 1970.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

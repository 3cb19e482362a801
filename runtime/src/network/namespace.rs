//! The namespace, and threads in it.

use std::{fs::File, io, sync::Arc, thread};

use nix::sched::{CloneFlags, setns};

/// A stack for a few system calls, bytes.
const STACK: usize = 256 * 1024;

/// A network namespace of the host.
#[derive(Clone, Debug)]
pub struct Namespace {
    file: Arc<File>,
}

impl From<File> for Namespace {
    fn from(file: File) -> Self {
        Self { file: Arc::new(file) }
    }
}

impl Namespace {
    /// Runs `work` on a thread of its own in the namespace and waits for it. What it opens (sockets, /dev/net/tun) stays there.
    ///
    /// # Errors
    /// If the thread cannot be started or cannot enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let entered = move || setns(&*self.file, CloneFlags::CLONE_NEWNET).map(|()| work());
            let thread = thread::Builder::new().name("netns".into()).stack_size(STACK).spawn_scoped(scope, entered)?;
            let panicked = |_| io::Error::other("the thread in the network namespace failed");
            thread.join().map_err(panicked)?.map_err(io::Error::from)
        })
    }
}

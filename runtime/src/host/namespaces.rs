//! The host's mount namespace, from inside the shim's own ([`crate::rootfs::share`]). What the specification names on the host
//! (sources of bind mounts, hooks) is looked up there: the shim's own namespace shows the same, and the pod's mounts
//! besides, which a container must not reach by a name.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

/// A stack for a few system calls, bytes.
const STACK: usize = 256 * 1024;

/// Runs `work`, which may block, on a thread that shares neither working directory nor root with others. What `work` has captured is
/// dropped here if the thread cannot be started.
///
/// # Errors
/// If the thread cannot be started, or if `work` panics.
pub async fn on_own_thread<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(move || {
        let unshared = unshare(CloneFlags::CLONE_FS).map_err(io::Error::from);
        // The receiver is gone if its future was dropped.
        let _ = sender.send(unshared.map(|()| work()));
    })?;
    receiver.await.unwrap_or_else(|_| Err(io::Error::other(format!("the thread {name} failed"))))
}

/// The mount namespace of the host.
#[derive(Clone, Debug)]
pub struct HostView {
    namespace: Arc<File>,
}

impl HostView {
    /// The calling thread's present mount namespace.
    ///
    /// # Errors
    /// If /proc is not there.
    pub fn here() -> io::Result<Self> {
        Ok(Self { namespace: Arc::new(File::open("/proc/thread-self/ns/mnt")?) })
    }

    /// Runs `work` on a thread of its own in the host's mount namespace. It may wait for the host's file systems as
    /// long as they like.
    ///
    /// # Errors
    /// If the thread cannot be started, or cannot enter the namespace.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let view = self.clone();
        on_own_thread("host", move || view.enter().map(|()| work())).await?
    }

    /// Moves the calling thread or new process there; its root and working directory are the namespace's root then.
    /// Async-signal-safe.
    ///
    /// # Errors
    /// The system call's.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&*self.namespace, CloneFlags::CLONE_NEWNS)?)
    }
}

impl AsFd for HostView {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use nix::mount::{MsFlags, mount};

    use crate::rootfs::share::enter_mount_namespace;

    #[tokio::test]
    async fn what_is_mounted_in_the_own_namespace_is_not_seen_there() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("host"), "").unwrap();
        let view = enter_mount_namespace().expect("these tests run as root");
        mount(Some("t"), directory.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let path = directory.path().to_owned();
        assert!(!path.join("host").exists());
        let seen = |path: &Path| path.join("host").exists();
        assert!(
            view.run({
                let path = path.clone();
                move || seen(&path)
            })
            .await
            .unwrap()
        );
        assert!(!seen(&path), "this thread is where it was");
    }
}

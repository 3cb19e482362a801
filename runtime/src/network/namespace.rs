//! The namespace, and threads in it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Arc, mpsc},
    thread,
};

use caisson_netlink::{Socket, link};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, fstatfs},
    unistd::gettid,
};

/// A stack for a few system calls, bytes.
const STACK: usize = 256 * 1024;
/// A stack for a thread that only waits, bytes: the least that there is (PTHREAD_STACK_MIN), and some.
const WAITING_STACK: usize = 64 * 1024;
/// NSFS_MAGIC in include/uapi/linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);
/// The number of the loopback interface in every namespace.
const LOOPBACK: u32 = 1;

nix::ioctl_none!(kind_of_namespace, 0xb7, 3);

/// A path that leads to no network namespace for a pod.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// It cannot be opened.
    #[error("cannot be opened: {0}")]
    Open(#[from] io::Error),
    /// It is something else.
    #[error("is no network namespace")]
    Other,
    /// It is the host's own.
    #[error("is the host's network namespace, which a machine of its own cannot have")]
    Host,
}

/// What makes a namespace one: the device and the inode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system of namespaces.
    pub device: u64,
    /// The namespace's number, as /proc/PID/ns/net shows it.
    pub inode: u64,
}

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

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Namespace {
    /// The one that `path` leads to.
    ///
    /// # Errors
    /// See [`NamespaceError`].
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        // Nothing happens to a FIFO or a device that is only named.
        let mut options = File::options();
        let named = options.read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
        if fstatfs(&named).map_err(io::Error::from)?.filesystem_type() != NSFS {
            return Err(NamespaceError::Other);
        }
        let file = File::open(format!("/proc/self/fd/{}", named.as_raw_fd()))?;
        // SAFETY: the call takes no argument and touches no memory of ours.
        let kind = unsafe { kind_of_namespace(file.as_raw_fd()) }.map_err(io::Error::from)?;
        if kind != CloneFlags::CLONE_NEWNET.bits() {
            return Err(NamespaceError::Other);
        }
        let namespace = Self::from(file);
        if namespace.is_the_hosts()? {
            return Err(NamespaceError::Host);
        }
        Ok(namespace)
    }

    /// A new one, in which nothing is but the loopback interface. It goes with the last that has it open or lives in it.
    ///
    /// # Errors
    /// The system call's.
    pub fn new() -> io::Result<Self> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let file = File::open("/proc/thread-self/ns/net")?;
            // For what connects to the pod's loopback addresses from the host.
            let up = link::set_flags(LOOPBACK, libc::IFF_UP, libc::IFF_UP);
            Socket::open()?.request(&up).map_err(|refused| refused.error)?;
            Ok(Self::from(file))
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".into()).stack_size(STACK).spawn_scoped(scope, make)?;
            thread.join().map_err(panicked)?
        })
    }

    /// What tells it from others.
    ///
    /// # Errors
    /// The system call's.
    pub fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&self.file.metadata()?))
    }

    /// Whether it is the host's own.
    ///
    /// # Errors
    /// The system call's.
    pub fn is_the_hosts(&self) -> io::Result<bool> {
        let identity = self.identity()?;
        // The shim's is containerd's; of the two the host's may be the other one.
        let hosts = ["/proc/self/ns/net", "/proc/1/ns/net"].map(std::fs::metadata);
        Ok(hosts.into_iter().flatten().any(|host| Identity::of(&host) == identity))
    }

    /// Runs `work` on a thread of its own in the namespace and waits for it. What it opens (sockets, /dev/net/tun) stays there.
    ///
    /// # Errors
    /// If the thread cannot be started or cannot enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let entered = move || setns(&*self.file, CloneFlags::CLONE_NEWNET).map(|()| work());
            let thread = thread::Builder::new().name("netns".into()).stack_size(STACK).spawn_scoped(scope, entered)?;
            thread.join().map_err(panicked)?.map_err(io::Error::from)
        })
    }

    /// A thread that lives in the namespace and does nothing, for a task that needs a pid there.
    ///
    /// # Errors
    /// If the thread cannot be started or cannot enter.
    pub fn task_thread(&self) -> io::Result<TaskThread> {
        let (end, ended) = mpsc::channel::<()>();
        let (entered, answer) = mpsc::sync_channel(1);
        let namespace = self.clone();
        let work = move || {
            let pid = setns(&*namespace.file, CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw().cast_unsigned());
            drop(namespace);
            // The other ends wait for the one and are dropped for the other.
            let _ = entered.send(pid);
            let _ = ended.recv();
        };
        thread::Builder::new().name("task".into()).stack_size(WAITING_STACK).spawn(work)?;
        let pid = answer.recv().map_err(io::Error::other)??;
        Ok(TaskThread { pid, _end: end })
    }
}

impl Identity {
    fn of(file: &std::fs::Metadata) -> Self {
        Self { device: file.dev(), inode: file.ino() }
    }
}

fn panicked<T>(_: T) -> io::Error {
    io::Error::other("the thread in the network namespace failed")
}

/// A task's pid on the host: the number of a thread in the pod's network namespace, so that what configures /proc/PID/ns/net
/// configures the pod. The thread ends when this is dropped.
#[derive(Debug)]
pub struct TaskThread {
    pid: u32,
    _end: mpsc::Sender<()>,
}

impl TaskThread {
    /// The thread's number.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Instant};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::{super::lab::LIMIT, *};

    fn inode(path: &str) -> Option<u64> {
        fs::metadata(path).ok().map(|file| file.ino())
    }

    #[test]
    fn a_new_one_has_its_loopback_interface_up_and_is_found_again_by_its_path() {
        let namespace = Namespace::new().unwrap();
        let links = namespace.run(|| caisson_netlink::state::links(&mut Socket::open().unwrap()).unwrap()).unwrap();
        assert!(links.iter().all(|link| link.is_loopback() == link.is_up()), "{links:?}");
        let path = format!("/proc/self/fd/{}", namespace.file.as_raw_fd());
        let again = Namespace::open(Path::new(&path)).unwrap();
        assert_eq!(again.identity().unwrap(), namespace.identity().unwrap());
        assert_ne!(Namespace::new().unwrap().identity().unwrap(), namespace.identity().unwrap());
    }

    #[test]
    fn what_is_no_network_namespace_or_the_hosts_is_refused_and_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let link = directory.path().join("link");
        symlink("/proc/self/ns/net", &link).unwrap();
        let missing = directory.path().join("missing");
        let cases = [
            (fifo.as_path(), "is no network namespace"),
            (Path::new("/dev/null"), "is no network namespace"),
            (Path::new("/proc/self/ns/ipc"), "is no network namespace"),
            (missing.as_path(), "cannot be opened: No such file or directory"),
            (Path::new("/proc/self/ns/net"), "is the host's network namespace"),
            (link.as_path(), "is the host's network namespace"),
        ];
        for (path, words) in cases {
            let message = Namespace::open(path).unwrap_err().to_string();
            assert!(message.starts_with(words), "{path:?}: {message}");
        }
    }

    #[test]
    fn a_tasks_thread_lives_in_the_namespace_until_it_is_dropped() {
        let namespace = Namespace::new().unwrap();
        let Identity { inode: expected, .. } = namespace.identity().unwrap();
        let thread = namespace.task_thread().unwrap();
        let path = format!("/proc/{}/ns/net", thread.pid());
        assert_eq!(inode(&path), Some(expected));
        assert_ne!(inode("/proc/self/ns/net"), Some(expected));
        // Alone it keeps the namespace.
        drop(namespace);
        assert_eq!(Namespace::open(Path::new(&path)).unwrap().identity().unwrap().inode, expected);
        drop(thread);
        let begin = Instant::now();
        while inode(&path) == Some(expected) {
            assert!(begin.elapsed() < LIMIT, "waited {LIMIT:?} for the thread's end");
            thread::yield_now();
        }
    }
}

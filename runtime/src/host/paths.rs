//! Where a pod's sockets and directories lie, below the state directory:
//!
//! ```text
//! <state_dir>/s/<hash>.sock            what containerd connects to
//! <state_dir>/<namespace>/<id>/        0700, the pod's own
//!     vsock.sock                       what the monitor listens on for streams to the guest
//!     shared                           mount point (in the shim's mount namespace only) of the shared directory
//!     view                             the same directory as caisson-fsd sees it
//!     staging                          mount point (likewise) where a mount gets nosuid, nodev and noexec before it is visible
//!     processes                        who belongs to the pod, for the clean-up after a crash
//!     cgroup                           the pod's cgroup, for the same
//!     network                          the pod's network namespace, if it is not the pod's own, for the same
//!     bundle, socket                   links to containerd's bundle and to the pod's socket, for [`crate::shim::orphans`]
//! ```
//!
//! Names below are fixed, so that clean-up removes exactly these and never walks a tree in which something of
//! somebody else may be mounted.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// The places of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPaths {
    state_dir: PathBuf,
    pod: PathBuf,
}

impl PodPaths {
    /// `namespace` and `id` are identifiers ([`crate::shim::flags::is_identifier`]).
    pub fn new(state_dir: &Path, namespace: &str, id: &str) -> Self {
        Self { state_dir: state_dir.to_owned(), pod: state_dir.join(namespace).join(id) }
    }

    /// The pod's directory.
    pub fn pod(&self) -> &Path {
        &self.pod
    }

    /// The directory of the sockets that containerd connects to.
    pub fn sockets(&self) -> PathBuf {
        self.state_dir.join("s")
    }

    /// See the module's picture.
    pub fn vsock(&self) -> PathBuf {
        self.pod.join("vsock.sock")
    }

    /// See the module's picture.
    pub fn shared(&self) -> PathBuf {
        self.pod.join("shared")
    }

    /// See the module's picture.
    pub fn view(&self) -> PathBuf {
        self.pod.join("view")
    }

    /// See the module's picture.
    pub fn staging(&self) -> PathBuf {
        self.pod.join("staging")
    }

    /// See the module's picture.
    pub fn processes(&self) -> PathBuf {
        self.pod.join("processes")
    }

    /// See the module's picture.
    pub fn cgroup(&self) -> PathBuf {
        self.pod.join("cgroup")
    }

    /// See the module's picture.
    pub fn network(&self) -> PathBuf {
        self.pod.join("network")
    }

    /// See the module's picture.
    pub fn bundle_link(&self) -> PathBuf {
        self.pod.join("bundle")
    }

    /// See the module's picture.
    pub fn socket_link(&self) -> PathBuf {
        self.pod.join("socket")
    }

    /// The socket for the pod `id` of the containerd at `address`: the name is a hash because a socket's path has
    /// room for 107 bytes only (sockaddr_un in linux/un.h).
    pub fn socket(&self, address: &str, namespace: &str, id: &str) -> PathBuf {
        let digest = Sha256::digest(format!("{address}\0{namespace}\0{id}"));
        let name: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        self.sockets().join(name + ".sock")
    }

    /// The pods that have a directory in `state_dir`.
    pub fn all(state_dir: &Path) -> impl Iterator<Item = Self> {
        let pods = directories(state_dir).flat_map(|namespace| directories(&namespace));
        pods.map(|pod| Self { state_dir: state_dir.to_owned(), pod })
    }

    /// The other pods of the state directory.
    pub fn others(&self) -> impl Iterator<Item = Self> {
        Self::all(&self.state_dir).filter(|other| other.pod != self.pod)
    }

    /// Makes the pod's directories, for the bundle and the socket that are its own. What an earlier pod of this name left
    /// behind is removed first.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(&self, bundle: &Path, socket: &Path) -> io::Result<()> {
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        let namespace = self.pod.parent().unwrap_or(&self.state_dir);
        let mut tries = 0;
        while let Err(error) = private.create(&self.pod) {
            tries += 1;
            match error.kind() {
                _ if tries > 100 => return Err(error),
                // The last pod of the namespace that is just ending may take the namespace's directory away in between.
                io::ErrorKind::NotFound => fs::DirBuilder::new().recursive(true).mode(0o711).create(namespace)?,
                io::ErrorKind::AlreadyExists => {
                    let _lock = self.lock()?;
                    self.remove()?;
                }
                _ => return Err(error),
            }
        }
        symlink(bundle, self.bundle_link())?;
        symlink(socket, self.socket_link())?;
        private.create(self.shared())?;
        private.create(self.view())?;
        private.create(self.staging())
    }

    /// Waits until nobody else removes what a dead pod left, and keeps others from it. None if there is nothing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn lock(&self) -> io::Result<Option<File>> {
        let directory = match File::open(&self.pod) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        directory.lock()?;
        Ok(Some(directory))
    }

    /// Removes the pod's directories and the namespace's, if it was the last pod there. What is already gone is fine.
    ///
    /// # Errors
    /// What the file system says, EBUSY if something is still mounted.
    pub fn remove(&self) -> io::Result<()> {
        for directory in [self.shared(), self.view(), self.staging()] {
            allow_missing(fs::remove_dir(directory))?;
        }
        // By its bundle's link a dead pod is found: the last of it that goes.
        let files =
            [self.vsock(), self.processes(), self.cgroup(), self.network(), self.socket_link(), self.bundle_link()];
        for file in files {
            allow_missing(fs::remove_file(file))?;
        }
        allow_missing(fs::remove_dir(&self.pod))?;
        if let Some(namespace) = self.pod.parent() {
            // Fails while other pods are there.
            let _ = fs::remove_dir(namespace);
        }
        Ok(())
    }
}

/// The directories in a directory; none if it cannot be read.
fn directories(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Takes "it is not there" for success.
///
/// # Errors
/// Every other error of `result`.
pub fn allow_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_and_go_and_a_stale_pod_is_replaced() {
        let state = tempfile::tempdir().unwrap();
        let pod = PodPaths::new(state.path(), "ns", "one");
        let create = || pod.create(Path::new("/bundle"), Path::new("/socket"));
        create().unwrap();
        fs::write(pod.processes(), "").unwrap();
        fs::write(pod.cgroup(), "").unwrap();
        fs::write(pod.network(), "").unwrap();
        fs::write(pod.vsock(), "").unwrap();
        create().unwrap();
        assert_eq!(PodPaths::all(state.path()).collect::<Vec<_>>(), std::slice::from_ref(&pod));
        assert_eq!(fs::read_link(pod.bundle_link()).unwrap(), Path::new("/bundle"));
        assert!(pod.shared().is_dir() && !pod.vsock().exists());
        pod.remove().unwrap();
        pod.remove().unwrap();
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
    }

    #[test]
    fn clean_up_never_removes_what_it_did_not_make() {
        let state = tempfile::tempdir().unwrap();
        let pod = PodPaths::new(state.path(), "ns", "one");
        pod.create(Path::new("/bundle"), Path::new("/socket")).unwrap();
        fs::write(pod.shared().join("somebody's"), "").unwrap();
        assert!(pod.remove().is_err());
        assert!(pod.shared().join("somebody's").exists());
    }

    #[test]
    fn socket_names_differ_and_fit() {
        let pod = PodPaths::new(Path::new("/run/caisson"), "ns", "one");
        let one = pod.socket("/run/containerd/containerd.sock", "ns", "one");
        assert_ne!(one, pod.socket("/run/containerd/containerd.sock", "ns", "two"));
        assert_ne!(one, pod.socket("/run/other.sock", "ns", "one"));
        assert!(one.as_os_str().len() < 108);
    }
}

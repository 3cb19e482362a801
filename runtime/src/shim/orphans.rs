//! Pods that nobody will delete. containerd runs `delete` for every shim that it has ever connected to. A shim that is killed
//! between its `start` and that connection, though, containerd (1.6 at least) forgets: it removes the bundle and leaves
//! it at that. What such a pod leaves on the host (its cgroup, its directory, its socket) goes with the next pod for which
//! `delete` runs.
//!
//! ```text
//!   its bundle is there            containerd knows it        leave it alone
//!   somebody listens on its socket its shim lives             likewise
//!   neither                        an orphan
//! ```

use std::{
    fs::{self, File},
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use crate::host::paths::PodPaths;

/// A pod that nobody will delete, kept from a pod of the same name that may begin meanwhile.
#[derive(Debug)]
pub struct Orphan {
    /// Its places.
    pub paths: PodPaths,
    /// What its shim listened on.
    pub socket: PathBuf,
    _lock: File,
}

/// The orphans in a state directory, each found as the iterator comes to it.
pub fn find(state_dir: &Path) -> impl Iterator<Item = Orphan> {
    PodPaths::all(state_dir).filter_map(orphan)
}

fn orphan(paths: PodPaths) -> Option<Orphan> {
    abandoned(&paths)?;
    let lock = paths.lock().ok()??;
    // While this waited for the lock, another may have removed it, or a pod of its name may have come.
    let socket = abandoned(&paths)?;
    Some(Orphan { paths, socket, _lock: lock })
}

/// The socket of a pod whose bundle is gone and on whose socket nobody listens.
fn abandoned(paths: &PodPaths) -> Option<PathBuf> {
    let bundle = fs::read_link(paths.bundle_link()).ok()?;
    let is_gone = fs::symlink_metadata(bundle).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let socket = is_gone.then(|| fs::read_link(paths.socket_link()).ok())??;
    let refused = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
    UnixStream::connect(&socket).is_err_and(|error| refused.contains(&error.kind())).then_some(socket)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, slice};

    use super::*;

    #[test]
    fn only_a_pod_without_bundle_and_shim_is_one() {
        let state = tempfile::tempdir().unwrap();
        let bundle = tempfile::tempdir().unwrap();
        let place = |id| (PodPaths::new(state.path(), "s", id), state.path().join(format!("s/{id}.sock")));
        let gone = Path::new("/no/such/bundle");
        let names = || find(state.path()).map(|orphan| orphan.paths).collect::<Vec<_>>();

        let (known, socket) = place("known");
        known.create(bundle.path(), &socket).unwrap();
        let (living, socket) = place("living");
        living.create(gone, &socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        // One that is just being made, or removed.
        fs::create_dir(state.path().join("s/half")).unwrap();
        assert_eq!(names(), []);

        let (dead, socket) = place("dead");
        dead.create(gone, &socket).unwrap();
        assert_eq!(names(), slice::from_ref(&dead), "its socket is gone");
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(names(), slice::from_ref(&dead), "nobody listens");
        drop(listener);
        assert_eq!(names().len(), 2);
        drop(bundle);
        assert_eq!(names().len(), 3);
        assert_eq!(find(Path::new("/no/such/state")).count(), 0);
    }

    #[test]
    fn a_pod_of_the_same_name_waits_until_the_orphan_is_gone() {
        let state = tempfile::tempdir().unwrap();
        let paths = PodPaths::new(state.path(), "ns", "one");
        paths.create(Path::new("/no/such/bundle"), Path::new("/no/such/socket")).unwrap();
        let orphan = find(state.path()).next().unwrap();
        std::thread::scope(|scope| {
            let successor = scope.spawn(|| paths.create(Path::new("/"), Path::new("/no/such/socket")).unwrap());
            orphan.paths.remove().unwrap();
            drop(orphan);
            successor.join().unwrap();
        });
        assert_eq!(fs::read_link(paths.bundle_link()).unwrap(), Path::new("/"));
        assert_eq!(find(state.path()).count(), 0);
    }
}

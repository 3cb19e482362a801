//! The pod's shared directory in the guest, mounted when it is first needed: the file server may start after the guest.
//!
//! It is there by two virtio-fs devices. What only the guest changes (root file systems) is reached by the first, with
//! the kernel's caches. What the host's processes change as well (bind mounts) is reached by the second, which is
//! mounted in a directory of the first: the kernel then asks before it believes what it remembers. A pod without bind
//! mounts has no second device.

use std::{
    ffi::CStr,
    io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use caisson_protos::guest::{HOST_SHARE_DIRECTORY, HOST_SHARE_TAG, SHARE_TAG};
use rustix::mount::{MountFlags, mount};

use super::{Error, error::Result, lock};

/// The pod's shared directory, below which root file systems lie.
#[derive(Clone, Debug)]
pub enum Share {
    /// A directory that is simply there (tests).
    Directory(PathBuf),
    /// The virtio-fs mount at this path.
    VirtioFs(PathBuf),
}

/// The directory and what of it is mounted.
pub(super) struct Mounts {
    share: Share,
    mounted: Mutex<Mounted>,
}

#[derive(Clone, Copy, Default)]
struct Mounted {
    share: bool,
    host: bool,
}

impl Mounts {
    pub(super) fn new(share: Share) -> Self {
        Self { share, mounted: Mutex::default() }
    }

    /// The shared directory, mounted; with what is shared with the host's processes, if that is needed.
    pub(super) fn get(&self, with_host: bool) -> Result<PathBuf> {
        let path = match &self.share {
            Share::Directory(path) => return Ok(path.clone()),
            Share::VirtioFs(path) => path,
        };
        let mut mounted = lock(&self.mounted);
        if !mounted.share {
            // Returns before the file server answers: the kernel opens the FUSE session in the background.
            let made = std::fs::create_dir_all(path).and_then(|()| virtiofs(SHARE_TAG, path));
            made.map_err(failed(SHARE_TAG, path))?;
            mounted.share = true;
        }
        if with_host && !mounted.host {
            let place = path.join(HOST_SHARE_DIRECTORY);
            virtiofs(HOST_SHARE_TAG, &place).map_err(failed(HOST_SHARE_TAG, &place))?;
            mounted.host = true;
        }
        Ok(path.clone())
    }

    /// The roots of what is mounted.
    pub(super) fn roots(&self) -> Vec<PathBuf> {
        let path = match &self.share {
            Share::Directory(path) | Share::VirtioFs(path) => path,
        };
        let mounted = *lock(&self.mounted);
        let host = mounted.host.then(|| path.join(HOST_SHARE_DIRECTORY));
        [path.clone()].into_iter().chain(host).collect()
    }
}

fn virtiofs(tag: &str, path: &Path) -> io::Result<()> {
    Ok(mount(tag, path, "virtiofs", MountFlags::empty(), None::<&CStr>)?)
}

fn failed(tag: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("mount the shared directory {tag} on {}", path.display());
    move |error| Error::Io { what, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_there_already_and_has_one_root() {
        let mounts = Mounts::new(Share::Directory("/tmp".into()));
        assert_eq!(mounts.get(true).unwrap(), Path::new("/tmp"));
        assert_eq!(mounts.roots(), [Path::new("/tmp")]);
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("share");
        let message = Mounts::new(Share::VirtioFs(place.clone())).get(false).unwrap_err().to_string();
        assert!(message.contains("caisson") && message.contains(&place.display().to_string()), "{message}");
    }
}

//! A directory for one test, whose thread is in a mount namespace of its own: whatever the test mounts in it goes with it.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// See the module.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount(Some("scratch"), directory.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // With all that is mounted below it; the directory itself, then empty, goes next.
        umount2(self.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

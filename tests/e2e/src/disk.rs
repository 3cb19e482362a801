//! A small ext4 file system in a file, mounted through a loop device.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

/// Mounted until it is dropped.
pub struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Makes a file of `mib` MiB (sparse), an ext4 file system in it, and mounts it.
    pub fn mount(file: &Path, mib: usize, at: &Path) -> Self {
        let image = File::create(file).expect("the test's directory takes files");
        image.set_len(mib as u64 * 1024 * 1024).expect("tmpfs takes sparse files");
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-O", "^has_journal"]).arg(file));
        run(Command::new("mount").args(["-o", "loop"]).arg(file).arg(at));
        Self { at: at.to_owned() }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Detached: a failed test may have left something busy, and the loop device goes with the last user.
        let _ = rustix::mount::unmount(self.at.as_path(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

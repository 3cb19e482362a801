//! What every emulator has in common: what is to be emulated, the channels out of it, the kernel that it boots, and how its
//! processes are started.

use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// The program that emulates the nested host's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Emulator {
    /// An AMD processor with SVM.
    Qemu,
    /// An Intel processor with VMX.
    Bochs,
}

impl Emulator {
    /// The KVM module of its processor.
    pub fn kvm_module(self) -> &'static str {
        match self {
            Self::Qemu => "kvm_amd",
            Self::Bochs => "kvm_intel",
        }
    }

    /// How long any step before the command may take. Measured: 4 to 11 seconds for all of them together in QEMU; in Bochs
    /// half a minute, and a second for each 10 MB that come along.
    pub fn boot_limit(self) -> Duration {
        match self {
            Self::Qemu => Duration::from_secs(120),
            Self::Bochs => Duration::from_secs(400),
        }
    }
}

/// What the nested host looks like.
#[derive(Debug)]
pub struct Machine {
    /// What emulates it.
    pub emulator: Emulator,
    /// The processor, as the emulator names it; None: its default here.
    pub cpu: Option<String>,
    /// The clock counts instructions (QEMU; Bochs' clock always does).
    pub exact: bool,
    /// Memory, MiB.
    pub mem_mib: u32,
}

/// The channels out of the nested host.
pub struct Channels {
    /// [`crate::report::Report`] lines.
    pub report: UnixStream,
    /// The command's standard output.
    pub stdout: Box<dyn Read + Send>,
    /// The command's standard error.
    pub stderr: Box<dyn Read + Send>,
    /// The serial console.
    pub console: Box<dyn Read + Send>,
}

/// A process that ends with this value.
pub struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's newest installed cloud kernel: its image and its release.
pub fn kernel() -> anyhow::Result<(PathBuf, String)> {
    let mut releases: Vec<String> = std::fs::read_dir("/boot")
        .context("/boot")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
        .filter(|release| release.ends_with("-cloud-amd64"))
        .collect();
    releases.sort_by_key(|release| numbers(release));
    match releases.pop() {
        Some(release) => Ok((Path::new("/boot").join(format!("vmlinuz-{release}")), release)),
        None => bail!("no /boot/vmlinuz-*-cloud-amd64: install linux-image-cloud-amd64"),
    }
}

/// The numbers in a release, to compare 6.1.0-9 and 6.1.0-10 rightly.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Spawns with these descriptors kept open, and with the wish to end when we end.
pub fn spawn(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> anyhow::Result<Owned> {
    let numbers: Vec<i32> = inherited.iter().map(|fd| fd.as_raw_fd()).collect();
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(std::io::Error::other("the parent is gone"));
        }
        for &number in &numbers {
            // SAFETY: the descriptors are open: `inherited` borrows them until the child has been spawned.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes plain system calls only; it allocates in the error case alone,
    // and this process has no other thread yet that could hold the allocator.
    let command = unsafe { command.pre_exec(prepare) };
    Ok(Owned(command.spawn()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert!(numbers("6.1.0-10-cloud-amd64") > numbers("6.1.0-9-cloud-amd64"));
        assert!(numbers("6.12.1-1-cloud-amd64") > numbers("6.1.0-56-cloud-amd64"));
    }
}

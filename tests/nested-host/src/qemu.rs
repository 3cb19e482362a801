//! The processes that make a nested host: one QEMU, and one virtiofsd for each shared folder.
//!
//! Everything they need comes as an inherited descriptor (sockets, the initramfs in a memory file), so nothing has to
//! be cleaned up after them; and the kernel ends them when this process ends, however that happens.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

use crate::mended::Mended;

/// What the nested host looks like.
#[derive(Debug)]
pub struct Machine {
    /// The clock counts instructions.
    pub exact: bool,
    /// Memory, MiB.
    pub mem_mib: u32,
}

/// The channels out of the nested host, in the order of their virtio-serial ports.
pub struct Channels {
    /// [`crate::report::Report`] lines.
    pub report: UnixStream,
    /// The command's standard output.
    pub stdout: UnixStream,
    /// The command's standard error.
    pub stderr: UnixStream,
    /// The serial console.
    pub console: UnixStream,
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

/// Starts a virtiofsd for `folder`; the second value is QEMU's end of the connection.
pub fn share(folder: &Path) -> anyhow::Result<(Owned, UnixStream)> {
    let c_version = Path::new("/usr/lib/qemu/virtiofsd");
    let rust_version = Path::new("/usr/libexec/virtiofsd");
    // The socket has a name only until QEMU's end is connected.
    let place = tempfile::tempdir().context("a folder for a socket")?;
    let path = place.path().join("fs");
    let listener = UnixListener::bind(&path).context("a socket for virtiofsd")?;
    let qemu_end = UnixStream::connect(&path).context("a socket for virtiofsd")?;
    let mut command;
    if c_version.exists() {
        command = Command::new(c_version);
        command.arg("-o").arg(format!("source={}", folder.display()));
        command.args(["-o", "cache=always", "-o", "sandbox=chroot", "-o", "xattr", "-o", "log_level=err"]);
        command.arg(format!("--fd={}", listener.as_raw_fd()));
    } else if rust_version.exists() {
        command = Command::new(rust_version);
        command.arg("--shared-dir").arg(folder).args(["--cache", "always", "--sandbox", "chroot", "--xattr"]);
        command.args(["--log-level", "error", "--fd"]).arg(listener.as_raw_fd().to_string());
    } else {
        bail!("no virtiofsd: install qemu-system-common (Debian 12) or virtiofsd (13)");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = spawn(&mut command, &[listener.as_fd()]).context("starting virtiofsd")?;
    Ok((child, qemu_end))
}

/// Starts QEMU with the kernel, an initramfs and the shares (their tags are `root`, `rw0`, `rw1`, …).
pub fn start(
    machine: &Machine,
    kernel: &Path,
    initrd: &File,
    shares: &[(String, UnixStream)],
) -> anyhow::Result<(Owned, Channels)> {
    let (report, report_in) = UnixStream::pair()?;
    let (stdout, stdout_in) = UnixStream::pair()?;
    let (stderr, stderr_in) = UnixStream::pair()?;
    let (console, console_in) = UnixStream::pair()?;

    let qemu = Mended::find()?;
    let mut command = qemu.command();
    let mut append = "console=ttyS0 panic=-1 quiet mitigations=off".to_owned();
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-M", "q35,memory-backend=mem", "-cpu", "max,+svm,-la57"]);
    command.arg("-object").arg(format!("memory-backend-memfd,id=mem,size={}M,share=on", machine.mem_mib));
    command.arg("-m").arg(machine.mem_mib.to_string());
    command.args(["-accel", "tcg,thread=single,tb-size=512"]);
    if machine.exact {
        command.args(["-icount", "shift=0,sleep=off"]);
        // Whatever else differs from run to run: addresses, random numbers, the date.
        command.args(["-seed", "1", "-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
        append += " nokaslr norandmaps";
    } else {
        // A timer that fires again and again: QEMU's SVM loses an interrupt now and then, and a timer that is set for one
        // event would be silent for ever (docs/decisions/0006-emulated-hosts.md).
        append += " nohz=off highres=off";
    }
    command.arg("-kernel").arg(kernel).arg("-append").arg(append);
    command.arg("-initrd").arg(format!("/proc/self/fd/{}", initrd.as_raw_fd()));
    command.arg("-chardev").arg(format!("socket,id=console,fd={}", console_in.as_raw_fd()));
    command.args(["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
    for (name, end) in [("report", &report_in), ("stdout", &stdout_in), ("stderr", &stderr_in)] {
        command.arg("-chardev").arg(format!("socket,id={name},fd={}", end.as_raw_fd()));
        command.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
    }
    let mut inherited =
        vec![initrd.as_fd(), report_in.as_fd(), stdout_in.as_fd(), stderr_in.as_fd(), console_in.as_fd()];
    for (tag, end) in shares {
        command.arg("-chardev").arg(format!("socket,id={tag},fd={}", end.as_raw_fd()));
        command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"));
        inherited.push(end.as_fd());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = spawn(&mut command, &inherited).context("starting qemu-system-x86_64 (package qemu-system-x86)")?;
    Ok((child, Channels { report, stdout, stderr, console }))
}

/// Spawns with these descriptors kept open, and with the wish to end when we end.
fn spawn(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> anyhow::Result<Owned> {
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

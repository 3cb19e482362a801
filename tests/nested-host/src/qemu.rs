//! The processes that make a nested host: one QEMU, and one virtiofsd for each shared folder.
//!
//! Everything they need comes as an inherited descriptor (sockets, the initramfs in a memory file), so nothing has to
//! be cleaned up after them; and the kernel ends them when this process ends, however that happens.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::machine::{Channels, Machine, Owned, spawn};
use crate::mended::Mended;

/// Everything that QEMU can emulate, but for the fifth level of page tables.
const CPU: &str = "max,+svm,-la57";

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
    command.args(["-M", "q35,memory-backend=mem", "-cpu", machine.cpu.as_deref().unwrap_or(CPU)]);
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
    let [stdout, stderr, console] = [stdout, stderr, console].map(|stream| Box::new(stream) as _);
    Ok((child, Channels { report, stdout, stderr, console }))
}

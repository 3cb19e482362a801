//! The nested host's initramfs: this binary as `/init`, the job, kernel modules, and the root itself when it lies in RAM.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use cpio::newc::{Builder, trailer};

use crate::job::{self, Job};
use crate::machine::Emulator;
use crate::modules::Modules;

/// Where modules and the root in RAM lie in the initramfs.
pub const MODULES: &str = "/mod";
/// See [`MODULES`].
pub const PAYLOAD: &str = "/payload";

/// Loaded in this order, before anything else: the bus and the channel to the outer process, then the root.
const VIRTIO: &[&str] = &["virtio_pci", "virtio_console", "virtiofs"];
/// What makes it a host for virtual machines and containers, beside the processor's KVM module.
const HOST: &[&str] = &[
    "overlay",
    "vhost_net",
    "vhost_vsock",
    "tun",
    "veth",
    "bridge",
    "sch_ingress",
    "cls_matchall",
    "act_mirred",
    "loop",
    "fuse",
    "quota_v2",
];

const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFLNK: u32 = 0o120000;
const S_IFCHR: u32 = 0o020000;

/// Writes the archive. `payload` are paths of this machine: files, symbolic links and folders (without their content).
pub fn write(out: &mut impl Write, release: &str, job: &Job, payload: &[PathBuf]) -> anyhow::Result<()> {
    let mut archive = Archive { out, inode: 1 };
    for folder in ["dev", "proc", "sys", "ro", "rw", "new", "mod", "payload"] {
        archive.entry(folder, S_IFDIR | 0o755, &[])?;
    }
    archive.console()?;
    archive.entry("init", S_IFREG | 0o755, &own_binary()?)?;
    archive.entry(job::PATH.trim_start_matches('/'), S_IFREG | 0o644, &serde_json::to_vec(job)?)?;

    let modules = Modules::of(release)?;
    let first = match job.emulator {
        Emulator::Qemu => VIRTIO,
        Emulator::Bochs => &[],
    };
    for (order, file) in modules.files(&[first, &[job.emulator.kvm_module()], HOST].concat())?.iter().enumerate() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let content = fs::read(file).with_context(|| format!("module {}", file.display()))?;
        archive.entry(&format!("mod/{order:03}-{name}"), S_IFREG | 0o644, &content)?;
    }
    for path in payload {
        archive.copy(path).with_context(|| format!("{}", path.display()))?;
    }
    trailer(archive.out)?;
    Ok(())
}

fn own_binary() -> anyhow::Result<Vec<u8>> {
    if !cfg!(target_feature = "crt-static") {
        bail!("this nested-host is not static and cannot be an init: build it with --target x86_64-unknown-linux-musl");
    }
    fs::read("/proc/self/exe").context("/proc/self/exe")
}

struct Archive<'a, W: Write> {
    out: &'a mut W,
    inode: u32,
}

impl<W: Write> Archive<'_, W> {
    fn header(&mut self, name: &str, mode: u32) -> Builder {
        self.inode += 1;
        Builder::new(name).ino(self.inode).nlink(1).mode(mode)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        let size = u32::try_from(content.len()).with_context(|| format!("{name}: too big for an initramfs"))?;
        let mut writer = self.header(name, mode).write(&mut *self.out, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    /// The kernel opens `/dev/console` for init before init can mount anything.
    fn console(&mut self) -> io::Result<()> {
        let node = self.header("dev/console", S_IFCHR | 0o600).rdev_major(5).rdev_minor(1);
        node.write(&mut *self.out, 0).finish().map(drop)
    }

    fn copy(&mut self, path: &Path) -> anyhow::Result<()> {
        let name = format!("{}{}", PAYLOAD.trim_start_matches('/'), path.to_str().context("not UTF-8")?);
        let meta = fs::symlink_metadata(path)?;
        let permissions = meta.permissions().mode() & 0o7777;
        if meta.is_symlink() {
            self.entry(&name, S_IFLNK | 0o777, fs::read_link(path)?.as_os_str().as_bytes())
        } else if meta.is_dir() {
            self.entry(&name, S_IFDIR | permissions, &[])
        } else if meta.is_file() {
            self.entry(&name, S_IFREG | permissions, &fs::read(path)?)
        } else {
            bail!("neither file, folder nor link (mode {:o})", meta.mode());
        }
    }
}

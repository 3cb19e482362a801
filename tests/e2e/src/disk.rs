//! A small ext4 file system in a file, mounted through a loop device.

use std::{
    fs::File,
    os::fd::AsRawFd,
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
        Self::with(file, mib, at, &["-O", "^has_journal"], "loop")
    }

    /// Likewise, with quotas for projects.
    pub fn with_quotas(file: &Path, mib: usize, at: &Path) -> Self {
        Self::with(file, mib, at, &["-O", "^has_journal,quota,project", "-E", "quotatype=prjquota"], "loop,prjquota")
    }

    fn with(file: &Path, mib: usize, at: &Path, features: &[&str], options: &str) -> Self {
        let image = File::create(file).expect("the test's directory takes files");
        image.set_len(mib as u64 * 1024 * 1024).expect("tmpfs takes sparse files");
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).args(features).arg(file));
        run(Command::new("mount").args(["-o", options]).arg(file).arg(at));
        Self { at: at.to_owned() }
    }

    /// Gives the directory and all that will be made in it to a project that may take `mib` MiB.
    pub fn limit(&self, directory: &Path, mib: u64) {
        const PROJECT: u32 = 7;
        // _IOR('X', 31, struct fsxattr) and _IOW('X', 32, struct fsxattr) of linux/fs.h, whose words are flags, extent size,
        // count of extents, project, extent size of copies, and two unused.
        const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
        const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;
        const FS_XFLAG_PROJINHERIT: u32 = 0x200;
        let open = File::open(directory).expect("it is there");
        let mut attributes = [0_u32; 7];
        // SAFETY: the descriptor is open, and the kernel writes the 28 bytes of the structure.
        let got = unsafe { libc::ioctl(open.as_raw_fd(), FS_IOC_FSGETXATTR as _, attributes.as_mut_ptr()) };
        expect("FS_IOC_FSGETXATTR", got.into());
        attributes[0] |= FS_XFLAG_PROJINHERIT;
        attributes[3] = PROJECT;
        // SAFETY: the descriptor is open, and the kernel reads the 28 bytes of the structure.
        let set = unsafe { libc::ioctl(open.as_raw_fd(), FS_IOC_FSSETXATTR as _, attributes.as_ptr()) };
        expect("FS_IOC_FSSETXATTR", set.into());
        // QCMD(Q_SETQUOTA, PRJQUOTA) of linux/quota.h.
        const SET_PROJECT_QUOTA: u32 = (0x80_0008 << 8) | 2;
        // SAFETY: all zero is a quota without limits.
        let mut quota: libc::dqblk = unsafe { std::mem::zeroed() };
        quota.dqb_bhardlimit = mib * 1024;
        quota.dqb_valid = libc::QIF_BLIMITS;
        let descriptor = open.as_raw_fd();
        // SAFETY: the descriptor is open, and the kernel reads a dqblk.
        let set =
            unsafe { libc::syscall(libc::SYS_quotactl_fd, descriptor, SET_PROJECT_QUOTA, PROJECT, &raw const quota) };
        expect("quotactl_fd", set);
    }
}

fn expect(what: &str, answer: libc::c_long) {
    assert_eq!(answer, 0, "{what}: {}", std::io::Error::last_os_error());
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

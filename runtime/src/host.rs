//! What a host must have to run pods, each as a check that says what is wrong and what to do about it. The shim makes the
//! quick ones before it starts a machine; `caisson check` makes them all.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{FromRawFd, IntoRawFd},
    path::{Path, PathBuf},
};

use caisson_protos::kvm::{API_VERSION, missing};
use kvm_ioctls::Kvm;

const KVM: &str = "/dev/kvm";

/// A check that failed: what it looked at, what it found, what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is none.
    #[error(
        "{KVM} does not exist: this machine has no hardware virtualisation, or it is off, or the module is missing: \
        enable VT-x or AMD-V in the firmware (in a cloud, choose an instance with nested virtualisation), then modprobe kvm_intel or kvm_amd"
    )]
    NoKvm,
    /// It is not ours to open.
    #[error("{KVM} may not be opened ({0}): run as root, or allow the device to this process's user and cgroup")]
    KvmPermission(io::Error),
    /// It does not open.
    #[error("{KVM} cannot be opened: {0}: is another hypervisor using the processor's virtualisation?")]
    KvmOpen(io::Error),
    /// It is something else.
    #[error("{KVM} answers with API version {found}, expected {API_VERSION}: it is not Linux KVM")]
    KvmVersion {
        /// What it says.
        found: i32,
    },
    /// It lacks something.
    #[error("{KVM} lacks {0}: a newer host kernel is needed (5.12 or later)")]
    KvmCapability(&'static str),
    /// A file of ours.
    #[error("cannot read the {what} {path}: {source}: install it (make install) or name it in {config}", config = crate::config::DEFAULT_PATH)]
    Unreadable {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a kernel that the monitor boots.
    #[error("the kernel {0} is no x86-64 ELF file: an uncompressed vmlinux is needed, not a bzImage")]
    NotElf(PathBuf),
    /// Nothing in it.
    #[error("the {what} {path} is empty")]
    Empty {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// Cut off.
    #[error("the kernel {path} is truncated: {size} bytes, its program headers reach to {needed}")]
    Truncated {
        /// Its path.
        path: PathBuf,
        /// What there is.
        size: u64,
        /// What there should be.
        needed: u64,
    },
}

/// Opens KVM and asks for all that the monitor uses.
///
/// # Errors
/// The first check that failed.
pub fn check_kvm() -> Result<(), HostError> {
    let file = File::options().read(true).write(true).open(KVM).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => HostError::NoKvm,
        io::ErrorKind::PermissionDenied => HostError::KvmPermission(error),
        _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => HostError::NoKvm,
        _ => HostError::KvmOpen(error),
    })?;
    // SAFETY: the descriptor was just opened and is given away whole.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(HostError::KvmVersion { found });
    }
    match missing(|number| kvm.check_extension_raw(number.into())) {
        Some(name) => Err(HostError::KvmCapability(name)),
        None => Ok(()),
    }
}

/// Opens the kernel and looks whether it is one and whole.
///
/// # Errors
/// [`HostError::Unreadable`], [`HostError::NotElf`], [`HostError::Empty`] or [`HostError::Truncated`].
pub fn open_kernel(path: &Path) -> Result<File, HostError> {
    let mut file = open_file("kernel", path)?;
    let unreadable = |source| HostError::Unreadable { what: "kernel", path: path.to_owned(), source };
    let size = file.metadata().map_err(unreadable)?.len();
    let mut head = Vec::new();
    // The program headers follow the ELF header in every kernel the linker makes.
    Read::by_ref(&mut file).take(4096).read_to_end(&mut head).map_err(unreadable)?;
    let needed = elf_extent(&head).ok_or_else(|| HostError::NotElf(path.to_owned()))?;
    if size < needed { Err(HostError::Truncated { path: path.to_owned(), size, needed }) } else { Ok(file) }
}

/// Opens the initramfs.
///
/// # Errors
/// [`HostError::Unreadable`] or [`HostError::Empty`].
pub fn open_initramfs(path: &Path) -> Result<File, HostError> {
    open_file("initramfs", path)
}

fn open_file(what: &'static str, path: &Path) -> Result<File, HostError> {
    let unreadable = |source| HostError::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    if metadata.len() == 0 { Err(HostError::Empty { what, path: path.to_owned() }) } else { Ok(file) }
}

/// How far into its file an x86-64 ELF's loadable segments reach, by its first bytes; None if it is no such file.
fn elf_extent(head: &[u8]) -> Option<u64> {
    const PT_LOAD: u32 = 1;
    const EM_X86_64: u16 = 62;
    let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at.checked_add(8)?)?.try_into().ok()?));
    if !head.starts_with(b"\x7fELF\x02\x01") || u16_at(18)? != EM_X86_64 {
        return None;
    }
    let (headers, size, count) =
        (usize::try_from(u64_at(32)?).ok()?, usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let mut extent = 0;
    for index in 0..count {
        let header = headers.checked_add(index.checked_mul(size)?)?;
        if u32_at(header)? == PT_LOAD {
            let (offset, length) = (u64_at(header.checked_add(8)?)?, u64_at(header.checked_add(32)?)?);
            extent = extent.max(offset.checked_add(length)?);
        }
    }
    (extent > 0).then_some(extent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An ELF of one loadable segment at 0x1000 of the given length.
    fn elf(length: u64) -> Vec<u8> {
        let mut head = vec![0; 64 + 56];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        head[18] = 62;
        head[32] = 64;
        head[54] = 56;
        head[56] = 1;
        head[64] = 1;
        head[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
        head[96..104].copy_from_slice(&length.to_le_bytes());
        head
    }

    #[test]
    fn a_truncated_kernel_and_a_bzimage_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        let mut whole = elf(0x100);
        whole.resize(0x1100, 0);
        std::fs::write(&path, &whole).unwrap();
        open_kernel(&path).unwrap();
        std::fs::write(&path, &whole[..0x10ff]).unwrap();
        assert!(matches!(open_kernel(&path), Err(HostError::Truncated { size: 0x10ff, needed: 0x1100, .. })));
        std::fs::write(&path, b"MZ\0\0 bzImage").unwrap();
        assert!(matches!(open_kernel(&path), Err(HostError::NotElf(_))));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(open_kernel(&path), Err(HostError::Empty { .. })));
        assert!(matches!(open_initramfs(directory.path()), Err(HostError::Unreadable { .. })));
        let told = open_initramfs(Path::new("/no/initramfs")).unwrap_err().to_string();
        assert!(told.contains("initramfs /no/initramfs") && told.contains("make install"), "{told}");
    }

    proptest! {
        #[test]
        fn any_head_is_measured_or_refused(mut head in proptest::collection::vec(any::<u8>(), 0..300), graft: bool) {
            if graft {
                let start = elf(7);
                let end = head.len().min(40);
                head[..end].copy_from_slice(&start[..end]);
            }
            let _ = elf_extent(&head);
        }
    }
}

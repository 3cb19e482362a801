//! Where the things under test lie, and which runtime a test is about.

use std::{env, path::PathBuf};

/// A runtime that containerd can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The one under test.
    Caisson,
    /// The yardstick.
    Runc,
}

impl Runtime {
    /// containerd's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Caisson => "io.containerd.caisson.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }
}

fn directory(variable: &str, what: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => panic!("{variable} is not set: it names the directory of {what}; `make test` sets it"),
    }
}

/// The directory of our host programs.
pub fn bin_dir() -> PathBuf {
    directory("CAISSON_BIN_DIR", "containerd-shim-caisson-v2, caisson-vmm, caisson-fsd and caisson-e2e-probe")
}

/// The directory of vmlinux and initramfs.
pub fn image_dir() -> PathBuf {
    directory("CAISSON_IMAGE_DIR", "vmlinux and initramfs")
}

/// The directory of the OCI archives.
pub fn oci_dir() -> PathBuf {
    directory("CAISSON_OCI_DIR", "busybox.tar and debian.tar")
}

//! Whether this host's KVM has what the monitor uses. The shim looks before it starts a machine, so that the error names the remedy;
//! `caisson check` looks, too.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, IntoRawFd},
};

use caisson_protos::kvm::{API_VERSION, missing};
use kvm_ioctls::Kvm;

const KVM: &str = "/dev/kvm";

/// What /dev/kvm lacks, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device does not exist, or the module behind it is not loaded.
    #[error(
        "{KVM} does not exist: this machine has no hardware virtualisation, or it is off, or the module is missing: \
        enable VT-x or AMD-V in the firmware (in a cloud, choose an instance with nested virtualisation), then modprobe kvm_intel or kvm_amd"
    )]
    Missing,
    /// This process may not open it.
    #[error("{KVM} may not be opened ({0}): run as root, or allow the device to this process's user and cgroup")]
    Permission(io::Error),
    /// It cannot be opened for another reason.
    #[error("{KVM} cannot be opened: {0}: is another hypervisor using the processor's virtualisation?")]
    Open(io::Error),
    /// It speaks another version of the KVM API.
    #[error("{KVM} answers with API version {found}, expected {API_VERSION}: it is not Linux KVM")]
    Version {
        /// The version that it answers.
        found: i32,
    },
    /// A KVM extension that the monitor uses is missing.
    #[error("{KVM} lacks {0}: a newer host kernel is needed (5.12 or later)")]
    Capability(&'static str),
}

/// Opens KVM and asks for all that the monitor uses.
///
/// # Errors
/// The first check that failed.
pub fn check_kvm() -> Result<(), KvmError> {
    let file = File::options().read(true).write(true).open(KVM).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KvmError::Missing,
        io::ErrorKind::PermissionDenied => KvmError::Permission(error),
        _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => KvmError::Missing,
        _ => KvmError::Open(error),
    })?;
    // SAFETY: the descriptor was just opened and is given away whole.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(KvmError::Version { found });
    }
    match missing(|number| kvm.check_extension_raw(number.into())) {
        Some(name) => Err(KvmError::Capability(name)),
        None => Ok(()),
    }
}

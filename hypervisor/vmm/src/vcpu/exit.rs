//! What KVM says about an exit that ends the machine, as text for the log.

use std::fmt::Write;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_NOTIFY_CONTEXT_INVALID,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Names the exit.
pub fn describe_unexpected(exit: Result<VcpuExit, kvm_ioctls::Error>) -> String {
    match exit {
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            format!("the processor refused to enter the guest, hardware reason {reason:#x} on host CPU {cpu}")
        }
        Ok(VcpuExit::InternalError) => "KVM internal error".into(),
        Ok(VcpuExit::MemoryFault { gpa, size, .. }) => format!("no host memory for {size} bytes at {gpa:#x}"),
        Ok(other) => format!("unexpected exit {other:?}"),
        Err(error) => format!("KVM_RUN failed: {error}"),
    }
}

/// After KVM_EXIT_NOTIFY: whether the vCPU cannot go on.
pub fn context_is_lost(fd: &mut VcpuFd) -> bool {
    // SAFETY: the caller saw that exit, so this is the member in use; all bit patterns are numbers.
    let notify = unsafe { fd.get_kvm_run().__bindgen_anon_1.notify };
    notify.flags & KVM_NOTIFY_CONTEXT_INVALID != 0
}

/// The suberror and its data, if it was an internal error, and where the guest was.
pub fn details(fd: &mut VcpuFd) -> String {
    let mut text = String::new();
    let run = fd.get_kvm_run();
    if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
        // SAFETY: the exit reason says that this is the member in use; all bit patterns are numbers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let name = match internal.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "emulation failed",
            KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
            KVM_INTERNAL_ERROR_DELIVERY_EV => "event could not be delivered",
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected hardware exit",
            _ => "unknown",
        };
        // Writing to a String cannot fail.
        let _ = write!(text, ", suberror {} ({name}), data", internal.suberror);
        for word in internal.data.iter().take(internal.ndata as usize) {
            let _ = write!(text, " {word:#x}");
        }
    }
    if let Ok(regs) = fd.get_regs() {
        let _ = write!(text, ", at rip {:#x}", regs.rip);
    }
    text
}

//! The host's KVM: whether it can run our machines, and the empty machine itself.

use std::io;

use caisson_protos::kvm::missing;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_BUS_LOCK_EXIT,
    KVM_CAP_X86_NOTIFY_VMEXIT, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE,
    KVM_X86_NOTIFY_VMEXIT_ENABLED, KVM_X86_NOTIFY_VMEXIT_USER, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{
    layout::{KVM_TSS, VIRTIO_MMIO},
    virtio::{GuestMemory, mmio::RegisterPages},
};

/// KVM that cannot be used; each says which check failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device node.
    #[error("/dev/kvm does not exist: load the module kvm_intel or kvm_amd, and enable virtualization in the firmware")]
    Missing,
    /// No permission.
    #[error("no permission to open /dev/kvm: run as root or as a member of the group that owns it")]
    Permission,
    /// Anything else.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// Not the API of the last 15 years.
    #[error("/dev/kvm has API version {0}, expected {KVM_API_VERSION}")]
    Version(i32),
    /// The kernel is too old or built without it.
    #[error("/dev/kvm lacks {0}: use a newer or unrestricted host kernel")]
    Capability(&'static str),
    /// Too many vCPUs.
    #[error("/dev/kvm takes at most {have} vCPUs in a machine, {need} are configured")]
    Vcpus {
        /// KVM's limit.
        have: usize,
        /// Configured.
        need: u8,
    },
    /// A call failed.
    #[error("{what} failed: {source}")]
    Call {
        /// The ioctl.
        what: &'static str,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
    /// A descriptor for an interrupt or notification.
    #[error("{what} failed: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Names the call that failed.
pub(crate) fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { what, source }
}

/// Opens /dev/kvm and checks that it can do what we need.
///
/// # Errors
/// See [`KvmError`].
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    match missing(|number| kvm.check_extension_raw(number.into())) {
        Some(name) => Err(KvmError::Capability(name)),
        None => Ok(kvm),
    }
}

/// A machine with RAM and interrupt controllers and nothing else.
///
/// # Errors
/// See [`KvmError`].
pub fn create_machine(kvm: &Kvm, memory: &GuestMemory, vcpus: u8) -> Result<VmFd, KvmError> {
    let have = kvm.get_max_vcpus();
    if have < vcpus.into() {
        return Err(KvmError::Vcpus { have, need: vcpus });
    }
    let vm = loop {
        match kvm.create_vm() {
            // The kernel starts a thread of its own for the machine and may be interrupted at that.
            Err(error) if error.errno() == libc::EINTR => {}
            vm => break vm.map_err(call("KVM_CREATE_VM"))?,
        }
    };
    for (cap, flags) in restrictions(|cap| kvm.check_extension_raw(cap.into())) {
        let cap = kvm_enable_cap { cap, args: [flags, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&cap).map_err(call("KVM_ENABLE_CAP"))?;
    }
    vm.set_tss_address(KVM_TSS).map_err(call("KVM_SET_TSS_ADDR"))?;
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| KvmError::Io { what: "guest memory", source: io::Error::other(e) })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the host range is a mapping that lives as long as `memory`, which the machine keeps until the process
        // ends; it does not overlap another slot, since regions do not overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    // Interrupt controllers in the kernel, and no timer chip: a Linux that knows KVM takes its time from kvm-clock and
    // its ticks from the local APIC.
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    Ok(vm)
}

/// What a guest must not do, of what this host's KVM can forbid; `check` is KVM_CHECK_EXTENSION. To be enabled before
/// the first vCPU exists.
fn restrictions(check: impl Fn(u32) -> i32) -> Vec<(u32, u64)> {
    let has = |cap, flag: u32| u32::try_from(check(cap)).is_ok_and(|flags| flags & flag != 0);
    let mut enable = Vec::new();
    // No performance counters, also where no CPUID bit stands for them.
    if has(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE) {
        enable.push((KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE.into()));
    }
    // A guest that keeps the processor from taking interrupts comes out, and so can be paused; the window of 0 is what the processor
    // adds to its own threshold.
    if check(KVM_CAP_X86_NOTIFY_VMEXIT) > 0 {
        enable.push((KVM_CAP_X86_NOTIFY_VMEXIT, (KVM_X86_NOTIFY_VMEXIT_ENABLED | KVM_X86_NOTIFY_VMEXIT_USER).into()));
    }
    // One that locks the bus comes out, and is slowed down.
    if has(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT) {
        enable.push((KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT.into()));
    }
    enable
}

/// Maps the devices' register pages into the guest as read-only memory (KVM_MEM_READONLY): reads cause no exit, writes do. `slot` is the first free memory
/// slot. Does nothing where KVM knows no read-only memory: then reads cause exits, too.
///
/// # Errors
/// The call's.
pub fn map_registers(kvm: &Kvm, vm: &VmFd, slot: usize, pages: &RegisterPages) -> Result<(), KvmError> {
    if !kvm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    let region = kvm_userspace_memory_region {
        // There are at most two others.
        slot: slot as u32,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: VIRTIO_MMIO.0,
        memory_size: pages.region().size() as u64,
        userspace_addr: pages.region().as_ptr() as u64,
    };
    // SAFETY: the host range is a mapping that the devices keep as long as the machine exists; the guest only reads it;
    // it lies in the device gap, where there is no RAM.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}

/// What KVM can show a guest of this processor.
///
/// # Errors
/// The call's.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))
}

#[cfg(test)]
mod tests {
    use caisson_protos::kvm::{API_VERSION, NEEDED};

    use super::*;

    #[test]
    fn the_shared_numbers_are_the_kernels() {
        let numbers = [
            ("KVM_CAP_IRQCHIP", kvm_bindings::KVM_CAP_IRQCHIP),
            ("KVM_CAP_USER_MEMORY", kvm_bindings::KVM_CAP_USER_MEMORY),
            ("KVM_CAP_SET_TSS_ADDR", kvm_bindings::KVM_CAP_SET_TSS_ADDR),
            ("KVM_CAP_EXT_CPUID", kvm_bindings::KVM_CAP_EXT_CPUID),
            ("KVM_CAP_IRQFD", kvm_bindings::KVM_CAP_IRQFD),
            ("KVM_CAP_IOEVENTFD", kvm_bindings::KVM_CAP_IOEVENTFD),
            ("KVM_CAP_IMMEDIATE_EXIT", kvm_bindings::KVM_CAP_IMMEDIATE_EXIT),
        ];
        assert_eq!(NEEDED.map(|needed| (needed.name, needed.number)), numbers);
        assert_eq!(API_VERSION, KVM_API_VERSION as i32);
    }

    #[test]
    fn what_the_host_can_forbid_is_forbidden() {
        assert_eq!(restrictions(|_| 0), []);
        assert_eq!(restrictions(|_| -1), []);
        let newest = |cap| match cap {
            KVM_CAP_PMU_CAPABILITY | KVM_CAP_X86_NOTIFY_VMEXIT => 1,
            // Off and exit.
            KVM_CAP_X86_BUS_LOCK_EXIT => 3,
            _ => 0,
        };
        assert_eq!(restrictions(newest), [(212, 1), (219, 3), (193, 2)]);
        // A processor that cannot find bus locks.
        assert_eq!(restrictions(|cap| i32::from(cap == KVM_CAP_X86_BUS_LOCK_EXIT)), []);
    }
}

//! The registers with which the first vCPU enters the kernel: 64-bit mode with paging on, as Linux's boot protocol
//! wants it. The other vCPUs wait for the kernel's own start-up call and need nothing.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::{
    boot::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES},
    kvm::{KvmError, call},
    layout::{GDT, PAGE_TABLES, ZERO_PAGE},
};

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit that is always set.
const RFLAGS: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back: without it Linux would take its memory for uncached.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Lets the vCPU begin at `entry`.
///
/// # Errors
/// KVM's.
pub fn set_entry(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rflags: RFLAGS, rip: entry.0, rsi: ZERO_PAGE.0, ..Default::default() };
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))
}

/// The model-specific registers that differ from a processor's reset state, on every vCPU.
///
/// # Errors
/// KVM's, or that it did not take them.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [entry(MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK), entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING)];
    let failed = call("KVM_SET_MSRS");
    let msrs = Msrs::from_entries(&entries).map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
    // KVM stops at the first that it does not know.
    match vcpu.set_msrs(&msrs) {
        Ok(count) if count == entries.len() => Ok(()),
        Ok(_) => Err(failed(kvm_ioctls::Error::new(libc::EINVAL))),
        Err(error) => Err(failed(error)),
    }
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = kvm_segment { selector: CODE_SELECTOR, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PAGE_TABLES.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

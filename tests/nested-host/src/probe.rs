//! Whether the local KVM runs guests properly: it must run a few million real instructions of ring 0 in no time.
//!
//! A /dev/kvm that opens proves nothing. Some machines offer one whose guests run in an instruction emulator: four
//! orders too slow, and ended by the first instruction that the emulator does not know (cmpxchg16b among them). So the
//! probe's guest executes cmpxchg16b in 64-bit ring 0, spends four million instructions counting, and writes to a port.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Enough for an interpreted processor (about 0.1 s), far too little for the emulator (13 s).
const LIMIT: Duration = Duration::from_secs(3);
const PORT: u16 = 0x10;
const ANSWER: u8 = b'K';

const MEMORY: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;
const DATA: u32 = 0x10000;

/// Runs [`guest`] in a process of its own. The error says why this machine's KVM cannot be used.
pub fn probe() -> Result<(), String> {
    match Command::new("/proc/self/exe").arg("--probe-guest").stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
        Ok(child) => wait(child),
        Err(error) => Err(format!("the probe cannot be started: {error}")),
    }
}

fn wait(mut child: std::process::Child) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(_)) => {
                let output = child.wait_with_output().map_err(|error| error.to_string())?;
                let text = String::from_utf8_lossy(&output.stderr);
                return Err(text.trim().trim_start_matches("nested-host: ").to_owned());
            }
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("four million guest instructions took over {} s", LIMIT.as_secs()));
            }
        }
    }
}

#[rustfmt::skip]
fn code() -> Vec<u8> {
    let mut code = vec![0xbe]; code.extend(DATA.to_le_bytes()); // mov esi, DATA
    code.extend([0x31, 0xc0, 0x31, 0xd2]);                      // xor eax, eax; xor edx, edx
    code.extend([0x31, 0xdb, 0x31, 0xc9]);                      // xor ebx, ebx; xor ecx, ecx
    code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0e]);                // lock cmpxchg16b [rsi]
    code.push(0xb9); code.extend(2_000_000u32.to_le_bytes());   // mov ecx, 2_000_000
    code.extend([0xff, 0xc9, 0x75, 0xfc]);                      // 1: dec ecx; jnz 1b
    code.extend([0xb0, ANSWER, 0xe6, PORT as u8, 0xf4]);        // mov al, ANSWER; out PORT, al; hlt
    code
}

/// Runs the probe's guest in this process; returns when it has answered.
pub fn guest() -> anyhow::Result<()> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).context("guest memory")?;
    let host = memory.get_host_address(GuestAddress(0)).context("guest memory")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is one whole mapping of that size, owned by `memory`, which is dropped after the vCPU.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    // One page table: the first 2 MiB at their own address, present and writable.
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    memory.write_obj(PD | 3, GuestAddress(PDPT))?;
    memory.write_obj(0x83u64, GuestAddress(PD))?;
    memory.write_slice(&code(), GuestAddress(CODE))?;

    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let flat =
        kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, type_: 3, selector: 16, db: 1, ..Default::default() };
    sregs.cs = kvm_segment { type_: 11, l: 1, db: 0, selector: 8, ..flat };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (flat, flat, flat, flat, flat);
    sregs.cr0 = 0x8000_0031; // PG, NE, ET, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(PORT, [ANSWER]) => Ok(()),
        other => bail!("its guest ended with {}", describe(&other)),
    }
}

fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::InternalError => "an instruction that it cannot execute".into(),
        VcpuExit::Shutdown => "a triple fault".into(),
        VcpuExit::FailEntry(reason, _) => format!("a failed entry, hardware reason {reason:#x}"),
        _ => "an unexpected exit".into(),
    }
}

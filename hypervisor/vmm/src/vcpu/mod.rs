//! Virtual processors: one thread each, that enters the guest and serves what makes it come out.
//!
//! ```text
//!   pass the gate ──► KVM_RUN ──► port or register access: serve it, on we go
//!        ▲               ├──────► interrupted by a kick: back to the gate
//!        └───────────────┴──────► shutdown, reset, power-off, error: declare the end, leave
//! ```
//!
//! A kick is two things: `immediate_exit` set in the vCPU's shared page, so that the next entry returns at once, and
//! a signal, in case the thread is in the guest now. One of both meets it wherever it is ([`gate`] has the proof).

mod cpuid;
mod exit;
mod gate;
mod registers;

use std::{
    io,
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use caisson_protos::monitor::ExitReason;
use kvm_bindings::{CpuId, KVM_EXIT_NOTIFY, KVM_EXIT_X86_BUS_LOCK, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

pub use self::gate::Gate;
use crate::{
    bus::Bus,
    end::End,
    kvm::{KvmError, call, supported_cpuid},
};

/// A host thread's stack, bytes: the run loop is shallow.
const STACK: usize = 128 << 10;

/// A vCPU that locked the bus rests for this long: each such access stops all processors of the host's socket.
const BUS_LOCK_REST: Duration = Duration::from_millis(1);

/// A vCPU that has not run yet.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
}

/// What a vCPU thread shares with the rest of the machine.
#[derive(Clone)]
pub struct VcpuContext {
    /// What port and register accesses reach.
    pub bus: Arc<Bus>,
    /// Takes the reason when the machine has ended.
    pub end: Arc<End>,
    /// Whether to run.
    pub gate: Arc<Gate>,
}

/// A vCPU's thread.
pub struct Running {
    /// Keeps the vCPU, and with it the page that `immediate_exit` points to, until it is joined.
    thread: JoinHandle<VcpuFd>,
    immediate_exit: ImmediateExit,
    exits: Arc<AtomicU64>,
}

/// Makes the vCPUs of a machine; the first begins at `entry`. `invariant_tsc`: see [`cpuid::Clocks`].
///
/// # Errors
/// KVM's.
pub fn create(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    invariant_tsc: bool,
    entry: GuestAddress,
) -> Result<Vec<Vcpu>, KvmError> {
    let supported = supported_cpuid(kvm)?;
    let tsc_deadline = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    let clocks = cpuid::Clocks { tsc_deadline, invariant_tsc };
    (0..count)
        .map(|id| {
            let fd = vm.create_vcpu(id.into()).map_err(call("KVM_CREATE_VCPU"))?;
            let topology = cpuid::Topology { id, count };
            set_cpuid(&fd, &cpuid::entries(supported.as_slice(), topology, clocks))?;
            registers::set_msrs(&fd)?;
            if id == 0 {
                registers::set_entry(&fd, entry)?;
            }
            Ok(Vcpu { fd, id })
        })
        .collect()
}

fn set_cpuid(fd: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let failed = call("KVM_SET_CPUID2");
    let cpuid = CpuId::from_entries(entries).map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
    fd.set_cpuid2(&cpuid).map_err(failed)
}

/// Lets a kick interrupt KVM_RUN without ending the process. Once, before the first vCPU runs.
///
/// # Errors
/// The system call's.
pub fn install_kick() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(SIGRTMIN(), ignore)?)
}

/// Lets the kick's signal through on this thread: the parent process may have blocked it, and a blocked signal ends no
/// KVM_RUN.
fn unblock_kick() {
    // SAFETY: a zeroed sigset_t is valid and then initialized; the calls read and write nothing else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, SIGRTMIN());
        // Fails only for a wrong first argument.
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

impl Vcpu {
    /// Starts the thread.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(mut self, context: VcpuContext) -> io::Result<Running> {
        let immediate_exit = ImmediateExit::of(&mut self.fd);
        let exits = Arc::new(AtomicU64::new(0));
        let counter = exits.clone();
        let thread =
            std::thread::Builder::new().name(format!("vcpu{}", self.id)).stack_size(STACK).spawn(move || {
                unblock_kick();
                self.run(&context, &counter);
                context.gate.leave();
                self.fd
            })?;
        Ok(Running { thread, immediate_exit, exits })
    }

    fn run(&mut self, context: &VcpuContext, exits: &AtomicU64) {
        let immediate_exit = ImmediateExit::of(&mut self.fd);
        loop {
            if context.gate.pass() {
                // Tells the guest's watchdogs that it was stopped; fails if it does not use kvm-clock, and then need not know.
                let _ = self.fd.kvmclock_ctrl();
            }
            let exit = self.fd.run();
            exits.fetch_add(1, Ordering::Relaxed);
            match exit {
                Ok(VcpuExit::IoOut(port, data)) => {
                    if let Some(exit) = context.bus.ports.write(port, data) {
                        return context.end.declare(exit.reason, exit.detail);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => context.bus.ports.read(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => context.bus.read(GuestAddress(address), data),
                Ok(VcpuExit::MmioWrite(address, data)) => context.bus.write(GuestAddress(address), data),
                Ok(VcpuExit::Intr) => {}
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    // Then to the gate, in this order.
                    immediate_exit.clear();
                }
                Ok(VcpuExit::Shutdown) => {
                    let detail = format!("triple fault on vCPU {}", self.id);
                    return context.end.declare(ExitReason::TripleFault, detail);
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK)) => std::thread::sleep(BUS_LOCK_REST),
                Ok(VcpuExit::Unsupported(KVM_EXIT_NOTIFY)) => {
                    if exit::context_is_lost(&mut self.fd) {
                        let detail =
                            format!("vCPU {}: it kept its processor from the host, its state is lost", self.id);
                        return context.end.declare(ExitReason::KvmError, detail);
                    }
                }
                other => {
                    let what = exit::describe_unexpected(other);
                    let detail = format!("vCPU {}: {}{}", self.id, what, exit::details(&mut self.fd));
                    return context.end.declare(ExitReason::KvmError, detail);
                }
            }
        }
    }
}

impl Running {
    /// Gets the vCPU out of the guest, to the gate.
    pub fn kick(&self) {
        self.immediate_exit.set();
        // SAFETY: the thread was not joined, so its id is its own, whether it still runs or not; the signal has a
        // handler (install_kick).
        unsafe { libc::pthread_kill(self.thread.as_pthread_t() as _, SIGRTMIN()) };
    }

    /// Times that the guest came out to this process.
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

/// The byte in a vCPU's shared page that makes KVM_RUN return at once.
struct ImmediateExit(*const AtomicU8);

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self((&raw mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>())
    }

    fn set(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.byte().swap(0, Ordering::SeqCst);
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped as long as the VcpuFd exists, which `Running` keeps in its thread's result, and the
        // thread itself while it runs. A u8 has the layout of an AtomicU8; this process accesses it in no other way, and the
        // kernel only reads it.
        unsafe { &*self.0 }
    }
}

// SAFETY: it is only an address; what is done with it, see `byte`, may be done on any thread.
unsafe impl Send for ImmediateExit {}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked() -> bool {
        // SAFETY: a zeroed sigset_t is valid; the calls write and read it alone.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
            libc::sigismember(&set, SIGRTMIN()) == 1
        }
    }

    #[test]
    fn the_kick_goes_through_whatever_the_parent_has_blocked() {
        std::thread::spawn(|| {
            // SAFETY: a zeroed sigset_t is valid; the calls fill and read it alone.
            unsafe {
                let mut all: libc::sigset_t = std::mem::zeroed();
                libc::sigfillset(&mut all);
                libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
            }
            assert!(is_blocked());
            unblock_kick();
            assert!(!is_blocked());
        })
        .join()
        .unwrap();
    }
}

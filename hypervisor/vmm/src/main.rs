//! caisson-vmm: runs one microVM for the process that started it. It takes no arguments: everything comes through the control
//! socket, which the parent left as descriptor 3. After opening /dev/kvm it opens no path.
//!
//! The exit status is the number of the [`ExitReason`].

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use caisson_protos::monitor::{CONTROL_FD, ExitReason};
use caisson_vmm::{
    control::Control,
    kvm,
    monitor::{Monitor, MonitorError},
    output::Output,
};
use rustix::process::Resource;
use slog::Logger;

fn main() {
    // What a crash would write into a core file is the guest's memory.
    // SAFETY: takes one number and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    // Dependencies' own log records are not bridged: all of them report what the guest does, and it could cause them without end.
    let log = match std::io::stderr().as_fd().try_clone_to_owned() {
        Ok(stderr) => caisson_log::logger("vmm", Output::new(stderr), slog::Level::Info),
        Err(_) => Logger::root(slog::Discard, slog::o!()),
    };
    raise_descriptor_limit();
    let reason = match run(&log) {
        Ok(reason) => reason,
        Err(error) => {
            slog::crit!(log, "monitor failed"; "error" => %error);
            ExitReason::MonitorError
        }
    };
    // Without unwinding or destructors: vCPU threads may still be in the guest, and the process takes all with it.
    // SAFETY: _exit is always allowed.
    unsafe { libc::_exit(reason as libc::c_int) }
}

/// Each stream of the guest takes a descriptor, and the usual soft limit is 1024. Where it cannot be raised, the vsock device
/// refuses streams sooner.
fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

fn run(log: &Logger) -> Result<ExitReason, MonitorError> {
    // SAFETY: fcntl with F_GETFD only looks whether the descriptor is open. If it is, nobody in this process owns it: it
    // was left by the parent, and nothing was opened yet.
    let socket = unsafe {
        if libc::fcntl(CONTROL_FD, libc::F_GETFD) < 0 {
            return Err(caisson_vmm::control::ControlError::NotASocket.into());
        }
        OwnedFd::from_raw_fd(CONTROL_FD)
    };
    let control = Control::new(socket)?;
    // Never dropped: taking the machine apart in order is needless work, the end of the process does it at once.
    let monitor = Box::leak(Box::new(Monitor::new(control, kvm::open(), log.clone())?));
    Ok(monitor.run()?.reason)
}

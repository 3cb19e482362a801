//! Locks of every kind between pods and the host: see also `volumes`, where programs of an image take them.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::Path,
};

use caisson_e2e::{Finished, Host, Pod, Setup, host::Image, process::Running, wait::STEP};
use rustix::fs::{FlockOperation, flock};

use super::{volume, with_volume};

caisson_e2e::for_each_runtime!(
    between_pods_and_the_host in Setup::default().image(Image::Probe),
    end_with_their_pod in Setup::default().image(Image::Probe),
);

const KINDS: [&str; 3] = ["flock", "posix", "ofd"];
/// Those of them that can be held beside each other.
const KINDS_APART: [&str; 2] = ["flock", "posix"];

/// A lock of the host's, until it is dropped.
struct Held(#[allow(dead_code)] File);

/// Takes a lock of this kind; None if somebody has one.
fn take(kind: &str, path: &Path) -> Option<Held> {
    let file = File::options().read(true).write(true).open(path).expect("it is there");
    let taken = if kind == "flock" {
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
    } else {
        // Locks of files and of processes keep each other out, and this one ends with its file alone.
        let mut lock = libc::flock64 { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        // SAFETY: the descriptor is open, and the command reads a flock64.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) == 0 }
    };
    taken.then_some(Held(file))
}

fn lock(pod: &Pod, name: &str, action: &str, kind: &str) -> Running {
    pod.exec_start(name, &["probe", "cases", "lock", action, kind, "/v/file"])
}

fn tries(pod: &Pod, name: &str, kind: &str) -> String {
    Finished::of(lock(pod, name, "try", kind), STEP).succeeded()
}

fn wait_for_line(running: &Running, text: &str) {
    running.stdout.wait_for(&format!("{text:?}"), STEP, |output| output.contains(text).then_some(()));
}

fn between_pods_and_the_host(host: &Host) {
    let directory = volume(host);
    let file = directory.join("file");
    fs::write(&file, "content").expect("it is written");
    let first = with_volume(host, "first", &directory).start_idle();
    let second = with_volume(host, "second", &directory).start_idle();
    for kind in KINDS {
        let name = |what: &str| format!("{kind}-{what}");
        // The host has it.
        let held = take(kind, &file).expect("nobody has it");
        assert_eq!(tries(&first, &name("refused"), kind), "EAGAIN\n", "{kind}");
        let killed = lock(&first, &name("killed"), "wait", kind);
        let patient = lock(&second, &name("patient"), "wait", kind);
        wait_for_line(&killed, "waits\n");
        wait_for_line(&patient, "waits\n");
        first.kill_exec(&name("killed"), "SIGTERM");
        assert_eq!(Finished::of(killed, STEP).code, Some(143), "{kind}: who waits can be killed");
        drop(held);
        assert_eq!(Finished::of(patient, STEP).succeeded(), "waits\ndone\n", "{kind}");
        // A pod has it; another process of it, the other pod, and the host do not get it.
        let holder = lock(&first, &name("holder"), "hold", kind);
        wait_for_line(&holder, "done\n");
        assert_eq!(tries(&first, &name("beside"), kind), "EAGAIN\n", "{kind}: another process");
        assert_eq!(tries(&second, &name("other"), kind), "EAGAIN\n", "{kind}: another pod");
        assert!(take(kind, &file).is_none(), "{kind}: the host has it, too");
        let waits = lock(&second, &name("waits"), "wait", kind);
        wait_for_line(&waits, "waits\n");
        first.kill_exec(&name("holder"), "SIGKILL");
        assert_eq!(Finished::of(holder, STEP).code, Some(137), "{kind}");
        assert_eq!(Finished::of(waits, STEP).succeeded(), "waits\ndone\n", "{kind}");
        assert!(take(kind, &file).is_some(), "{kind}: nobody has it");
    }
    first.end();
    second.end();
}

fn end_with_their_pod(host: &Host) {
    let directory = volume(host);
    let file = directory.join("file");
    fs::write(&file, "content").expect("it is written");
    let first = with_volume(host, "first", &directory).start_idle();
    let second = with_volume(host, "second", &directory).start_idle();
    let holders = KINDS_APART.map(|kind| lock(&first, kind, "hold", kind));
    for holder in &holders {
        wait_for_line(holder, "done\n");
    }
    let waits = KINDS_APART.map(|kind| {
        let running = lock(&second, kind, "wait", kind);
        wait_for_line(&running, "waits\n");
        running
    });
    first.end();
    for running in waits {
        assert_eq!(Finished::of(running, STEP).succeeded(), "waits\ndone\n");
    }
    drop(holders);
    second.end();
}

//! The supervisor against a monitor that is played on the far end of the control socket: the processes beside it are
//! real, but do nothing.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use caisson_protos::{
    guest::{READY_PORT, Ready},
    monitor::{Event, ExitNotice, ExitReason, GuestStream, Reply, encode},
};
use caisson_runtime::vm::{
    dial::Dialer,
    supervisor::{Launched, MachineHandle, machine, supervise},
    timeline::{Timeline, now_ns},
};
use caisson_vmm_client::{Child, packet};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::time::timeout;
use ttrpc::asynchronous::Server;

use crate::{
    bench::LIMIT,
    guest::{self, Guest},
};

/// The monitor's side of one machine.
struct Played {
    handle: MachineHandle,
    control: Option<OwnedFd>,
    streams: OwnedFd,
    vmm: u32,
    fsd: u32,
    _guest: (Arc<Guest>, Server),
    _directory: TempDir,
}

fn idle() -> Child {
    let null = File::options().write(true).open("/dev/null").unwrap();
    Child::spawn(Path::new("/bin/sleep"), &["1000"], &[], null.as_fd()).unwrap()
}

impl Played {
    async fn new(boot_limit: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let guest = guest::serve(directory.path()).await;
        let (control, theirs) = packet::pair().unwrap();
        let (guest_streams, streams) = packet::pair().unwrap();
        let (vmm, fsd) = (idle(), idle());
        let pids = (vmm.pid(), fsd.pid());
        let dialer = Dialer::new(directory.path()).unwrap();
        let image = "kernel /k and initramfs /i".into();
        let launched =
            Launched { spawned_ns: now_ns(), image, vmm, fsd, control, guest_streams, console: None, dialer };
        let (handle, owner) = machine();
        let log = caisson_log::logger("shim", std::io::sink(), slog::Level::Debug);
        tokio::spawn(supervise(Ok(launched), owner, boot_limit, Arc::new(Timeline::new(now_ns())), log));
        Self { handle, control: Some(theirs), streams, vmm: pids.0, fsd: pids.1, _guest: guest, _directory: directory }
    }

    fn say(&self, event: &Event) {
        packet::send(self.control.as_ref().unwrap(), &encode(event).unwrap(), &[]).unwrap();
    }

    /// What a guest says that boots.
    fn boot(&self) {
        self.say(&Event::Answer { id: 1, result: Ok(Reply::Done) });
        self.say(&Event::Answer { id: 2, result: Ok(Reply::Done) });
        let ready = Ready { kernel_release: "6.1\n".into(), agent_started_ns: 5, ready_ns: u64::MAX };
        self.stream(READY_PORT, &postcard::to_stdvec(&ready).unwrap());
    }

    fn stream(&self, host_port: u32, bytes: &[u8]) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut ours, bytes).unwrap();
        let announced = encode(&GuestStream { host_port, guest_port: 1 }).unwrap();
        packet::send(&self.streams, &announced, &[theirs.into()]).unwrap();
    }

    async fn reason(&self) -> String {
        let reason = timeout(LIMIT, self.handle.lost()).await.expect("the machine is lost");
        for pid in [self.vmm, self.fsd] {
            assert!(kill(Pid::from_raw(pid.cast_signed()), None).is_err(), "process {pid} is gone and reaped");
        }
        reason.to_string()
    }
}

#[tokio::test]
async fn a_machine_boots_ends_and_says_why() {
    let mut played = Played::new(LIMIT).await;
    // What the guest opens before it is ready is nobody's.
    played.stream(9, b"");
    played.boot();
    timeout(LIMIT, played.handle.ready()).await.expect("it boots").unwrap();
    played.stream(9, b"");
    played.say(&Event::Exited(ExitNotice { reason: ExitReason::TripleFault, detail: "vCPU 0".into() }));
    played.control = None;
    let reason = played.reason().await;
    assert!(reason.starts_with("the machine ended: triple fault: vCPU 0"), "{reason}");
    assert!(played.handle.get().is_err());
}

#[tokio::test]
async fn a_refused_configuration_is_the_reason() {
    let played = Played::new(LIMIT).await;
    played.say(&Event::Answer { id: 1, result: Err("guest memory of 1 MiB is too small".into()) });
    let reason = played.reason().await;
    assert!(reason.contains("guest memory of 1 MiB is too small") && reason.contains("kernel /k"), "{reason}");
    assert_eq!(played.handle.ready().await.err().unwrap().code(), ttrpc::Code::UNAVAILABLE);
}

#[tokio::test]
async fn killed_processes_take_the_other_with_them() {
    for (victim, words) in
        [(0, "caisson-vmm ended without saying why: killed by signal 9"), (1, "caisson-fsd ended: killed by signal 9")]
    {
        let mut played = Played::new(LIMIT).await;
        played.boot();
        timeout(LIMIT, played.handle.ready()).await.expect("it boots").unwrap();
        let pid = [played.vmm, played.fsd][victim];
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
        if victim == 0 {
            played.control = None;
        }
        assert_eq!(played.reason().await, words);
    }
}

#[tokio::test]
async fn a_guest_that_never_gets_ready_is_given_up() {
    let played = Played::new(Duration::from_millis(50)).await;
    played.say(&Event::Answer { id: 1, result: Ok(Reply::Done) });
    let reason = played.reason().await;
    assert!(reason.contains("was not ready 50ms after the start"), "{reason}");
}

#[tokio::test]
async fn a_ready_message_that_is_none_and_a_broken_protocol_are_reported() {
    let played = Played::new(LIMIT).await;
    played.say(&Event::Answer { id: 1, result: Ok(Reply::Done) });
    played.say(&Event::Answer { id: 2, result: Ok(Reply::Done) });
    played.stream(READY_PORT, &[0xff; 300]);
    assert!(played.reason().await.contains("invalid ready message from the guest: longer than 256 bytes"));
    let played = Played::new(LIMIT).await;
    played.say(&Event::Answer { id: 77, result: Ok(Reply::Done) });
    assert!(played.reason().await.contains("broke the control protocol"));
}

#[tokio::test]
async fn stop_ends_it_whatever_it_is_doing() {
    for booted in [false, true] {
        let played = Played::new(LIMIT).await;
        if booted {
            played.boot();
            timeout(LIMIT, played.handle.ready()).await.expect("it boots").unwrap();
        }
        timeout(LIMIT, played.handle.stop()).await.expect("it stops");
        assert_eq!(played.reason().await, "the machine was stopped");
    }
}

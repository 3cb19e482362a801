//! Guests that do whatever they like with registers and ports: the monitor serves on, counts, and ends in order.

use std::os::unix::net::UnixListener;

use caisson_protos::monitor::ExitReason;
use caisson_vm_tests::{
    guests, kernel,
    monitor::{Monitor, machine},
};
use caisson_vmm_client::{Disk, Share, Vsock, packet};

#[test]
fn random_writes_to_the_registers_of_every_device() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
    let (_parent, guest_streams) = packet::pair().unwrap();
    let mut servers = Vec::new();
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::scribble_registers())));
    machine.vsock = Some(Vsock { guest_cid: 3, listener: listener.into(), guest_streams });
    for n in 0..8 {
        let file = kernel::descriptor(&[0; 4096]);
        machine.disks.push(Disk { serial: format!("disk{n}"), file, read_only: n % 2 == 0 });
    }
    for n in 0..4 {
        let (server, theirs) = packet::pair().unwrap();
        servers.push(server);
        machine.shares.push(Share { tag: format!("share{n}"), server: theirs });
    }
    let mut monitor = Monitor::spawn();
    monitor.start(machine);
    let (notice, log) = monitor.exit_notice_and_log();
    assert_eq!(notice.reason, ExitReason::PoweredOff, "{}", notice.detail);
    let faults = log.split("guest_faults=").nth(1).and_then(|rest| rest.split_whitespace().next());
    assert!(faults.is_some_and(|n| n.parse::<u64>().unwrap() > 1000), "{log}");
    assert!(log.lines().count() < 300, "a guest must not fill the log: {} lines", log.lines().count());
}

#[test]
fn random_accesses_to_all_ports() {
    let mut monitor = Monitor::spawn();
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::scribble_ports())));
    let _console = caisson_vm_tests::monitor::with_console(&mut machine);
    monitor.start(machine);
    assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
}

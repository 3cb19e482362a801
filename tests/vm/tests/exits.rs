//! The ways in which a machine ends: each has its own reason, and notice and exit status agree.

use caisson_protos::monitor::{ExitReason, Request};
use caisson_vm_tests::{
    guests, kernel,
    monitor::{Monitor, machine, read_until, with_console},
};

fn ends_with(code: &[u8]) -> (ExitReason, String) {
    let mut monitor = Monitor::spawn();
    monitor.start(machine(kernel::descriptor(&kernel::flat(code))));
    let notice = monitor.exit_notice();
    (notice.reason, notice.detail)
}

#[test]
fn power_off() {
    assert_eq!(ends_with(guests::power_off()).0, ExitReason::PoweredOff);
}

#[test]
fn reset_through_the_keyboard_controller() {
    let (reason, detail) = ends_with(guests::keyboard_reset());
    assert_eq!(reason, ExitReason::Reset);
    assert!(detail.contains("keyboard"), "{detail}");
}

#[test]
fn reset_through_the_chipset_port() {
    let (reason, detail) = ends_with(guests::port_reset());
    assert_eq!(reason, ExitReason::Reset);
    assert!(detail.contains("0xcf9"), "{detail}");
}

#[test]
fn triple_fault() {
    let (reason, detail) = ends_with(guests::triple_fault());
    assert_eq!(reason, ExitReason::TripleFault);
    assert!(detail.contains("vCPU 0"), "{detail}");
}

#[test]
fn an_instruction_that_kvm_cannot_fetch() {
    let (reason, detail) = ends_with(guests::jump_into_nothing());
    assert_eq!(reason, ExitReason::KvmError, "{detail}");
    assert!(detail.contains("suberror 1"), "{detail}");
}

#[test]
fn on_request() {
    let mut monitor = Monitor::spawn();
    monitor.start(machine(kernel::descriptor(&kernel::flat(guests::spin()))));
    assert!(monitor.call(Request::Shutdown).is_ok());
    assert_eq!(monitor.exit_reason(), ExitReason::Requested);
}

#[test]
fn a_parent_that_goes_away_ends_the_monitor() {
    let mut monitor = Monitor::spawn();
    monitor.start(machine(kernel::descriptor(&kernel::flat(guests::spin()))));
    monitor.hang_up();
    assert_eq!(monitor.exit_status().code(), Some(ExitReason::Requested as i32));
}

#[test]
fn a_monitor_without_a_machine_ends_with_its_parent() {
    let mut monitor = Monitor::spawn();
    monitor.hang_up();
    assert_eq!(monitor.exit_status().code(), Some(ExitReason::Requested as i32));
}

#[test]
fn a_machine_that_does_nothing_but_print_still_obeys() {
    let mut monitor = Monitor::spawn();
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::chatter())));
    let mut console = with_console(&mut machine);
    // Every byte is an exit, and an emulated host takes its time for each: a small pipe is full sooner.
    rustix::pipe::fcntl_setpipe_size(&console, 4096).expect("a pipe of one page");
    monitor.start(machine);
    read_until(&mut console, "output of the guest", |text| text.contains("ok\nok\n"));
    // Nobody reads any more: the pipe fills up, and the guest runs on.
    monitor.wait_for_stats("dropped console output", |stats| stats.console_dropped_bytes > 0);
    assert!(monitor.call(Request::Shutdown).is_ok());
    assert_eq!(monitor.exit_reason(), ExitReason::Requested);
}

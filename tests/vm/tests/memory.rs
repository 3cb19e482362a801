//! What the guest finds in its memory, and what its writes leave in files.

use std::{fs::File, io::Read, os::unix::fs::FileExt};

use caisson_protos::monitor::ExitReason;
use caisson_vm_tests::{
    guests, kernel,
    monitor::{Monitor, machine, with_console},
};
use caisson_vmm_client::{Machine, Memory};

fn prints(mut machine: Machine) -> Vec<u8> {
    let mut console = with_console(&mut machine);
    let mut monitor = Monitor::spawn();
    monitor.start(machine);
    assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
    let mut text = Vec::new();
    console.read_to_end(&mut text).unwrap();
    text
}

#[test]
fn the_command_line_names_the_devices() {
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::print_command_line())));
    machine.command_line = "one two".into();
    let expected = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5:0 one two\n";
    assert_eq!(String::from_utf8(prints(machine)).unwrap(), expected);
}

#[test]
fn the_initramfs_is_there_to_its_last_byte() {
    let content: Vec<u8> = (0..10_007u32).map(|n| (n % 255) as u8).collect();
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::print_initramfs())));
    machine.initramfs = Some(kernel::descriptor(&content));
    assert!(prints(machine) == content);
}

/// A kernel of several pages, so that it is mapped.
fn self_changing() -> File {
    let mut code = guests::write_own_code().to_vec();
    code.resize(10_000, 0x90);
    kernel::file(&kernel::flat(&code))
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_guest_that_changes_its_kernel_does_not_change_the_file() {
    let file = self_changing();
    let before = content(&file);
    let mut monitor = Monitor::spawn();
    monitor.start(machine(file.try_clone().unwrap().into()));
    assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
    assert!(content(&file) == before);
}

#[test]
fn shared_memory_keeps_what_is_written_and_private_memory_does_not() {
    // The command line is at 0x20000, and begins with the first device.
    for (private, expected) in [(false, b"virtio_m"), (true, &[0; 8])] {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(32 << 20).unwrap();
        let mut machine = machine(kernel::descriptor(&kernel::flat(guests::power_off())));
        machine.memory = Memory { size: 32 << 20, file: Some(memory.try_clone().unwrap().into()), private };
        let mut monitor = Monitor::spawn();
        monitor.start(machine);
        assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, 0x2_0000).unwrap();
        assert_eq!(&bytes, expected, "private: {private}");
    }
}

#[test]
fn the_monitor_itself_takes_little_memory() {
    let mut monitor = Monitor::spawn();
    let mut machine = machine(kernel::descriptor(&kernel::flat(guests::spin())));
    machine.memory.size = 4 << 30;
    machine.vcpus = 4;
    monitor.start(machine);
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", monitor.pid())).unwrap();
    let pss: u64 = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .unwrap();
    // This guest touches next to nothing of its memory.
    assert!(pss < 5 << 10, "{pss} KiB proportional");
}

//! Block devices: what the guest sees and does on them, and what is in their files afterwards.

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

use caisson_protos::monitor::{Event, ExitReason, Request};
use caisson_vm_tests::{
    hung::{self, Hung},
    kernel,
    linux::{Guest, fact, scenario},
    monitor::read_until,
};
use caisson_vmm_client::Disk;

const MIB: usize = 1 << 20;

fn disk(serial: &str, file: &File, read_only: bool) -> Disk {
    // A second open file description would need a path; the monitor never uses the position.
    let file: OwnedFd = file.try_clone().unwrap().into();
    Disk { serial: serial.to_owned(), file, read_only }
}

fn bytes(file: &File, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at as u64).unwrap();
    bytes
}

#[test]
fn all_kinds_of_disks_are_used_in_all_ways() {
    let pages: Vec<u8> = (0..8 * MIB).map(|n| (n / 4096) as u8).collect();
    let first = kernel::file(&pages);
    // 100 bytes after the last whole sector.
    let second = kernel::file(&vec![0x42; MIB + 100]);
    let third = kernel::file(&vec![0; 64 << 10]);
    let blocks_before = first.metadata().unwrap().blocks();
    let (mut machine, console) = scenario("disks");
    machine.disks =
        vec![disk("the-first-disk-of-it", &first, false), disk("second", &second, true), disk("", &third, false)];
    Guest::start((machine, console)).passes();

    let data: Vec<u8> = (0..MIB).map(|n| (n % 251) as u8).collect();
    assert!(bytes(&first, 2 * MIB, MIB) == data && bytes(&first, 3 * MIB, MIB) == data, "written data is in the file");
    assert!(bytes(&first, 4 * MIB, MIB) == vec![0; MIB], "the discarded MiB reads as zeros");
    assert!(bytes(&first, 5 * MIB, MIB) == vec![0; MIB], "the zeroed MiB reads as zeros");
    assert!(first.metadata().unwrap().blocks() + 2000 <= blocks_before, "the discarded MiB gave its blocks back");
    assert!(bytes(&first, 6 * MIB, 2 * MIB) == pages[6 * MIB..], "what was not written did not change");
    assert_eq!(first.metadata().unwrap().len(), 8 * MIB as u64);
    assert!(bytes(&second, 0, MIB + 100) == vec![0x42; MIB + 100], "the read-only disk did not change");
    assert_eq!(bytes(&third, 0, 8192), [vec![0xcc; 4096], vec![0; 4096]].concat());
}

#[test]
fn eight_disks_keep_their_order() {
    let files: Vec<File> = (0..8u8).map(|n| kernel::file(&vec![n; 16 << 10])).collect();
    let (mut machine, console) = scenario("count-disks");
    machine.vcpus = 2;
    machine.disks = files.iter().enumerate().map(|(n, file)| disk(&format!("disk{n}"), file, false)).collect();
    let said = Guest::start((machine, console)).passes();
    assert_eq!(fact(&said, "disks"), "vda vdb vdc vdd vde vdf vdg vdh");
    for (n, file) in files.iter().enumerate() {
        assert_eq!(bytes(file, 4096, 4096), vec![n as u8 + 100; 4096]);
        assert_eq!(bytes(file, 8192, 4096), vec![n as u8; 4096]);
    }
}

#[test]
fn a_disk_that_hangs_stops_nothing_else() {
    let storage = Hung::mount();
    let sound = kernel::file(&[0; 64 << 10]);
    let (mut machine, console) = scenario("hung-disk");
    machine.command_line += &format!(" caisson.hangs-from={}", hung::HANGS_FROM);
    machine.disks = vec![disk("hung", &storage.open(), true), disk("sound", &sound, false)];
    let mut guest = Guest::start((machine, console));
    // The guest begins with these when its read hangs.
    let said = read_until(&mut guest.console, "the other devices", |text| {
        text.contains("guest: the others work\r\n") || text.contains("guest: failed") && text.ends_with('\n')
    });
    assert!(!said.contains("guest: failed"), "{said}");
    storage.wait_for_reader();
    assert_eq!(bytes(&sound, 4096, 4096), [0xdd; 4096]);
    let monitor = &mut guest.monitor;
    monitor.call(Request::Pause).expect("a pause does not wait for the disk");
    let before = monitor.stats();
    assert_eq!(monitor.stats(), before);
    monitor.call(Request::Resume).unwrap();
    monitor.call(Request::Shutdown).unwrap();
    match monitor.event() {
        Some(Event::Exited(notice)) => assert_eq!(notice.reason, ExitReason::Requested),
        other => panic!("expected the exit notice, got {other:?}"),
    }
    // The kernel keeps a process whose system call it cannot interrupt.
    drop(storage);
    assert_eq!(monitor.exit_status().code(), Some(ExitReason::Requested as i32));
}

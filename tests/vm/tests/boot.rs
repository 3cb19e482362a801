//! Linux boots on machines of all sizes, and sees what was configured.

use caisson_protos::monitor::{ExitReason, Request};
use caisson_vm_tests::linux::{Guest, fact, scenario};

fn describes(vcpus: u8, memory_mib: u64) -> String {
    let (mut machine, console) = scenario("describe");
    machine.vcpus = vcpus;
    machine.memory.size = memory_mib << 20;
    let said = Guest::start((machine, console)).passes();
    let online = if vcpus == 1 { "0".to_owned() } else { format!("0-{}", vcpus - 1) };
    assert_eq!(fact(&said, "cpus"), online);
    let seen: u64 = fact(&said, "memory").parse().unwrap();
    // The kernel keeps some for itself: its image, and 1/64 for page structures.
    let (most, least) = (memory_mib << 10, (memory_mib << 10) * 15 / 16 - (24 << 10));
    assert!((least..=most).contains(&seen), "{seen} KiB seen of {most}");
    said
}

#[test]
fn the_smallest_machine() {
    describes(1, 48);
}

#[test]
fn two_vcpus_with_the_features_that_linux_needs() {
    let said = describes(2, 256);
    // Linux prefers the TSC to kvm-clock where it is invariant, and it is not where the host has another clock.
    let invariant = fact(&said, "flag nonstop_tsc") == "true";
    assert_eq!(fact(&said, "clock"), if invariant { "tsc" } else { "kvm-clock" });
    let host = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap();
    assert!(!invariant || host.trim_end() == "tsc", "the host's clock is {host}");
    for flag in ["hypervisor", "x2apic", "tsc_deadline_timer"] {
        assert_eq!(fact(&said, &format!("flag {flag}")), "true", "{flag}");
    }
    for flag in ["svm", "vmx"] {
        assert_eq!(fact(&said, &format!("flag {flag}")), "false", "{flag}");
    }
}

#[test]
fn seven_vcpus() {
    describes(7, 192);
}

#[test]
fn thirty_two_vcpus() {
    describes(32, 512);
}

#[test]
fn memory_above_the_device_gap() {
    describes(1, 5 << 10);
}

#[test]
fn the_entropy_device_gives_random_bytes() {
    Guest::start(scenario("random")).passes();
}

#[test]
fn a_guest_that_reboots_ends_with_a_reset() {
    let guest = Guest::start(scenario("reboot"));
    assert_eq!(guest.monitor.exit_reason(), ExitReason::Reset);
}

#[test]
fn a_guest_that_panics_ends_with_a_reset() {
    let guest = Guest::start(scenario("panic"));
    assert_eq!(guest.monitor.exit_reason(), ExitReason::Reset);
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_afterwards() {
    let (mut machine, console) = scenario("ticks");
    machine.vcpus = 2;
    let mut guest = Guest::start((machine, console));
    let console = &mut guest.console;
    caisson_vm_tests::monitor::read_until(console, "the first tick", |text| text.contains("guest: tick 3 "));
    for _ in 0..3 {
        guest.monitor.call(Request::Pause).unwrap();
        let before = guest.monitor.stats();
        // The emulated host may be slow, but not so slow that a running guest would do nothing meanwhile: it ticks
        // every 20 ms, and each of these calls is a round trip through both processes.
        for _ in 0..50 {
            assert_eq!(guest.monitor.stats(), before, "a paused machine counts nothing");
        }
        guest.monitor.call(Request::Resume).unwrap();
        guest.monitor.wait_for_stats("the resumed guest to do something", |stats| *stats != before);
    }
    guest.monitor.call(Request::Shutdown).unwrap();
    assert_eq!(guest.monitor.exit_reason(), ExitReason::Requested);
}

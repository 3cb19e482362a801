//! Machines that cannot be built: each is refused with a sentence that names the thing, and the monitor is as before.

use std::{fs::File, os::fd::OwnedFd, os::unix::net::UnixStream};

use caisson_protos::monitor::{
    Command, DescriptorIndex, Event, ExitReason, MAX_DESCRIPTORS, MAX_PACKET, MachineConfig, MemoryConfig, RateLimit,
    Reply, Request, TokenBucket, encode,
};
use caisson_vm_tests::{
    guests,
    kernel::{self, ENTRY, OFFSET, Segment},
    monitor::{Monitor, machine},
};
use caisson_vmm_client::{Console, Disk, Machine, Network, Share, Vsock};

fn good() -> Machine {
    machine(kernel::descriptor(&kernel::flat(guests::power_off())))
}

/// The monitor refuses this with all these words, and then still builds and runs a good machine.
fn refused(bad: Machine, words: &[&str]) {
    let mut monitor = Monitor::spawn();
    let error = monitor.configure(bad).expect_err("refused");
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    monitor.start(good());
    assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
}

fn with(change: impl FnOnce(&mut Machine)) -> Machine {
    let mut machine = good();
    change(&mut machine);
    machine
}

fn with_kernel(content: &[u8]) -> Machine {
    machine(kernel::descriptor(content))
}

#[test]
fn numbers_out_of_bounds() {
    refused(with(|m| m.vcpus = 0), &["0 vCPUs", "1 to 32"]);
    refused(with(|m| m.vcpus = 33), &["33 vCPUs", "1 to 32"]);
    refused(with(|m| m.memory.size = 1 << 20), &["1048576 bytes", "32 MiB"]);
    refused(with(|m| m.memory.size += 1), &["33554433 bytes", "multiple of 4096"]);
    refused(with(|m| m.memory.size = u64::MAX), &["1 TiB"]);
}

#[test]
fn a_memory_file_that_is_too_short() {
    refused(with(|m| m.memory.file = Some(kernel::descriptor(b"short"))), &["memory file", "5 bytes", "33554432"]);
}

#[test]
fn kernels_that_are_none() {
    refused(with_kernel(b""), &["kernel", "0 bytes", "truncated"]);
    refused(with_kernel(&[0; 4096]), &["kernel", "not an ELF"]);
    refused(with_kernel(&[b"MZ".as_slice(), &[0; 4096]].concat()), &["bzImage", "vmlinux"]);
    let whole = kernel::flat(&[0x90; 8192]);
    refused(with_kernel(&whole[..whole.len() - 1]), &["kernel", "12287 bytes", "12288", "truncated"]);
    refused(with_kernel(&whole[..70]), &["kernel", "truncated"]);
}

#[test]
fn kernels_with_malicious_headers() {
    let segment = |address, offset, file_size, memory_size| Segment { address, offset, file_size, memory_size };
    let elf = |segments: &[Segment]| with_kernel(&kernel::elf(ENTRY, segments, &[0xf4; 4096]));
    refused(elf(&[segment(0x7000, OFFSET, 4096, 4096)]), &["0x7000", "does not fit"]);
    refused(elf(&[segment(ENTRY, OFFSET, 4096, 1 << 40)]), &["does not fit", "more memory"]);
    refused(elf(&[segment(u64::MAX - 4095, OFFSET, 4096, 8192)]), &["malformed"]);
    refused(elf(&[segment(ENTRY, OFFSET, 4096, 1)]), &["malformed"]);
    refused(elf(&[segment(ENTRY, u64::MAX - 1, 4096, 4096)]), &["malformed"]);
    refused(elf(&[segment(ENTRY, 1 << 40, 4096, 4096)]), &["truncated"]);
    refused(elf(&[segment(ENTRY, OFFSET, 4096, 4096), segment(ENTRY, OFFSET, 4096, 4096)]), &["overlap"]);
    refused(elf(&[segment(ENTRY + 4096, OFFSET, 4096, 4096)]), &["entry point"]);
    refused(elf(&[]), &["program headers"]);
}

#[test]
fn an_initramfs_that_does_not_fit() {
    refused(with(|m| m.initramfs = Some(kernel::descriptor(b""))), &["initramfs is empty"]);
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(1 << 30).unwrap();
    refused(with(|m| m.initramfs = Some(sparse.into())), &["initramfs", "1073741824", "more memory"]);
}

#[test]
fn command_lines_that_linux_would_misread() {
    refused(with(|m| m.command_line = "a\nb".into()), &["0x0a", "printable ASCII"]);
    refused(with(|m| m.command_line = "x".repeat(2047)), &["2047", "shorten"]);
    refused(with(|m| m.command_line = "quiet -- nosmp".into()), &["\"--\"", "init"]);
    refused(with(|m| m.command_line = "a=\"b".into()), &["double quotes"]);
}

#[test]
fn descriptors_that_are_something_else() {
    let null = || -> OwnedFd { File::open("/dev/null").unwrap().into() };
    refused(machine(null()), &["kernel", "regular file"]);
    refused(with(|m| m.initramfs = Some(null())), &["initramfs", "regular file"]);
    refused(with(|m| m.memory.file = Some(null())), &["guest memory", "regular file"]);
    refused(with(|m| m.console = Some(Console { output: null(), early: false })), &["console", "open for writing"]);
    let (_reader, writer) = std::io::pipe().unwrap();
    let blocking = Console { output: writer.into(), early: false };
    refused(with(|m| m.console = Some(blocking)), &["console", "O_NONBLOCK"]);
    let disk = |file| Disk { serial: String::new(), file, read_only: false };
    refused(with(|m| m.disks = vec![disk(null())]), &["disk 0", "regular file or block device"]);
    let (stream, _other) = UnixStream::pair().unwrap();
    let share = Share { tag: "t".into(), server: stream.into() };
    refused(with(|m| m.shares = vec![share]), &["share", "SOCK_SEQPACKET"]);
    let vsock = Vsock { guest_cid: 3, listener: null(), guest_streams: null() };
    refused(with(|m| m.vsock = Some(vsock)), &["vsock listener", "SOCK_STREAM"]);
}

#[test]
fn a_disk_that_may_not_be_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let read_only: OwnedFd = File::open(file.path()).unwrap().into();
    let disk = |file| vec![Disk { serial: String::new(), file, read_only: false }];
    refused(with(|m| m.disks = disk(read_only)), &["disk 0", "reading and writing"]);
    let appending: OwnedFd = File::options().read(true).append(true).open(file.path()).unwrap().into();
    refused(with(|m| m.disks = disk(appending)), &["disk 0", "O_APPEND"]);
}

#[test]
fn too_many_devices_and_bad_names() {
    let disk = |serial: &str| Disk { serial: serial.into(), file: kernel::descriptor(&[0; 512]), read_only: false };
    refused(with(|m| m.disks = (0..9).map(|_| disk("")).collect()), &["9 disks", "at most 8"]);
    refused(with(|m| m.disks = vec![disk("same"), disk("same")]), &["same", "different"]);
    refused(with(|m| m.disks = vec![disk("a serial number that is too long")]), &["serial number", "20 bytes"]);
    refused(with(|m| m.disks = vec![disk("tab\there")]), &["serial number", "ASCII"]);
    let share = |tag: &str| {
        let (ours, theirs) = caisson_vmm_client::packet::pair().unwrap();
        std::mem::forget(ours);
        Share { tag: tag.into(), server: theirs }
    };
    refused(with(|m| m.shares = (0..5).map(|n| share(&n.to_string())).collect()), &["5 shares", "at most 4"]);
    refused(with(|m| m.shares = vec![share("")]), &["tag", "1 to 36"]);
    refused(with(|m| m.shares = vec![share(&"x".repeat(37))]), &["tag", "1 to 36"]);
}

#[test]
fn network_devices_that_cannot_be() {
    let null = || -> OwnedFd { File::open("/dev/null").unwrap().into() };
    let network = || Network {
        taps: vec![null()],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        send_limit: RateLimit::default(),
        receive_limit: RateLimit::default(),
        sources: None,
    };
    let one = |network| with(|m: &mut Machine| m.networks = vec![network]);
    refused(one(network()), &["network 0", "not an attached queue of a tap"]);
    refused(one(Network { taps: Vec::new(), ..network() }), &["network 0", "0 queues", "1 to 32"]);
    refused(one(Network { mac: [3, 0, 0, 0, 0, 1], ..network() }), &["network 0", "MAC", "03"]);
    refused(one(Network { mac: [0; 6], ..network() }), &["network 0", "MAC"]);
    refused(one(Network { mtu: 67, ..network() }), &["network 0", "MTU 67", "68 to 65521"]);
    let nothing = RateLimit { bytes: Some(TokenBucket { rate: 0, burst: 1 }), operations: None };
    refused(one(Network { receive_limit: nothing, ..network() }), &["network 0", "rate or burst of 0"]);
    refused(with(|m| m.networks = (0..9).map(|_| network()).collect()), &["9 networks", "at most 8"]);
    refused(with(|m| m.empty_network_slots = 9), &["9 network slots", "at most 8"]);
    let disk = || Disk { serial: String::new(), file: kernel::descriptor(&[0; 512]), read_only: false };
    let many = with(|m| (m.disks, m.empty_network_slots) = ((0..8).map(|_| disk()).collect(), 8));
    // Of these the entropy device, eight disks and as many empty slots fit.
    let mut monitor = Monitor::spawn();
    monitor.start(many);
    assert_eq!(monitor.exit_reason(), ExitReason::PoweredOff);
    let too_many = with(|m| {
        (m.disks, m.empty_network_slots) = ((0..8).map(|_| disk()).collect(), 8);
        let (ours, theirs) = caisson_vmm_client::packet::pair().unwrap();
        std::mem::forget(ours);
        m.shares = vec![Share { tag: "t".into(), server: theirs }];
    });
    refused(too_many, &["18 devices and empty slots", "at most 17"]);
}

#[test]
fn commands_in_the_wrong_order() {
    let mut monitor = Monitor::spawn();
    for request in [Request::Start, Request::Pause, Request::Resume, Request::Stats] {
        assert!(monitor.call(request).unwrap_err().contains("not configured"));
    }
    monitor.configure(machine(kernel::descriptor(&kernel::flat(guests::spin())))).unwrap();
    assert!(monitor.configure(good()).unwrap_err().contains("configured already"));
    assert!(monitor.call(Request::Pause).unwrap_err().contains("not started"));
    monitor.call(Request::Start).unwrap();
    assert!(monitor.call(Request::Start).unwrap_err().contains("started already"));
    assert!(monitor.call(Request::Resume).unwrap_err().contains("not paused"));
    monitor.call(Request::Pause).unwrap();
    assert!(monitor.call(Request::Pause).unwrap_err().contains("paused already"));
    assert!(matches!(monitor.call(Request::Stats), Ok(Reply::Stats(_))));
    monitor.call(Request::Shutdown).unwrap();
    assert_eq!(monitor.exit_reason(), ExitReason::Requested);
}

/// A configuration whose kernel is descriptor `kernel`.
fn config(kernel: u8) -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        invariant_tsc: false,
        memory: MemoryConfig { size: 32 << 20, file: None, private: false },
        kernel: DescriptorIndex(kernel),
        initramfs: None,
        command_line: String::new(),
        console: None,
        vsock: None,
        disks: Vec::new(),
        shares: Vec::new(),
        networks: Vec::new(),
        empty_network_slots: 0,
    }
}

fn open_descriptors(monitor: &Monitor) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().count()
}

#[test]
fn descriptors_that_are_missing_left_over_or_used_twice() {
    let mut monitor = Monitor::spawn();
    let good = || kernel::descriptor(&kernel::flat(guests::power_off()));
    // The first call settles what the process opens for itself.
    assert!(monitor.call(Request::Stats).is_err());
    let before = open_descriptors(&monitor);
    let mut twice = config(0);
    twice.initramfs = Some(DescriptorIndex(0));
    for (config, count, words) in [
        (config(0), 0, "index 0 out of range (0 received)"),
        (config(255), 3, "index 255 out of range (3 received)"),
        (config(0), 2, "1 descriptors of the packet unused"),
        (config(0), MAX_DESCRIPTORS, "63 descriptors"),
        (twice, 1, "already in use"),
    ] {
        let descriptors: Vec<OwnedFd> = (0..count).map(|_| good()).collect();
        let error = monitor.call_with(Request::Configure(Box::new(config)), &descriptors).unwrap_err();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
        assert_eq!(open_descriptors(&monitor), before, "after {error:?}");
    }
    let error = monitor.call_with(Request::Start, &[good()]).unwrap_err();
    assert!(error.contains("only Configure and AttachNetwork take descriptors"), "{error}");
    assert_eq!(open_descriptors(&monitor), before);
}

/// Nobody could be answered, so each ends the monitor, and the exit notice says why: a parent never waits in vain.
#[test]
fn packets_that_are_not_commands() {
    let descriptors: Vec<OwnedFd> = (0..5).map(|_| kernel::descriptor(b"x")).collect();
    let configure = encode(&Command { id: 1, request: Request::Configure(Box::new(config(0))) }).unwrap();
    let another_version = [&[9], &configure[1..]].concat();
    let trailing = [configure.as_slice(), &[0]].concat();
    let (malformed, together) = ("malformed", "install the parts of one Caisson release together");
    for (bytes, words) in [
        (&[1][..], malformed),
        (&[1, 255, 255, 255], malformed),
        (&another_version, together),
        (&trailing, "1 bytes follow"),
        (&vec![1; MAX_PACKET], "bytes follow"),
        (&vec![1; MAX_PACKET + 1], "exceeds"),
    ] {
        let monitor = Monitor::spawn();
        monitor.send_raw(bytes, &descriptors);
        let notice = monitor.exit_notice();
        assert_eq!(notice.reason, ExitReason::MonitorError);
        assert!(notice.detail.contains(words), "{notice:?} does not say {words:?}");
    }
}

#[test]
fn a_flood_of_commands_is_answered_in_order() {
    let mut monitor = Monitor::spawn();
    let ids: Vec<u32> = (0..100).map(|_| monitor.send(Request::Stats, &[])).collect();
    for sent in ids {
        assert!(matches!(monitor.event(), Some(Event::Answer { id, .. }) if id == sent));
    }
}

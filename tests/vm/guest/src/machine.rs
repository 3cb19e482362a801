//! The machine as Linux sees it.

use std::{
    fs,
    io::{Read, Write},
    os::fd::AsRawFd,
    time::Duration,
};

/// Standard output and error go to the console.
pub fn take_console() {
    let console = fs::OpenOptions::new().read(true).write(true).open("/dev/console").expect("/dev/console");
    for number in 0..3 {
        // SAFETY: replaces standard descriptors that nothing owns.
        assert!(unsafe { libc::dup2(console.as_raw_fd(), number) } >= 0);
    }
    // 0 to 2 are its copies.
    if console.as_raw_fd() < 3 {
        std::mem::forget(console);
    }
}

/// Microseconds since the kernel began to count.
fn uptime() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills a timespec.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    assert_eq!(result, 0, "CLOCK_BOOTTIME");
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// Prints what the host wants to compare.
pub fn describe() {
    println!("guest: up {}", uptime());
    let read = |path: &str| fs::read_to_string(path).expect(path).trim().to_owned();
    let memory = read("/proc/meminfo");
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("MemTotal");
    println!("guest: cpus {}", read("/sys/devices/system/cpu/online"));
    println!("guest: memory {}", total.trim().trim_end_matches(" kB"));
    println!("guest: clock {}", read("/sys/devices/system/clocksource/clocksource0/current_clocksource"));
    let flags = read("/proc/cpuinfo");
    for flag in ["hypervisor", "x2apic", "tsc_deadline_timer", "nonstop_tsc", "svm", "vmx"] {
        let has = flags.split_whitespace().any(|word| word == flag);
        println!("guest: flag {flag} {has}");
    }
    for line in read("/proc/interrupts").lines().filter(|line| line.contains("virtio")) {
        println!("guest: interrupt {}", line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
}

/// The entropy device works and gives different bytes each time.
pub fn random() {
    let current = fs::read_to_string("/sys/class/misc/hw_random/rng_current").expect("rng_current");
    assert!(current.starts_with("virtio_rng"), "rng_current is {current:?}");
    let mut device = fs::File::open("/dev/hwrng").expect("/dev/hwrng");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let mut bytes = [0; 32];
        device.read_exact(&mut bytes).expect("reading /dev/hwrng");
        assert!(seen.insert(bytes), "the same bytes twice");
    }
}

/// A line again and again, with the time.
pub fn tick_for_ever() -> ! {
    let start = std::time::Instant::now();
    for n in 0u64.. {
        println!("guest: tick {n} {}", start.elapsed().as_millis());
        std::io::stdout().flush().expect("the console");
        std::thread::sleep(Duration::from_millis(20));
    }
    unreachable!("2^64 ticks");
}

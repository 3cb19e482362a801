//! PID 1 of the VM tests' Linux guests. The kernel's command line names a scenario (`caisson.test=disks`); it runs, and
//! its last line on the console says how it went: `guest: passed`, or `guest: failed: …`. Then the machine powers off.
//!
//! Static, because nothing else is in the initramfs.

mod disks;
mod files;
mod machine;
mod network;
mod power;
mod slots;
mod vsock;

use std::{fs, path::Path};

fn main() {
    // Not to be run by mistake: everything below belongs to a machine of our own.
    assert_eq!(std::process::id(), 1, "caisson-vm-guest is the init of a test machine");
    mount("proc", "/proc", "proc", "");
    mount("sysfs", "/sys", "sysfs", "");
    mount("devtmpfs", "/dev", "devtmpfs", "");
    machine::take_console();
    std::panic::set_hook(Box::new(|panic| {
        println!("guest: failed: {}", panic.to_string().replace('\n', " "));
        power::off();
    }));
    let command_line = fs::read_to_string("/proc/cmdline").expect("/proc/cmdline");
    let word = |name: &str| command_line.split_whitespace().find_map(|word| word.strip_prefix(name)).map(str::to_owned);
    let scenario = word("caisson.test=").expect("caisson.test= in the kernel's command line");
    match scenario.as_str() {
        "describe" => machine::describe(),
        "random" => machine::random(),
        "reboot" => power::reboot(),
        "panic" => power::panic_the_kernel(),
        "disks" => disks::use_all_kinds(),
        "count-disks" => disks::count(),
        "hung-disk" => {
            let hangs_from = word("caisson.hangs-from=").and_then(|bytes| bytes.parse().ok());
            disks::one_hangs(hangs_from.expect("caisson.hangs-from= in the kernel's command line"))
        }
        "vsock" => vsock::both_ways(),
        "last-words" => vsock::last_words(),
        "network" => network::serve(),
        "slots" => slots::obey(),
        "ticks" => machine::tick_for_ever(),
        "files" => files::share(&word("caisson.tag=").expect("caisson.tag= in the kernel's command line")),
        other => panic!("no scenario {other:?}"),
    }
    println!("guest: passed");
    power::off();
}

/// Mounts a file system on a folder, which is made if it is not there.
fn mount(source: &str, target: &str, kind: &str, options: &str) {
    if !Path::new(target).exists() {
        fs::create_dir_all(target).expect(target);
    }
    let [source, target_c, kind, options] =
        [source, target, kind, options].map(|text| std::ffi::CString::new(text).expect("no zero in it"));
    // SAFETY: four C strings that outlive the call.
    let result = unsafe { libc::mount(source.as_ptr(), target_c.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    assert_eq!(result, 0, "mounting {target}: {}", std::io::Error::last_os_error());
}

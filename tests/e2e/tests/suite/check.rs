//! `caisson check` on a host that can run pods, and on one whose kernel file is not there.

use std::process::Command;

use caisson_e2e::{Finished, Host, environment, process::Running, wait::long};

caisson_e2e::caisson_only!(a_machine_is_booted, a_missing_kernel_is_named);

fn check(host: &Host, config: &str) -> Finished {
    let mut command = Command::new(environment::bin_dir().join("caisson"));
    command.arg("check").env("CAISSON_CONFIG", host.directory().join(config));
    Finished::of(Running::start(&mut command), long())
}

fn a_machine_is_booted(host: &Host) {
    let finished = check(host, "caisson.toml");
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let text = finished.out();
    let line = text.lines().find(|line| line.contains("boot: ")).expect("a line about the boot");
    assert!(line.starts_with("ok ") && line.ends_with(" ms after its start"), "{line}");
}

fn a_missing_kernel_is_named(host: &Host) {
    let good = std::fs::read_to_string(host.directory().join("caisson.toml")).expect("the host has a configuration");
    let without: String =
        good.lines().filter(|line| !line.starts_with("kernel ")).map(|line| format!("{line}\n")).collect();
    let path = host.directory().join("without-kernel.toml");
    std::fs::write(&path, without + "kernel = \"/no/such/vmlinux\"\n").expect("the directory is ours");
    let finished = check(host, "without-kernel.toml");
    assert_eq!(finished.code, Some(1), "{finished:?}");
    let failed: Vec<String> =
        finished.out().lines().filter(|line| line.starts_with("FAILED")).map(str::to_owned).collect();
    assert!(failed.len() == 2 && failed.iter().all(|line| line.contains("/no/such/vmlinux")), "{failed:?}");
}

//! Writes for which there is no space, which fail when they are made and not later.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use caisson_e2e::{Host, Setup, disk::Disk, host::Image};

use super::{holds, volume, with_volume};

caisson_e2e::for_each_runtime!(
    a_full_disk in Setup::default().image(Image::Probe).disk(48),
    a_quota_that_is_used_up in Setup::default().image(Image::Probe),
    a_file_that_is_too_large in Setup::default().image(Image::Probe).disk(48),
);

/// Requires that a write has failed with `error`, and that all that was written before is there; gives its length.
fn filled(output: &str, error: &str, file: &Path) -> u64 {
    let value = |name: &str| {
        let line = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name} in {output}")).to_owned()
    };
    assert_eq!((&*value("fill"), &*value("fsync")), (error, "done"), "{output}");
    assert_eq!(value("written"), value("length"), "{output}");
    let bytes = fs::read(file).expect("it is there");
    assert_eq!(bytes.len().to_string(), value("written"));
    assert!(bytes.iter().all(|byte| *byte == 7), "other bytes than written");
    bytes.len() as u64
}

fn a_full_disk(host: &Host) {
    let directory = volume(host);
    let output = with_volume(host, "volume", &directory).run(&["probe", "cases", "fill", "/v/file"]).succeeded();
    let length = filled(&output, "ENOSPC", &directory.join("file"));
    assert!(length > 16 << 20, "only {length} bytes");
    // There is space again as soon as the host has made some.
    fs::remove_file(directory.join("file")).expect("it is there");
    let script = "probe cases fill /file; rm /file; echo again > /file && cat /file";
    let output = host.container("root").sh(script).succeeded();
    assert!(
        output.contains("fill: ENOSPC") && output.contains("fsync: done") && output.ends_with("again\n"),
        "{output}"
    );
}

fn a_quota_that_is_used_up(host: &Host) {
    // Not in the test's own directory, where a mount would be taken for something that a pod has left.
    let at = host.directory().with_extension("quota");
    fs::create_dir_all(&at).expect("a new directory");
    let disk = Disk::with_quotas(&host.directory().join("quota.img"), 48, &at);
    let directory = at.join("volume");
    fs::create_dir(&directory).expect("a new directory");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("it takes modes");
    disk.limit(&directory, 4);
    let output = with_volume(host, "quota", &directory).run(&["probe", "cases", "fill", "/v/file"]).succeeded();
    let length = filled(&output, "EDQUOT", &directory.join("file"));
    assert!((3 << 20..=4 << 20).contains(&length), "{length} bytes of 4 MiB");
    drop(disk);
    let _ = fs::remove_dir(&at);
}

fn a_file_that_is_too_large(host: &Host) {
    let directory = volume(host);
    let output = with_volume(host, "large", &directory).run(&["probe", "cases", "too-large", "/v"]).succeeded();
    holds(host, &output, "write: EFBIG\ntruncate: EFBIG\nfsync: done\nlength: 0");
}

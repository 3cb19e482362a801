//! Files as programs use them: each call answers what the host's file system answers, on the root and on volumes.
//!
//! The probe makes the calls inside (`probe cases GROUP`), one line each; the tests hold the lines against tables, which are
//! the same for both runtimes. A line of a table that begins with `runc|` or `caisson|` is for that runtime alone, and has a row in
//! docs/differences.md.

mod attributes;
mod binds;
mod durability;
mod locks;
mod many;
mod names;
mod ranges;
mod space;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use caisson_e2e::{Host, Runtime, pod::Container};

/// A directory of the host, on the file system that containerd's root is on (ext4, with [`caisson_e2e::Setup::disk`]).
fn volume(host: &Host) -> PathBuf {
    let directory = host.directory().join("root/volume");
    fs::create_dir(&directory).expect("a new directory");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("it takes modes");
    directory
}

/// A container that has `directory` at `place`.
fn mounted<'a>(container: Container<'a>, directory: &Path, place: &str) -> Container<'a> {
    container.flag(format!("--mount=type=bind,src={},dst={place},options=rbind:rw", directory.display()))
}

/// A container that has `directory` at `/v`.
fn with_volume<'a>(host: &'a Host, name: &str, directory: &Path) -> Container<'a> {
    mounted(host.container(name), directory, "/v")
}

/// Requires that the lines of `output` are those of the table.
#[track_caller]
fn holds(host: &Host, output: &str, table: &str) {
    let (own, other) = match host.runtime {
        Runtime::Caisson => ("caisson|", "runc|"),
        Runtime::Runc => ("runc|", "caisson|"),
    };
    let wanted = table.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(other));
    let wanted: Vec<&str> = wanted.map(|line| line.strip_prefix(own).unwrap_or(line)).collect();
    let output: Vec<&str> = output.lines().map(str::trim).collect();
    let wrong: Vec<String> = output
        .iter()
        .zip(&wanted)
        .filter(|(output, wanted)| output != wanted)
        .map(|(output, wanted)| format!("{output:?} must be {wanted:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(output.len(), wanted.len(), "{output:#?}");
}

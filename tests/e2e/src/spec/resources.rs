//! `linux.resources` and `linux.sysctl` against the report: the container's own cgroup v2 files, as it sees them at
//! /sys/fs/cgroup.

use caisson_e2e_probe::{Look, Report};
use serde_json::Value;

use super::{Difference, questions::sysctl_path};

/// A file and what it must say.
pub(super) struct File {
    pub path: String,
    field: String,
    value: Wanted,
}

enum Wanted {
    /// All of it.
    Text(String),
    /// One of its lines, if the words after the first are these (`8:0 rbps=1 wbps=max ...`).
    Row { first: String, words: Vec<String> },
}

/// What the container's files must say after these limits; the conversions are those of the kernel's cgroup v2 guide and
/// of runc.
pub(super) fn files(resources: &Value) -> Vec<File> {
    let mut files = Vec::new();
    let mut text = |field: &str, file: &str, value: Option<String>| {
        if let Some(value) = value {
            let path = format!("/sys/fs/cgroup/{file}");
            files.push(File { path, field: format!("linux.resources.{field}"), value: Wanted::Text(value) });
        }
    };
    let limit =
        |value: &Value| value.as_i64().map(|number| if number < 0 { "max".to_owned() } else { number.to_string() });
    let (memory, cpu) = (&resources["memory"], &resources["cpu"]);
    text("memory.limit", "memory.max", limit(&memory["limit"]));
    text("memory.reservation", "memory.low", limit(&memory["reservation"]));
    // The specification's is memory and swap together, the file's is swap alone.
    let swap = match (memory["swap"].as_i64(), memory["limit"].as_i64()) {
        (Some(both), Some(memory)) if both >= 0 => Some((both - memory).to_string()),
        (Some(_), _) => Some("max".to_owned()),
        _ => None,
    };
    text("memory.swap", "memory.swap.max", swap);
    text("pids.limit", "pids.max", limit(&resources["pids"]["limit"]));
    let weight = cpu["shares"].as_u64().map(|shares| (1 + (shares - 2) * 9999 / 262_142).to_string());
    text("cpu.shares", "cpu.weight", weight);
    let period = cpu["period"].as_u64().unwrap_or(100_000);
    let quota = cpu["quota"]
        .as_i64()
        .map(|quota| if quota > 0 { format!("{quota} {period}") } else { format!("max {period}") });
    text("cpu.quota", "cpu.max", quota);
    text("cpu.cpus", "cpuset.cpus", cpu["cpus"].as_str().map(str::to_owned));
    text("cpu.mems", "cpuset.mems", cpu["mems"].as_str().map(str::to_owned));
    for (file, value) in resources["unified"].as_object().into_iter().flatten() {
        text("unified", file, value.as_str().map(str::to_owned));
    }
    throttles(&resources["blockIO"], &mut files);
    files
}

fn throttles(block: &Value, files: &mut Vec<File>) {
    let kinds = [
        ("throttleReadBpsDevice", "rbps"),
        ("throttleWriteBpsDevice", "wbps"),
        ("throttleReadIOPSDevice", "riops"),
        ("throttleWriteIOPSDevice", "wiops"),
    ];
    for (field, key) in kinds {
        for entry in block[field].as_array().into_iter().flatten() {
            files.push(File {
                path: "/sys/fs/cgroup/io.max".to_owned(),
                field: format!("linux.resources.blockIO.{field}"),
                value: Wanted::Row {
                    first: format!("{}:{}", entry["major"], entry["minor"]),
                    words: vec![format!("{key}={}", entry["rate"])],
                },
            });
        }
    }
}

pub(super) fn compare(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let seen = mounts.filter(|mount| mount["destination"] == "/sys/fs/cgroup").count() > 0;
    // Without that mount nothing inside can tell.
    for file in files(&spec["linux"]["resources"]).into_iter().filter(|_| seen) {
        let text = text(report, &file.path);
        let (is, wanted) = match &file.value {
            Wanted::Text(wanted) => (text.as_ref().is_ok_and(|text| *text == wanted), wanted.clone()),
            Wanted::Row { first, words } => {
                let has = |line: &str| {
                    let mut seen = line.split(' ');
                    seen.next() == Some(first) && words.iter().all(|word| line.split(' ').any(|seen| seen == word))
                };
                (text.as_ref().is_ok_and(|text| text.lines().any(has)), format!("{first} {}", words.join(" ")))
            }
        };
        if !is {
            found.push(format!("{}: {} must be {wanted:?}: {text:?}", file.field, file.path));
        }
    }
    for (key, value) in spec["linux"]["sysctl"].as_object().into_iter().flatten() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let wanted = words(value.as_str().unwrap_or_default());
        let text = text(report, &sysctl_path(key));
        if !text.as_ref().is_ok_and(|text| words(text) == wanted) {
            found.push(format!("linux.sysctl {key}: must be {value}: {text:?}"));
        }
    }
}

fn text<'a>(report: &'a Report, path: &str) -> Result<&'a String, String> {
    match report.looks.get(path) {
        Some(Look::File { text: Ok(text), .. }) => Ok(text),
        other => Err(format!("{other:?}")),
    }
}

//! Specifications put to the test: one is given to a runtime, a program runs under it and reports what it sees, and the
//! report is held against what was given.
//!
//! ```text
//! Given::new(..).set("/linux/sysctl", ..)      a specification as containerd writes them, changed for the test
//!   .report()                                  Create, Start, Wait, Delete on the shim's socket → Report
//! differences(&spec, &report)                  every field that can be compared, and what is not as it was asked for
//! ```
//!
//! The shim is spoken to directly, because containerd drops the fields that are newer than itself.

mod given;
mod mounts;
mod process;
mod questions;
mod resources;

use std::fmt::Debug;

use caisson_e2e_probe::Report;
use serde_json::Value;

pub use given::{Ended, Given};
pub use questions::questions;

/// A field and what is wrong with it.
pub type Difference = String;

/// Everything in `spec` that the report can tell about and that is not so. What is newer than runc's 1.1 is left to the
/// test.
pub fn differences(spec: &Value, report: &Report) -> Vec<Difference> {
    let mut found = Vec::new();
    process::compare(&spec["process"], report, &mut found);
    mounts::compare(spec, report, &mut found);
    resources::compare(spec, report, &mut found);
    if let Some(name) = spec["hostname"].as_str() {
        same("hostname", &report.hostname, name, &mut found);
    }
    let filter = if spec["linux"]["seccomp"].is_object() { 2 } else { 0 };
    same("linux.seccomp", &report.process.seccomp, &filter, &mut found);
    namespaces(spec, report, &mut found);
    found
}

/// Requires that there is no difference.
#[track_caller]
pub fn holds(spec: &Value, report: &Report) {
    let found = differences(spec, report);
    assert!(found.is_empty(), "not as the specification asks:\n  {}", found.join("\n  "));
}

fn same<A, B>(field: &str, seen: &A, asked: &B, found: &mut Vec<Difference>)
where
    A: PartialEq<B> + Debug + ?Sized,
    B: Debug + ?Sized,
{
    if seen != asked {
        found.push(format!("{field}: asked {asked:?}, is {seen:?}"));
    }
}

/// The numbers of a list, or none.
fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().into_iter().flatten().filter_map(Value::as_u64).map(|number| number as u32).collect()
}

/// Whether the container has a user namespace of its own.
fn own_users(spec: &Value) -> bool {
    spec["linux"]["uidMappings"].is_array()
}

/// The texts of a list, or none.
fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A kernel's first namespaces have these numbers (include/linux/proc_ns.h); network and mount have none that is fixed.
const FIRST: [(&str, &str); 5] = [
    ("ipc", "ipc:[4026531839]"),
    ("uts", "uts:[4026531838]"),
    ("user", "user:[4026531837]"),
    ("pid", "pid:[4026531836]"),
    ("cgroup", "cgroup:[4026531835]"),
];

fn namespaces(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    let listed: Vec<&str> = spec["linux"]["namespaces"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["type"].as_str())
        .collect();
    for (kind, first) in FIRST {
        // Not asked for, it is the host's with runc and the container's own with Caisson: the test's to say.
        if kind == "cgroup" && !listed.contains(&kind) {
            continue;
        }
        let is_first = report.namespaces.get(kind).is_some_and(|name| name == first);
        if is_first == listed.contains(&kind) {
            found.push(format!("linux.namespaces: {kind} is {:?}", report.namespaces.get(kind)));
        }
    }
    let (ids, whole) = (spec["linux"]["uidMappings"].as_array(), vec![[0, 0, u64::from(u32::MAX)]]);
    let rows = |ids: &Vec<Value>| -> Vec<[u64; 3]> {
        let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or_default();
        ids.iter().map(|id| [number(id, "containerID"), number(id, "hostID"), number(id, "size")]).collect()
    };
    same("linux.uidMappings", &report.uid_map, &ids.map_or_else(|| whole.clone(), rows), found);
    let ids = spec["linux"]["gidMappings"].as_array();
    same("linux.gidMappings", &report.gid_map, &ids.map_or(whole, rows), found);
    if listed.contains(&"pid") {
        same("linux.namespaces: the first process's parent", &report.process.parent, &0, found);
    }
}

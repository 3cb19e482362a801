//! `probe report`: everything that a process can see of its container, and what the words ask it to try.

mod mounts;
mod paths;
mod process;
mod try_it;

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, bail};
use caisson_e2e_probe::Report;

pub use try_it::call;

/// Looks, tries what `words` ask for, and gives the report.
pub fn report(words: &[&str]) -> Result<Report> {
    // Before anything else is opened.
    let descriptors = process::descriptors()?;
    let status = process::Status::read()?;
    let uts = rustix::system::uname();
    let text = |bytes: &std::ffi::CStr| bytes.to_string_lossy().into_owned();
    let mut report = Report {
        process: process::process(&status, descriptors)?,
        capabilities: process::capabilities(&status)?,
        hostname: text(uts.nodename()),
        domainname: text(uts.domainname()),
        namespaces: namespaces()?,
        uid_map: id_map("/proc/self/uid_map")?,
        gid_map: id_map("/proc/self/gid_map")?,
        setgroups: read("/proc/self/setgroups")?.trim_end().to_owned(),
        cgroup: read("/proc/self/cgroup")?,
        mounts: mounts::parse(&read("/proc/self/mountinfo")?)?,
        devices: paths::devices(),
        looks: BTreeMap::new(),
        writes: BTreeMap::new(),
        nodes: BTreeMap::new(),
        calls: BTreeMap::new(),
    };
    for word in words {
        let key = |text: &str| text.to_owned();
        match word.split_once('=') {
            Some(("look", path)) => drop(report.looks.insert(key(path), paths::look(path))),
            Some(("write", path)) => drop(report.writes.insert(key(path), paths::write(path))),
            Some(("node", node)) => drop(report.nodes.insert(key(node), try_it::node(node)?)),
            Some(("call", call)) => drop(report.calls.insert(key(call), try_it::in_a_child(call)?)),
            _ => bail!("{word:?} is none of look=PATH, write=PATH, node=KIND:MAJOR:MINOR, call=NUMBER:ARGUMENT..."),
        }
    }
    Ok(report)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}

fn namespaces() -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/ns").context("list /proc/self/ns")? {
        let entry = entry?;
        let target = fs::read_link(entry.path()).with_context(|| format!("read {:?}", entry.path()))?;
        found.insert(entry.file_name().to_string_lossy().into_owned(), target.to_string_lossy().into_owned());
    }
    Ok(found)
}

fn id_map(path: &str) -> Result<Vec<[u64; 3]>> {
    let row = |line: &str| -> Option<[u64; 3]> {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some([next()?, next()?, next()?])
    };
    let text = read(path)?;
    text.lines().map(|line| row(line).with_context(|| format!("{path} has the row {line:?}"))).collect()
}

//! `probe hook FILE NAME`: stands in for a hook's program, on the host or in the container.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{Read, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Appends a line to `file`: what the hook was given and where it ran.
pub fn note(file: &Path, name: &str) -> Result<()> {
    let mut state = String::new();
    std::io::stdin().read_to_string(&mut state).context("read the state on standard input")?;
    let state: Value = serde_json::from_str(&state).with_context(|| format!("the state is {state:?}"))?;
    let mut namespaces = BTreeMap::new();
    for kind in ["mnt", "pid", "net", "uts", "ipc"] {
        let link = fs::read_link(format!("/proc/self/ns/{kind}")).context("read a link of /proc/self/ns")?;
        namespaces.insert(kind, link);
    }
    let environment: BTreeMap<String, String> = std::env::vars().collect();
    let line = json!({ "name": name, "state": state, "environment": environment, "namespaces": namespaces });
    let mut file = OpenOptions::new().append(true).create(true).open(file).context("open the hooks' file")?;
    file.write_all(format!("{line}\n").as_bytes()).context("write to the hooks' file")
}

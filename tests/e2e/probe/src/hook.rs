//! `probe hook FILE NAME`: stands in for a hook's program, on the host or in the container.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Appends a line to `file`: what the hook was given and where it ran.
pub fn note(file: &Path, name: &str) -> Result<()> {
    let mut state = String::new();
    std::io::stdin().read_to_string(&mut state).context("read the state on standard input")?;
    let state: Value = serde_json::from_str(&state).with_context(|| format!("the state is {state:?}"))?;
    let namespaces = |process: &str| -> Result<BTreeMap<&str, PathBuf>> {
        let link = |kind| {
            let path = format!("/proc/{process}/ns/{kind}");
            Ok((kind, fs::read_link(&path).with_context(|| format!("read {path}"))?))
        };
        ["mnt", "pid", "net", "uts", "ipc"].into_iter().map(link).collect()
    };
    // None once the task is gone, and none for a pid of another pid namespace.
    let task = state["pid"].as_u64().and_then(|pid| namespaces(&pid.to_string()).ok());
    let namespaces = namespaces("self")?;
    let environment: BTreeMap<String, String> = std::env::vars().collect();
    let line = json!({
        "name": name, "state": state, "environment": environment, "namespaces": namespaces, "task_namespaces": task,
    });
    let mut file = OpenOptions::new().append(true).create(true).open(file).context("open the hooks' file")?;
    file.write_all(format!("{line}\n").as_bytes()).context("write to the hooks' file")
}

//! What the nested host is to do: written by the outer process into the initramfs, read by the inner init.

use std::path::PathBuf;

use anyhow::bail;
use serde::{Deserialize, Serialize};

use crate::machine::Emulator;

/// Where the job lies in the initramfs.
pub const PATH: &str = "/job.json";

/// One command and its environment.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// The program and its arguments; never empty.
    pub command: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Its working directory (`/` where that does not exist inside).
    pub cwd: PathBuf,
    /// Folders shared writable; the n-th has the virtio-fs tag `rw<n>`.
    pub rw: Vec<PathBuf>,
    /// The root lies in the initramfs, not on this machine.
    pub in_ram: bool,
    /// What emulates the host: it decides which modules are loaded, and how reports and output leave.
    pub emulator: Emulator,
    /// Parameters of its KVM module, `NAME=VALUE`.
    pub kvm: Vec<String>,
}

/// The command's environment: a fixed base, the caller's variables that concern our tests, and the `--env` options.
pub fn environment(options: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let mut env: Vec<(String, String)> =
        [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("TERM", "dumb")]
            .map(|(name, value)| (name.into(), value.into()))
            .into();
    let ours = |name: &str| ["CAISSON_", "RUST_", "NEXTEST_"].iter().any(|prefix| name.starts_with(prefix));
    env.extend(std::env::vars().filter(|(name, _)| ours(name)));
    for option in options {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => match std::env::var(option) {
                Ok(value) => (option.clone(), value),
                Err(error) => bail!("--env {option}: {error}"),
            },
        };
        env.retain(|(known, _)| *known != name);
        env.push((name, value));
    }
    Ok(env)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_replace_the_base() {
        let env = environment(&["HOME=/elsewhere".into(), "X=a=b".into()]).unwrap();
        let get = |name: &str| env.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        assert_eq!(get("HOME"), ["/elsewhere"]);
        assert_eq!(get("X"), ["a=b"]);
    }

    #[test]
    fn a_variable_to_pass_on_must_exist() {
        assert!(environment(&["CAISSON_SURELY_NOT_SET".into()]).is_err());
    }
}

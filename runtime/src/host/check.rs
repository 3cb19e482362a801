//! `caisson check`: is this host fit to run pods? Each check prints one line, and what to do if it failed. The last one boots a
//! machine ([`crate::host::trial`]).

use std::{
    io::{self, Write},
    path::Path,
    process::Command,
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::{
    host::{config::Config, kvm::check_kvm, trial},
    network::forward,
    vm::images::{open_initramfs, open_kernel},
};

/// The oldest containerd whose shim interface is spoken here.
const OLDEST_CONTAINERD: (u32, u32) = (1, 6);

type Outcome = Result<String, String>;

/// Makes every check and writes the result to `out`. True if all passed.
///
/// # Errors
/// If `out` cannot be written.
pub fn check(out: &mut impl Write) -> io::Result<bool> {
    let config = Config::load();
    let shown = Config::path().display().to_string();
    let mut report = Report { out, all: true };
    report.needed("configuration", config.as_ref().map(|_| shown).map_err(ToString::to_string))?;
    // The rest is checked against the defaults then, so that one mistake does not hide another.
    let config = config.unwrap_or_default();
    report.needed(
        "kvm",
        check_kvm().map(|()| "/dev/kvm has what the monitor needs".into()).map_err(|error| error.to_string()),
    )?;
    report.needed(
        "kernel",
        open_kernel(&config.kernel).map(|_| shown_path(&config.kernel)).map_err(|error| error.to_string()),
    )?;
    let initramfs = open_initramfs(&config.initramfs);
    report.needed("initramfs", initramfs.map(|_| shown_path(&config.initramfs)).map_err(|error| error.to_string()))?;
    report.needed("monitor", executable(&config.monitor()))?;
    report.needed("file server", executable(&config.file_server()))?;
    report.needed("containerd", containerd())?;
    report.needed("cgroup", cgroup2())?;
    let forwarding = forward::check().map(|()| "connections to a pod's loopback can be redirected".to_owned());
    report.optional("port forwarding", forwarding.map_err(|error| error.to_string()))?;
    // What only a running machine shows: /dev/kvm may have all that is needed and still run no guest, as in many virtual machines.
    let booted = trial::boot(&config);
    report.needed(
        "boot",
        booted.map(|took| format!("a machine's agent answered {} ms after its start", took.as_millis())),
    )?;
    Ok(report.all)
}

/// Where the lines go.
struct Report<'a, W> {
    out: &'a mut W,
    /// Nothing that is needed is missing.
    all: bool,
}

impl<W: Write> Report<'_, W> {
    /// A check that must pass.
    fn needed(&mut self, name: &str, outcome: Outcome) -> io::Result<()> {
        self.all &= outcome.is_ok();
        self.line(name, outcome, "FAILED")
    }

    /// A check of what pods can do without.
    fn optional(&mut self, name: &str, outcome: Outcome) -> io::Result<()> {
        self.line(name, outcome, "MISSING")
    }

    fn line(&mut self, name: &str, outcome: Outcome, otherwise: &str) -> io::Result<()> {
        let (word, text) = match outcome {
            Ok(detail) => ("ok", detail),
            Err(remedy) => (otherwise, remedy),
        };
        writeln!(self.out, "{word:<7} {name}: {text}")
    }
}

fn shown_path(path: &Path) -> String {
    path.display().to_string()
}

fn executable(path: &Path) -> Outcome {
    use nix::unistd::{AccessFlags, access};
    match access(path, AccessFlags::X_OK) {
        Ok(()) => Ok(shown_path(path)),
        Err(error) => Err(format!(
            "{} cannot be run: {error}: install it (make install) or name it in {}",
            path.display(),
            crate::host::config::DEFAULT_PATH
        )),
    }
}

fn containerd() -> Outcome {
    let output = Command::new("containerd").arg("--version").output();
    let output =
        output.map_err(|error| format!("containerd cannot be run: {error}: install containerd 1.6 or later"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        parse_version(&text).ok_or_else(|| format!("containerd's version cannot be read from {:?}", text.trim()))?;
    if version >= OLDEST_CONTAINERD {
        Ok(format!("{}.{}", version.0, version.1))
    } else {
        Err(format!("containerd {}.{} is too old: install 1.6 or later", version.0, version.1))
    }
}

/// The version in what `containerd --version` prints: name, package, version, revision.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let word = text.split_whitespace().nth(2)?;
    let mut numbers = word.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn cgroup2() -> Outcome {
    let place = "/sys/fs/cgroup";
    match statfs(place) {
        Ok(statfs) if statfs.filesystem_type() == CGROUP2_SUPER_MAGIC => Ok(format!("version 2 at {place}")),
        Ok(_) => Err(format!("{place} is not cgroup v2: boot with systemd.unified_cgroup_hierarchy=1")),
        Err(error) => Err(format!("{place}: {error}: mount cgroup v2 there")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_debian_and_upstream_print_them() {
        assert_eq!(
            parse_version("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3"),
            Some((1, 6))
        );
        assert_eq!(parse_version("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4"), Some((2, 1)));
        assert_eq!(parse_version("nonsense"), None);
    }
}

//! A trial for `caisson check`: boots a machine as every pod's is booted (cgroup, shared directory, file server, kernel, agent),
//! waits until the agent answers, and ends it. Nothing of it remains.

use std::{fs::File, os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use crate::{
    host::{config::Config, paths::PodPaths},
    rootfs::share::enter_mount_namespace,
    spec::BundleSpec,
    vm::{
        launch::{self, Launch, launch},
        supervisor::{MachineHandle, machine, supervise},
        timeline::{Timeline, now_ns},
    },
};

/// The trial's name where a pod has containerd's namespace.
const NAMESPACE: &str = "caisson-check";

/// Boots a machine, and says how long it took from caisson-vmm's start to the agent's answer. The calling thread must be the
/// process's only one; it is in a mount namespace of its own afterwards.
///
/// # Errors
/// A sentence that names the step and what to do.
pub fn boot(config: &Config) -> Result<Duration, String> {
    let id = std::process::id().to_string();
    let paths = PodPaths::new(&config.state_dir, NAMESPACE, &id);
    enter_mount_namespace().map_err(|error| format!("{error}: run this as root"))?;
    let tried = try_boot(config, &paths, &id);
    let removed = paths.remove().map_err(|error| format!("cannot remove {}: {error}", paths.pod().display()));
    let took = tried?;
    removed.map(|()| took)
}

fn try_boot(config: &Config, paths: &PodPaths, id: &str) -> Result<Duration, String> {
    // One directory, of which nothing is left afterwards.
    let mut spec = BundleSpec::default();
    spec.cgroups_path = Some(format!("/{NAMESPACE}-{id}"));
    let socket = paths.socket("", NAMESPACE, id);
    let pod =
        launch::Pod { namespace: NAMESPACE, id, bundle: Path::new("/"), socket: &socket, spec: &spec, network: None };
    let null = File::options().write(true).open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let Launch { machine: launched, share, allotment, .. } =
        launch(config, paths, pod, null.as_fd()).map_err(|error| error.to_string())?;
    let limit = Duration::from_secs(config.boot_timeout_s.into());
    let began = launched.spawned_ns;
    let (handle, owner) = machine();
    let log = caisson_log::logger("check", std::io::sink(), slog::Level::Error);
    let tried = runtime.block_on(async {
        tokio::spawn(supervise(Ok(launched), owner, limit, Arc::new(Timeline::new(began)), log));
        wait(&handle, began).await
    });
    drop(share);
    let ended = allotment.end().map_err(|error| error.to_string());
    let took = tried?;
    ended.map(|()| took)
}

async fn wait(handle: &MachineHandle, began: u64) -> Result<Duration, String> {
    let ready = handle.ready().await;
    let took = Duration::from_nanos(now_ns().saturating_sub(began));
    handle.stop().await;
    match ready {
        Ok(_) => Ok(took),
        Err(error) => Err(remedy(&error.to_string())),
    }
}

/// The reason, and what to do if KVM gave up: then it is not the guest's fault, because the same kernel boots elsewhere.
fn remedy(reason: &str) -> String {
    let advice = if reason.contains("KVM") {
        ": this host's KVM cannot run a stock kernel: enable virtualization in the firmware, or nested virtualization if this host is a virtual machine itself"
    } else {
        ""
    };
    format!("the machine did not boot: {reason}{advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_cannot_do_comes_with_advice() {
        let failed = remedy("the machine ended: KVM error: vCPU 0: emulation failed");
        assert!(failed.contains("vCPU 0") && failed.ends_with("is a virtual machine itself"), "{failed}");
        let late = remedy("the guest's agent was not ready 30s after the start");
        assert!(!late.contains("virtualization"), "{late}");
    }

    /// Where a root or a cgroup is missing, the step is named, and nothing stays.
    #[test]
    fn a_boot_that_cannot_begin_names_the_step_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("state");
        let config = Config { state_dir: state_dir.clone(), kernel: "/no/such/vmlinux".into(), ..Config::default() };
        let failed = boot(&config).unwrap_err();
        assert!(failed.contains("/no/such/vmlinux") || failed.contains("kvm"), "{failed}");
        let left = std::fs::read_dir(&state_dir).into_iter().flatten().count();
        assert_eq!(left, 0, "{}", state_dir.display());
    }
}

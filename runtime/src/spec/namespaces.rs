//! Which namespaces a container gets. It shares its pod's kernel, never the host's: a namespace that is not listed
//! would be the host's and is refused, unless what is in the guest does as well (user, cgroup, time). A path can only
//! lead to another container of this pod, which containerd knows by the pid of the pod's task. But for the network: its path is
//! that of the pod's network namespace on the host, which all containers of the pod have.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use serde_json::Value;

use super::FieldError;

/// Those that a container must have of its own or of its pod.
const NEEDED: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
];

/// A namespace of another container of the pod that a container wants to be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// As the specification calls it.
    pub kind: &'static str,
    /// The pid in its path: containerd's pid of a task.
    pub pid: u32,
}

/// The namespaces of a container that are not its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Those of other containers of the pod.
    pub joins: Vec<Join>,
    /// The pod's network namespace on the host, an absolute path. None: the pod has one of its own.
    pub network: Option<PathBuf>,
}

/// The specification's name of a kind, and the name of its file in /proc/PID/ns.
fn names(kind: LinuxNamespaceType) -> (&'static str, &'static str) {
    match kind {
        LinuxNamespaceType::Mount => ("mount", "mnt"),
        LinuxNamespaceType::Cgroup => ("cgroup", "cgroup"),
        LinuxNamespaceType::Uts => ("uts", "uts"),
        LinuxNamespaceType::Ipc => ("ipc", "ipc"),
        LinuxNamespaceType::User => ("user", "user"),
        LinuxNamespaceType::Pid => ("pid", "pid"),
        LinuxNamespaceType::Network => ("network", "net"),
        LinuxNamespaceType::Time => ("time", "time"),
    }
}

pub(super) fn field(kind: &str) -> String {
    format!("linux.namespaces[{kind}]")
}

pub(super) fn check(spec: &Spec) -> Result<Namespaces, FieldError> {
    let linux = spec.linux().as_ref().ok_or_else(|| FieldError::new("linux", "is missing"))?;
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    let mut found = Namespaces::default();
    for (index, namespace) in listed.iter().enumerate() {
        let name = names(namespace.typ()).0;
        if listed.iter().take(index).any(|other| other.typ() == namespace.typ()) {
            return Err(FieldError::new(field(name), "is listed twice"));
        }
        if namespace.typ() == LinuxNamespaceType::Network {
            found.network = network(namespace)?;
        } else {
            found.joins.extend(join(namespace)?);
        }
    }
    for kind in NEEDED {
        if !listed.iter().any(|namespace| namespace.typ() == kind) {
            let name = names(kind).0;
            let message = format!(
                "is not listed, which asks for the host's: a container in a machine of its own cannot have the host's {name} namespace"
            );
            return Err(FieldError::new(field(name), message));
        }
    }
    Ok(found)
}

fn network(namespace: &LinuxNamespace) -> Result<Option<PathBuf>, FieldError> {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else { return Ok(None) };
    if !path.is_absolute() {
        return Err(FieldError::new(field("network"), format!("{path:?} is not an absolute path")));
    }
    Ok(Some(path.clone()))
}

/// Takes the path of the network namespace out of `linux`: the guest has one network for all. Whether there was a path.
pub(super) fn leave_out_network_path(linux: &mut Value) -> bool {
    let listed = linux.get_mut("namespaces").and_then(Value::as_array_mut).into_iter().flatten();
    let mut networks = listed.filter(|namespace| namespace.get("type").is_some_and(|kind| kind == "network"));
    let network = networks.next().and_then(Value::as_object_mut);
    network.is_some_and(|network| network.remove("path").is_some())
}

fn join(namespace: &LinuxNamespace) -> Result<Option<Join>, FieldError> {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else { return Ok(None) };
    let (kind, file) = names(namespace.typ());
    let pid = path.to_str().and_then(|path| task_pid(path, file));
    let message = || {
        format!(
            "{path:?} is a namespace of the host: only one of a container of the same pod can be joined, as /proc/<pid of the pod's task>/ns/{file}"
        )
    };
    let pid = pid.ok_or_else(|| FieldError::new(field(kind), message()))?;
    Ok(Some(Join { kind, pid }))
}

/// The pid in `/proc/<pid>/ns/<file>`.
fn task_pid(path: &str, file: &str) -> Option<u32> {
    let (pid, rest) = path.strip_prefix("/proc/")?.split_once('/')?;
    let plain = pid.bytes().all(|byte| byte.is_ascii_digit()) && !pid.starts_with('0');
    (plain && rest.strip_prefix("ns/") == Some(file)).then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_a_tasks_own_file_names_a_namespace() {
        assert_eq!(task_pid("/proc/4711/ns/net", "net"), Some(4711));
        for path in [
            "/proc/4711/ns/ipc",
            "/proc/self/ns/net",
            "/proc/1/../2/ns/net",
            "/proc/1/ns/net/",
            "/proc/01/ns/net",
            "/proc//ns/net",
            "/proc/+1/ns/net",
            "/var/run/netns/cni-1",
            "/proc/99999999999/ns/net",
            "proc/1/ns/net",
            "/proc/1/task/1/ns/net",
        ] {
            assert_eq!(task_pid(path, "net"), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_read_or_not(path in "(/proc/)?.{0,10}(/ns/)?.{0,5}", pid: u32) {
            let _ = task_pid(&path, "net");
            prop_assert_eq!(task_pid(&format!("/proc/{pid}/ns/net"), "net"), Some(pid).filter(|pid| *pid > 0));
        }
    }
}

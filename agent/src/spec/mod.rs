//! From the OCI runtime specification to a [`Plan`](crate::plan): pure, without I/O.
//!
//! The specification comes from an image and its user and is hostile. Each field is either honoured, or refused with
//! its name and value, or, where containerd's own defaults always contain it and a pod in its own machine loses
//! nothing, accepted with a note for the log. Nothing is dropped in silence.
//!
//! - this file: the document as a whole, namespaces, paths;
//! - [`process`]: the `process` object, which Exec sends alone;
//! - [`mounts`]: mount options;
//! - [`devices`]: `linux.devices` and the nodes that every container has;
//! - [`resources`]: `linux.resources` as cgroup v2 files and device rules;
//! - `seccomp`: `linux.seccomp` as a filter.

pub mod devices;
mod document;
pub mod mounts;
pub mod process;
pub mod resources;
mod seccomp;

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType};

use crate::plan::{ProcessPlan, View};

/// The largest specification, bytes (as agent.proto says).
pub const MAX_SPEC: usize = 1024 * 1024;

/// A field that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// The field's name from the document's top, as `process.cwd` or `mounts[2].options`.
    pub field: String,
    /// What is wrong with its value, and the value.
    pub problem: String,
}

impl SpecError {
    pub(crate) fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

pub(crate) type Result<T> = std::result::Result<T, SpecError>;

/// A specification that can be honoured.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// What the container's processes see.
    pub view: View,
    /// The init process.
    pub process: ProcessPlan,
    /// What the container may use.
    pub resources: resources::Resources,
    /// What was accepted without effect, for the log.
    pub notes: Vec<String>,
}

/// Reads a whole specification (config.json). `terminal` is the caller's wish; it overrides `process.terminal`.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn container(json: &[u8], terminal: bool) -> Result<Accepted> {
    let spec: document::Document = parse("spec", json)?;
    let mut notes = Vec::new();
    let linux = spec.linux.as_ref().ok_or_else(|| SpecError::new("linux", "missing"))?;

    refuse("hooks", spec.hooks.as_ref().filter(|hooks| **hooks != Default::default()))?;
    refuse("solaris", spec.solaris)?;
    refuse("windows", spec.windows)?;
    refuse("vm", spec.vm)?;
    refuse("zos", spec.zos)?;
    check_linux(linux, &mut notes)?;
    check_namespaces(linux.namespaces().as_deref().unwrap_or_default(), &mut notes)?;

    let process = spec.process.as_ref().ok_or_else(|| SpecError::new("process", "missing"))?;
    let mut process = process::plan("process", process, terminal, &process::Inherited::default(), &mut notes)?;
    process.seccomp = linux.seccomp().as_ref().map(|profile| seccomp::plan(profile, &mut notes)).transpose()?;
    let mounts = mounts::plan(spec.mounts.as_deref().unwrap_or_default())?;
    let devices = devices::plan(linux.devices().as_deref().unwrap_or_default())?;
    let resources = resources::plan(linux.resources().as_ref(), &resources::Present::default(), &mut notes)?;
    let view = View {
        hostname: name("hostname", &spec.hostname)?,
        domainname: name("domainname", &spec.domainname)?,
        sysctl: sysctl(linux)?,
        mounts,
        devices,
        masked_paths: paths("linux.maskedPaths", linux.masked_paths().as_deref())?,
        readonly_paths: paths("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
        readonly_root: spec.root.as_ref().and_then(|root| root.readonly()).unwrap_or(false),
    };
    Ok(Accepted { view, process, resources, notes })
}

/// Parses one JSON document of at most [`MAX_SPEC`] bytes.
pub(crate) fn parse<'a, T: serde::Deserialize<'a>>(field: &str, json: &'a [u8]) -> Result<T> {
    if json.len() > MAX_SPEC {
        return Err(SpecError::new(field, format!("{} bytes, at most {MAX_SPEC} are read", json.len())));
    }
    serde_json::from_slice(json).map_err(|error| SpecError::new(field, error.to_string()))
}

/// Refuses a field that is present.
pub(crate) fn refuse<T>(field: &str, value: Option<T>) -> Result<()> {
    match value {
        Some(_) => Err(SpecError::new(field, "is not supported yet; remove it")),
        None => Ok(()),
    }
}

fn check_linux(linux: &Linux, notes: &mut Vec<String>) -> Result<()> {
    fn some<T>(list: &Option<Vec<T>>) -> Option<&Vec<T>> {
        list.as_ref().filter(|list| !list.is_empty())
    }
    refuse("linux.uidMappings", some(linux.uid_mappings()))?;
    refuse("linux.gidMappings", some(linux.gid_mappings()))?;
    refuse("linux.netDevices", linux.net_devices().as_ref().filter(|map| !map.is_empty()))?;
    refuse("linux.timeOffsets", linux.time_offsets().as_ref().filter(|map| !map.is_empty()))?;
    refuse("linux.intelRdt", linux.intel_rdt().as_ref())?;
    refuse("linux.memoryPolicy", linux.memory_policy().as_ref())?;
    refuse("linux.personality", linux.personality().as_ref())?;
    match linux.rootfs_propagation().as_deref() {
        // The guest's own mounts change no more once a container runs, so receiving changes is the same as not.
        None | Some("" | "private" | "rprivate" | "slave" | "rslave") => {}
        Some(other) => {
            return Err(SpecError::new(
                "linux.rootfsPropagation",
                format!("{other:?} is not supported, use \"rprivate\""),
            ));
        }
    }
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        notes.push("linux.mountLabel has no effect: the guest runs without SELinux".into());
    }
    Ok(())
}

fn check_namespaces(namespaces: &[LinuxNamespace], notes: &mut Vec<String>) -> Result<()> {
    use LinuxNamespaceType as Type;
    let field = "linux.namespaces";
    for namespace in namespaces {
        let name = match namespace.typ() {
            Type::User => return Err(SpecError::new(field, "\"user\" is not supported yet; remove it")),
            Type::Time => return Err(SpecError::new(field, "\"time\" is not supported yet; remove it")),
            Type::Mount => "mount",
            Type::Cgroup => "cgroup",
            Type::Uts => "uts",
            Type::Ipc => "ipc",
            Type::Pid => "pid",
            Type::Network => "network",
        };
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
            let problem =
                format!("{name:?} with path {path:?}: joining a namespace is not supported yet; remove the path");
            return Err(SpecError::new(field, problem));
        }
    }
    let has = |typ: Type| namespaces.iter().any(|namespace| namespace.typ() == typ);
    for (typ, name) in [(Type::Mount, "mount"), (Type::Pid, "pid"), (Type::Ipc, "ipc"), (Type::Uts, "uts")] {
        if !has(typ) {
            let problem =
                format!("{name:?} is missing: a container cannot share the host's, which is outside its machine");
            return Err(SpecError::new(field, problem));
        }
    }
    if !has(Type::Network) {
        let problem = "\"network\" is missing: a pod cannot share the host's network; use a network namespace";
        return Err(SpecError::new(field, problem));
    }
    if !has(Type::Cgroup) {
        notes.push("linux.namespaces has no \"cgroup\": the container gets its own all the same".into());
    }
    Ok(())
}

fn name(field: &str, value: &Option<String>) -> Result<Option<String>> {
    // 64 is __NEW_UTS_LEN of include/uapi/linux/utsname.h.
    match value.as_deref() {
        None | Some("") => Ok(None),
        Some(name) if name.len() > 64 => Err(SpecError::new(field, format!("{name:?} is longer than 64 bytes"))),
        Some(name) => Ok(Some(text(field, name)?)),
    }
}

/// A string for the kernel: no NUL byte.
pub(crate) fn text(field: &str, value: &str) -> Result<String> {
    match value.contains('\0') {
        true => Err(SpecError::new(field, format!("{value:?} contains a NUL byte"))),
        false => Ok(value.to_owned()),
    }
}

/// An absolute path for the kernel.
pub(crate) fn absolute(field: &str, path: &Path) -> Result<PathBuf> {
    if !path.is_absolute() {
        return Err(SpecError::new(field, format!("{path:?} is not an absolute path")));
    }
    text(field, &path.to_string_lossy())?;
    Ok(path.to_owned())
}

fn paths(field: &str, paths: Option<&[String]>) -> Result<Vec<PathBuf>> {
    paths.unwrap_or_default().iter().map(|path| absolute(field, Path::new(path))).collect()
}

/// Kernel settings that belong to a container's own namespaces or to the pod's network, as paths below /proc/sys.
fn sysctl(linux: &Linux) -> Result<Vec<(PathBuf, String)>> {
    // What lives in an IPC namespace: ipc/ipc_sysctl.c and ipc/mq_sysctl.c of the kernel.
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    let mut settings = Vec::new();
    for (key, value) in linux.sysctl().iter().flatten() {
        let field = format!("linux.sysctl[{key:?}]");
        // A key with a slash has its dots in names (net/ipv4/conf/eth0.100/forwarding), as sysctl(8) reads it.
        let path = if key.contains('/') { key.clone() } else { key.replace('.', "/") };
        let namespaced = path.starts_with("net/") || path.starts_with("fs/mqueue/") || IPC.contains(&path.as_str());
        let plain = Path::new(&path).components().all(|part| matches!(part, Component::Normal(_)));
        if !namespaced || !plain {
            return Err(SpecError::new(field, "is not a setting of the container's own namespaces; remove it"));
        }
        settings.push((PathBuf::from(text(&field, &path)?), text(&field, value)?));
    }
    settings.sort();
    Ok(settings)
}

#[cfg(test)]
mod tests;

//! From the OCI runtime specification to a [`Plan`](crate::plan): pure, without I/O.
//!
//! The specification comes from an image and its user and is hostile. Each field is either honoured, or refused with
//! its name and value, or, where containerd's own defaults always contain it and a pod in its own machine loses
//! nothing, accepted with a note for the log. Nothing is dropped in silence.
//!
//! - this file: the document as a whole, names, paths;
//! - [`process`]: the `process` object, which Exec sends alone;
//! - [`scheduling`]: when and where a process runs;
//! - [`namespaces`]: namespaces, id mappings, clock offsets;
//! - [`hooks`]: programs that run on the way;
//! - [`mounts`]: mounts; `options`: the words about them;
//! - [`devices`]: `linux.devices` and the nodes that every container has;
//! - [`resources`]: `linux.resources` as cgroup v2 files and device rules;
//! - `seccomp`: `linux.seccomp` as a filter.

pub mod devices;
mod document;
pub mod hooks;
pub mod mounts;
pub mod namespaces;
mod options;
pub mod process;
pub mod resources;
pub mod scheduling;
mod seccomp;

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use caisson_oci::FieldError;
use oci_spec::runtime::{Linux, LinuxPersonalityDomain};

use crate::{
    idmap::IdMaps,
    plan::{AffinityPlan, HookPlans, HookState, MountSource, NamespaceKind, NamespacePlan, ProcessPlan, View},
};

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

impl From<FieldError> for SpecError {
    fn from(error: FieldError) -> Self {
        Self { field: error.field, problem: error.message }
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
    /// Which namespaces are its own.
    pub namespaces: NamespacePlan,
    /// Programs of its root file system to run on the way.
    pub hooks: HookPlans,
    /// What was accepted without effect, for the log.
    pub notes: Vec<String>,
}

/// What the request says beside the specification.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// The container's name.
    pub id: String,
    /// The caller's wish; it overrides `process.terminal`.
    pub terminal: bool,
    /// For bind mounts, by their place in `mounts`: the source below the shared directory.
    pub binds: BTreeMap<usize, PathBuf>,
    /// The namespaces of other containers that answer a `path`.
    pub joins: Vec<NamespaceKind>,
    /// What the users of a joined user namespace are.
    pub ids: IdMaps,
}

/// Reads a whole specification (config.json).
///
/// # Errors
/// The first field that cannot be honoured.
pub fn container(json: &[u8], answers: &Answers) -> Result<Accepted> {
    let spec: document::Document = parse("spec", json)?;
    let mut notes = Vec::new();
    let linux = spec.linux.as_ref().ok_or_else(|| SpecError::new("linux", "missing"))?;

    refuse("solaris", spec.solaris)?;
    refuse("windows", spec.windows)?;
    refuse("vm", spec.vm)?;
    refuse("zos", spec.zos)?;
    check_linux(linux, &mut notes)?;
    let namespaces = namespaces::plan(linux, &answers.joins, &answers.ids, &mut notes)?;
    let about = HookState {
        oci_version: spec.oci_version.unwrap_or_default(),
        id: answers.id.clone(),
        annotations: spec.annotations.unwrap_or_default(),
    };
    let hooks = hooks::plan(spec.hooks.as_ref(), about)?;

    let process = spec.process.as_ref().ok_or_else(|| SpecError::new("process", "missing"))?;
    let inherited = process::Inherited { personality: personality(linux)?, ..Default::default() };
    let mut process = process::plan("process", process, answers.terminal, &inherited, &mut notes)?;
    process.seccomp = linux.seccomp().as_ref().map(|profile| seccomp::plan(profile, &mut notes)).transpose()?;
    // It is for an exec alone, as its name says.
    process.affinity = AffinityPlan::default();
    let mounts = mounts::plan(spec.mounts.as_deref().unwrap_or_default(), &answers.binds, &namespaces, &mut notes)?;
    let devices = devices::plan(linux.devices().as_deref().unwrap_or_default())?;
    let resources = resources::plan(linux.resources().as_ref(), &resources::Present::default(), &mut notes)?;
    let view = View {
        hostname: name("hostname", &spec.hostname, &namespaces)?,
        domainname: name("domainname", &spec.domainname, &namespaces)?,
        sysctl: sysctl(linux)?,
        foreign_dev: mounts
            .iter()
            .any(|mount| matches!(mount.source, MountSource::Bind { .. }) && mount.destination == Path::new("/dev")),
        mounts,
        devices,
        masked_paths: paths("linux.maskedPaths", linux.masked_paths().as_deref())?,
        readonly_paths: paths("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
        readonly_root: spec.root.as_ref().and_then(|root| root.readonly()).unwrap_or(false),
        root_propagation: root_propagation(linux)?,
    };
    Ok(Accepted { view, process, namespaces, hooks, resources, notes })
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
    refuse("linux.netDevices", linux.net_devices().as_ref().filter(|map| !map.is_empty()))?;
    refuse("linux.intelRdt", linux.intel_rdt().as_ref())?;
    refuse("linux.memoryPolicy", linux.memory_policy().as_ref())?;
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        notes.push("linux.mountLabel has no effect: the guest runs without SELinux".into());
    }
    Ok(())
}

/// The execution domain in the numbers of include/uapi/linux/personality.h.
fn personality(linux: &Linux) -> Result<Option<u32>> {
    let Some(personality) = linux.personality() else { return Ok(None) };
    // The specification names no flag yet.
    refuse("linux.personality.flags", personality.flags().as_ref().filter(|flags| !flags.is_empty()))?;
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

fn root_propagation(linux: &Linux) -> Result<Option<u32>> {
    match linux.rootfs_propagation().as_deref() {
        // Whatever happens to the guest's own mounts later, nothing of it concerns a container.
        None | Some("") => Ok(None),
        Some(word) => mounts::propagation(word).map(Some).ok_or_else(|| {
            let words = "private, slave, shared, unbindable, or one of these with an r before it";
            SpecError::new("linux.rootfsPropagation", format!("{word:?} is not one of {words}"))
        }),
    }
}

fn name(field: &str, value: &Option<String>, namespaces: &NamespacePlan) -> Result<Option<String>> {
    // 64 is __NEW_UTS_LEN of include/uapi/linux/utsname.h.
    match value.as_deref() {
        None | Some("") => Ok(None),
        Some(name) if name.len() > 64 => Err(SpecError::new(field, format!("{name:?} is longer than 64 bytes"))),
        Some(name) if namespaces.joins(NamespaceKind::Uts) => {
            Err(SpecError::new(field, format!("{name:?} would rename the container whose uts namespace is joined")))
        }
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

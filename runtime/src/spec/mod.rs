//! The bundle's config.json, as far as the host must understand it: whether it is one at all, where the root file
//! system lies if containerd passes none, what the host does for it (limits, bind mounts, hooks), and whether it asks
//! for something of the host that a machine of its own cannot have. All of that is known before a machine starts.
//! Everything else is the agent's to apply or refuse. Nothing in it is trusted: it comes with an image.

pub mod binds;
pub mod devices;
pub mod hooks;
pub mod namespaces;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use caisson_protos::agent::JoinedNamespace;
use oci_spec::runtime::Spec;
use serde_json::Value;

use crate::{
    network::{Namespace, NamespaceError},
    resources::{guest::translate, size::MachineSize},
};
use binds::Bind;
use caisson_oci::{FieldError, Limits};
use devices::Devices;
use hooks::Hooks;
use namespaces::Namespaces;

/// The largest config.json, bytes; the agent takes no more.
pub const MAX_SIZE: u64 = 1 << 20;

/// A config.json that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It is too large.
    #[error("{0} is larger than {MAX_SIZE} bytes")]
    TooLarge(PathBuf),
    /// It is not an OCI runtime specification.
    #[error("{path} is not an OCI runtime specification: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where there is one.
        message: String,
    },
    /// A part that must be there is not, or cannot be what it is.
    #[error("{path}: {field}: {message}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Which.
        field: String,
        /// What is wrong with it.
        message: String,
    },
}

/// What the host needs of a config.json. The default asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BundleSpec {
    /// Where it was read.
    path: PathBuf,
    /// The file, for the agent.
    pub json: Vec<u8>,
    /// Its version and annotations, for hooks.
    pub version: String,
    /// See `version`.
    pub annotations: BTreeMap<String, String>,
    /// The bundle's own root directory.
    pub rootfs: PathBuf,
    /// How willingly the host may kill the pod when memory is short, -1000 (never) to 1000.
    pub oom_score_adj: i32,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// `linux.resources`.
    pub asked: Limits,
    /// Bind mounts.
    pub binds: Vec<Bind>,
    /// Namespaces of the pod.
    pub namespaces: Namespaces,
    /// Programs to run on the host.
    pub hooks: Hooks,
    /// Devices.
    pub devices: Devices,
}

impl BundleSpec {
    /// Reads and checks `bundle`/config.json.
    ///
    /// # Errors
    /// See [`SpecError`].
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        // Most are smaller than this, and then one read takes it all.
        let mut json = Vec::with_capacity(16 * 1024);
        File::open(&path)
            .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut json))
            .map_err(|source| SpecError::Read { path: path.clone(), source })?;
        if json.len() as u64 > MAX_SIZE {
            return Err(SpecError::TooLarge(path));
        }
        let malformed =
            |error: serde_json::Error| SpecError::Malformed { path: path.clone(), message: error.to_string() };
        let spec: Spec = match serde_json::from_slice(&json) {
            Ok(spec) => spec,
            Err(error) => {
                json = without_empty_seccomp(&json).ok_or_else(|| malformed(error))?;
                serde_json::from_slice(&json).map_err(malformed)?
            }
        };
        let checked = Self::check(&spec, bundle, path.clone());
        let mut read = checked.map_err(|FieldError { field, message }| SpecError::Field { path, field, message })?;
        read.json = json;
        Ok(read)
    }

    fn check(spec: &Spec, bundle: &Path, path: PathBuf) -> Result<Self, FieldError> {
        if !spec.version().starts_with("1.") {
            return Err(FieldError::new("ociVersion", "must be 1.x"));
        }
        let process = spec.process().as_ref().ok_or_else(|| FieldError::new("process", "is missing"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(FieldError::new("process.args", "must name a program"));
        }
        if !process.cwd().is_absolute() {
            return Err(FieldError::new("process.cwd", "must be an absolute path"));
        }
        let namespaces = namespaces::check(spec)?;
        let devices = devices::check(spec)?;
        let binds = binds::check(spec, bundle)?;
        let hooks = hooks::check(spec)?;
        let root = spec.root().as_ref().ok_or_else(|| FieldError::new("root", "is missing"))?;
        let linux = spec.linux().as_ref();
        let asked = linux.and_then(|linux| linux.resources().as_ref()).map(Limits::of).transpose()?.unwrap_or_default();
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_ref());
        Ok(Self {
            path,
            json: Vec::new(),
            version: spec.version().clone(),
            annotations: spec.annotations().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
            rootfs: bundle.join(root.path()),
            oom_score_adj: process.oom_score_adj().unwrap_or(0).clamp(-1000, 1000),
            cgroups_path: cgroups_path.map(|path| path.to_string_lossy().into_owned()),
            asked,
            binds,
            namespaces,
            hooks,
            devices,
        })
    }

    /// Whether a pod that begins with this container has bind mounts: its own, or those of the containers that
    /// Kubernetes puts beside it.
    pub fn wants_host_share(&self) -> bool {
        let kind = self.annotations.get("io.kubernetes.cri.container-type");
        !self.binds.is_empty() || kind.is_some_and(|kind| kind == "sandbox")
    }

    /// Checks what only the pod's first container must not have: there is nobody yet whose namespace it could join.
    ///
    /// # Errors
    /// [`SpecError::Field`].
    pub fn check_first(&self) -> Result<(), SpecError> {
        self.joined(0, "").map(drop)
    }

    /// The namespaces of the pod's first container that this one joins; `pid` is the pid of its task.
    ///
    /// # Errors
    /// [`SpecError::Field`] if a path names another process.
    pub fn joined(&self, pid: u32, container: &str) -> Result<Vec<JoinedNamespace>, SpecError> {
        let join = |join: &namespaces::Join| {
            if join.pid != pid {
                let message =
                    format!("PID {} is not in this pod: only namespaces of its containers can be joined", join.pid);
                return Err(self.refused(join.kind, message));
            }
            let (type_, container_id) = (join.kind.to_owned(), container.to_owned());
            Ok(JoinedNamespace { type_, container_id, ..JoinedNamespace::default() })
        };
        self.namespaces.joins.iter().map(join).collect()
    }

    /// Opens the pod's network namespace, if there is one already.
    ///
    /// # Errors
    /// [`SpecError::Field`] if the path leads to none that a pod can have.
    pub fn open_network(&self) -> Result<Option<Namespace>, SpecError> {
        let open = |path: &PathBuf| {
            let refused = |error: NamespaceError| self.refused("network", format!("{path:?} {error}"));
            Namespace::open(path).map_err(refused)
        };
        self.namespaces.network.as_ref().map(open).transpose()
    }

    /// Checks that the network namespace of a later container of the pod is the pod's.
    ///
    /// # Errors
    /// [`SpecError::Field`] if it is another, or none.
    pub fn check_network(&self, pods: &Namespace) -> Result<(), SpecError> {
        let (Some(path), Some(named)) = (&self.namespaces.network, self.open_network()?) else { return Ok(()) };
        if matches!((named.identity(), pods.identity()), (Ok(named), Ok(pods)) if named == pods) {
            return Ok(());
        }
        let message =
            format!("{path:?} is not the network namespace of this pod: all containers of a pod have the same");
        Err(self.refused("network", message))
    }

    fn refused(&self, kind: &str, message: String) -> SpecError {
        SpecError::Field { path: self.path.clone(), field: namespaces::field(kind), message }
    }

    /// The specification for the agent in a machine of this size: without what only the host can do.
    ///
    /// # Errors
    /// [`SpecError::Malformed`] never for a file that was read.
    pub fn for_guest(&self, size: MachineSize) -> Result<Vec<u8>, SpecError> {
        let asked = &self.asked;
        let has_numbers = asked.cpus.is_some() || asked.mems.is_some() || !asked.io.is_empty();
        if !has_numbers && self.devices.is_complete() && self.namespaces.network.is_none() {
            return Ok(self.json.clone());
        }
        let malformed =
            |error: serde_json::Error| SpecError::Malformed { path: self.path.clone(), message: error.to_string() };
        let mut spec: Value = serde_json::from_slice(&self.json).map_err(malformed)?;
        let mut changed = false;
        if let Some(linux) = spec.get_mut("linux") {
            if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
                changed |= translate(resources, asked, size);
            }
            changed |= !self.devices.is_complete();
            self.devices.leave_out(linux);
            changed |= namespaces::leave_out_network_path(linux);
        }
        if changed { serde_json::to_vec(&spec).map_err(malformed) } else { Ok(self.json.clone()) }
    }
}

/// A specification whose `linux.seccomp` says nothing, neither a default nor a rule, without it: to runc that is no
/// profile, to the specification a mistake. None if it is no such one.
fn without_empty_seccomp(json: &[u8]) -> Option<Vec<u8>> {
    let mut spec: Value = serde_json::from_slice(json).ok()?;
    let linux = spec.get_mut("linux")?.as_object_mut()?;
    let seccomp = linux.get("seccomp")?.as_object()?;
    let says_nothing = seccomp.get("defaultAction").is_none_or(|action| action == "")
        && seccomp.get("syscalls").and_then(Value::as_array).is_none_or(Vec::is_empty);
    says_nothing.then(|| linux.remove("seccomp"))?;
    serde_json::to_vec(&spec).ok()
}

#[cfg(test)]
mod tests;

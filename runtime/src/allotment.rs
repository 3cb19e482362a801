//! What a pod has of its host: a machine of a size that does not change, and a cgroup. Made before the machine is launched, gone when
//! the pod is.

use std::path::Path;

use caisson_protos::agent::UpdateRequest;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;

use crate::{
    cgroup::{
        CgroupError, HostCgroup,
        limits::{Overhead, settings},
    },
    resources::{Asked, ResourceError, guest::translate, size::MachineSize},
};

/// Changed limits that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AllotmentError {
    /// They are no `linux.resources` object.
    #[error("the resources are none: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The machine is not as large, or a value is none.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The host's kernel refused.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// See the module's introduction.
#[derive(Debug)]
pub struct Allotment {
    size: MachineSize,
    overhead: Overhead,
    cgroup: HostCgroup,
}

/// Changed limits that the pod's machine can have.
#[derive(Debug)]
pub struct Change {
    asked: Asked,
    /// For the agent: `linux.resources` as JSON.
    pub for_guest: Vec<u8>,
}

impl Change {
    /// The agent's part of it.
    pub fn request(&self, container: &str) -> UpdateRequest {
        UpdateRequest {
            container_id: container.to_owned(),
            resources: self.for_guest.clone(),
            ..UpdateRequest::default()
        }
    }
}

impl Allotment {
    /// Makes the cgroup at `directory` below the hierarchy at `mount`, for a machine of this size and with the limits that are asked.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn new(
        size: MachineSize,
        overhead: Overhead,
        mount: &Path,
        directory: &Path,
        asked: &Asked,
    ) -> Result<Self, CgroupError> {
        let cgroup = HostCgroup::create(mount, directory, &settings(asked, size, overhead))?;
        Ok(Self { size, overhead, cgroup })
    }

    /// The machine's size.
    pub fn size(&self) -> MachineSize {
        self.size
    }

    /// The pod's cgroup.
    pub fn cgroup(&self) -> &HostCgroup {
        &self.cgroup
    }

    /// Reads changed limits (a `linux.resources` object as JSON), as Task.Update gets them. Nothing is changed yet: the agent's part
    /// comes first, because it is the one that may refuse, then [`Self::apply`].
    ///
    /// # Errors
    /// [`AllotmentError`] names the field, the value and the machine's size.
    pub fn change(&self, resources: &[u8]) -> Result<Change, AllotmentError> {
        let parsed: LinuxResources = serde_json::from_slice(resources)?;
        let asked = Asked::of(&parsed)?;
        self.size.check(&asked)?;
        let mut value: Value = serde_json::from_slice(resources)?;
        let changed = value.as_object_mut().is_some_and(|map| translate(map, &asked, self.size));
        let for_guest = if changed { serde_json::to_vec(&value)? } else { resources.to_vec() };
        Ok(Change { asked, for_guest })
    }

    /// Changes the host's limits of the pod.
    ///
    /// # Errors
    /// [`AllotmentError::Cgroup`].
    pub fn apply(&self, change: &Change) -> Result<(), AllotmentError> {
        Ok(self.cgroup.apply(&settings(&change.asked, self.size, self.overhead))?)
    }

    /// Removes the cgroup, once its processes are gone.
    ///
    /// # Errors
    /// If something stays in it.
    pub fn end(self) -> Result<(), CgroupError> {
        self.cgroup.remove()
    }
}

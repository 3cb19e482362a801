//! What a pod has of its host: a machine of a size that does not change, and a cgroup. Made before the machine is
//! launched, gone when the pod is.

use std::{fs, path::Path};

use caisson_oci::{CpuTime, FieldError, Limits};
use caisson_protos::agent::UpdateRequest;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;

use crate::{
    cgroup::{
        CgroupError, HostCgroup,
        limits::{Overhead, settings},
    },
    resources::{guest::translate, size::MachineSize},
};

/// Changed limits that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AllotmentError {
    /// They are no `linux.resources` object.
    #[error("invalid linux.resources: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The machine is not as large, or a value is invalid.
    #[error(transparent)]
    Resource(#[from] FieldError),
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
    asked: Limits,
    /// The processor time that the container has now.
    present: CpuTime,
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
    /// Makes the cgroup at `directory` below the hierarchy at `mount`, for a machine of this size and with the limits
    /// that are asked.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn new(
        size: MachineSize,
        overhead: Overhead,
        mount: &Path,
        directory: &Path,
        asked: &Limits,
    ) -> Result<Self, CgroupError> {
        let cgroup = HostCgroup::create(mount, directory, &settings(asked, CpuTime::DEFAULT, size, overhead))?;
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

    /// Reads changed limits (a `linux.resources` object as JSON), as Task.Update gets them. Nothing is changed yet: the
    /// agent's part comes first, because it is the one that may refuse, then [`Self::apply`].
    ///
    /// # Errors
    /// [`AllotmentError`] names the field, the value and the machine's size.
    pub fn change(&self, resources: &[u8]) -> Result<Change, AllotmentError> {
        let parsed: LinuxResources = serde_json::from_slice(resources)?;
        let asked = Limits::of(&parsed)?;
        let file = fs::read_to_string(self.cgroup.path().join("cpu.max")).unwrap_or_default();
        let present = self.overhead.taken_from(CpuTime::of_file(&file));
        self.size.check(&asked, asked.time_over(present))?;
        let mut value: Value = serde_json::from_slice(resources)?;
        let changed = value.as_object_mut().is_some_and(|map| translate(map, &asked, self.size));
        let for_guest = if changed { serde_json::to_vec(&value)? } else { resources.to_vec() };
        Ok(Change { asked, present, for_guest })
    }

    /// Changes the host's limits of the pod.
    ///
    /// # Errors
    /// [`AllotmentError::Cgroup`].
    pub fn apply(&self, change: &Change) -> Result<(), AllotmentError> {
        Ok(self.cgroup.apply(&settings(&change.asked, change.present, self.size, self.overhead))?)
    }

    /// Removes the cgroup, once its processes are gone.
    ///
    /// # Errors
    /// If something stays in it.
    pub fn end(self) -> Result<(), CgroupError> {
        self.cgroup.remove()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cgroup::tests::Place;

    fn allotment(place: &Place) -> Allotment {
        let size = MachineSize { vcpus: 2, memory: 256 << 20 };
        let overhead = Overhead { memory: 128 << 20, cpu_millis: 250 };
        Allotment::new(size, overhead, &place.mount, &place.directory, &Limits::default()).unwrap()
    }

    #[test]
    fn a_change_is_for_the_guest_in_its_own_numbers() {
        let place = Place::new("change");
        let allotment = allotment(&place);
        let resources = json!({ "cpu": { "cpus": "6-7", "quota": 200_000 }, "memory": { "limit": 256 << 20 } });
        let change = allotment.change(resources.to_string().as_bytes()).unwrap();
        let mut guests = resources.clone();
        guests["cpu"]["cpus"] = json!("0-1");
        let request = change.request("one");
        assert_eq!(request.container_id, "one");
        assert_eq!(serde_json::from_slice::<Value>(&request.resources).unwrap(), guests);
        let plain = br#" {"pids":{"limit":5}}"#;
        assert_eq!(allotment.change(plain).unwrap().for_guest, plain, "as it came");
    }

    #[test]
    fn a_change_beyond_the_machine_or_of_no_sense_is_refused_by_name() {
        let place = Place::new("beyond");
        let allotment = allotment(&place);
        for (json, words) in [
            (json!({ "memory": { "limit": 257 << 20 } }), ["linux.resources.memory.limit", "269484032", "256 MiB"]),
            (json!({ "cpu": { "quota": 200_001 } }), ["linux.resources.cpu.quota", "200001", "(2)"]),
            (json!({ "cpu": { "cpus": "two" } }), ["linux.resources.cpu.cpus", "\"two\"", "list"]),
            (json!([1]), ["invalid linux.resources", "", ""]),
        ] {
            let message = allotment.change(json.to_string().as_bytes()).unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
    }

    #[test]
    fn the_hosts_part_is_applied_to_the_pods_cgroup_which_goes_at_the_end() {
        let place = Place::new("apply");
        let allotment = allotment(&place);
        let none = allotment.change(br#"{"memory":{"limit":-1},"pids":{"limit":-1},"cpu":{"quota":-1}}"#).unwrap();
        allotment.apply(&none).expect("no limit needs no controller");
        // Which controllers this machine has in version 2 differs; either the limit is there or the missing one is
        // named.
        let limits = allotment.change(br#"{"pids":{"limit":100}}"#).unwrap();
        match allotment.apply(&limits) {
            Ok(()) => assert_eq!(std::fs::read_to_string(place.path().join("pids.max")).unwrap(), "134\n"),
            Err(error) => assert!(error.to_string().contains("no controller pids"), "{error}"),
        }
        allotment.end().unwrap();
        assert!(!place.path().exists());
    }
}

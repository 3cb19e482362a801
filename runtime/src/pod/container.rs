//! What is asked of a container as a whole.

use caisson_protos::agent::ContainerRequest;
use containerd_shim_protos::{api::ProcessInfo, shim::oci::ProcessDetails};
use protobuf::{Message, MessageField, MessageFull, well_known_types::any::Any};

use super::{Pod, limited};
use crate::{errors::TaskError, flags::is_identifier};

impl Pod {
    /// Task.Pids.
    ///
    /// # Errors
    /// NOT_FOUND, UNAVAILABLE.
    pub async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, TaskError> {
        self.tasks().container(id)?;
        let machine = self.machine.get()?;
        let request = ContainerRequest { container_id: id.to_owned(), ..ContainerRequest::default() };
        let response = self.agent_call("Pids", machine.agent.pids(limited(), &request)).await?;
        let info = |process: caisson_protos::agent::ProcessInfo| {
            let mut info = ProcessInfo { pid: process.pid, ..ProcessInfo::default() };
            if is_identifier(&process.exec_id) {
                let details = ProcessDetails { exec_id: process.exec_id, ..ProcessDetails::default() };
                let type_url = ProcessDetails::descriptor().full_name().to_owned();
                let value = details.write_to_bytes().unwrap_or_default();
                info.info = MessageField::some(Any { type_url, value, ..Any::default() });
            }
            info
        };
        Ok(response.processes.into_iter().map(info).collect())
    }
}

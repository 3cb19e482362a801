//! What is asked of a container as a whole: pause and resume it, change its limits, count what it uses, list its processes.

use std::time::Duration;

use caisson_protos::agent::{PidsResponse, UpdateRequest};
use containerd_shim_protos::{
    api::{ProcessInfo, UpdateTaskRequest},
    shim::oci::ProcessDetails,
};
use protobuf::{Message, MessageFull, well_known_types::any::Any};
use ttrpc::{Code, context::with_duration};

use super::{Pod, container_request, lock, no_deadline};
use crate::{
    pod::{metrics, tasks::Name, update},
    shim::errors::TaskError,
};

/// How long a container whose Pause was not answered may take to go on.
const UNDO_LIMIT: Duration = Duration::from_secs(10);
/// Most processes that are listed; a guest's kernel has no more pids than this unless somebody raised kernel.pid_max.
const MAX_PIDS: usize = 1 << 16;
/// The largest answer to Pids, bytes: that many processes, and the names of a thousand execs.
const MAX_PIDS_BYTES: usize = 512 << 10;
/// The largest answer to Stats, bytes. A real one has about 5 KiB.
const MAX_STATS: usize = 64 << 10;

impl Pod {
    /// Task.Pause.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION if it does not run, or why it cannot be.
    pub async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let init = Name::new(id, "");
        self.tasks().entry(&init)?.process.begin_pause()?;
        let paused = self.pause_in_guest(id).await;
        let mut tasks = self.tasks();
        match paused {
            Ok(()) => tasks.paused(id),
            Err(error) => {
                tasks.entry(&init)?.process.pause_failed();
                Err(error)
            }
        }
    }

    async fn pause_in_guest(&self, id: &str) -> Result<(), TaskError> {
        let (machine, request) = (self.machine.get()?, container_request(id));
        let paused = self.agent_call("Pause", machine.agent.pause(no_deadline(), &request)).await;
        if paused.as_ref().is_err_and(|error| error.silence().is_some() || error.code() == Code::UNAVAILABLE) {
            // Nobody knows how far it came: it must not stand still while everybody thinks that it runs.
            let _ = machine.agent.resume(with_duration(UNDO_LIMIT), &request).await;
        }
        paused.map(drop)
    }

    /// Task.Resume.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION if it is not paused, or why it cannot be.
    pub async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let init = Name::new(id, "");
        self.tasks().entry(&init)?.process.begin_resume()?;
        let resumed = match self.machine.get() {
            Ok(machine) => {
                let request = container_request(id);
                self.agent_call("Resume", machine.agent.resume(no_deadline(), &request)).await
            }
            Err(error) => Err(error),
        };
        let mut tasks = self.tasks();
        match resumed {
            Ok(_) => tasks.resumed(id),
            Err(error) => {
                tasks.entry(&init)?.process.resume_failed();
                Err(error)
            }
        }
    }

    /// Task.Update.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION if it has ended, INVALID_ARGUMENT, or why a kernel refuses.
    pub async fn update(&self, request: &UpdateTaskRequest) -> Result<(), TaskError> {
        self.tasks().entry(&Name::new(&request.id, ""))?.process.check_update()?;
        let resources = update::resources(request.resources.as_ref())?;
        // The guest's part first: it is the one that may refuse.
        let change = lock(&self.allotment).as_ref().map(|allotment| allotment.change(resources)).transpose()?;
        let update = match &change {
            Some(change) => change.request(&request.id),
            None => {
                let (container_id, resources) = (request.id.clone(), resources.to_vec());
                UpdateRequest { container_id, resources, ..UpdateRequest::default() }
            }
        };
        let machine = self.machine.get()?;
        self.agent_call("Update", machine.agent.update(no_deadline(), &update)).await?;
        if let (Some(allotment), Some(change)) = (lock(&self.allotment).as_ref(), &change) {
            allotment.apply(change)?;
        }
        Ok(())
    }

    /// Task.Stats.
    ///
    /// # Errors
    /// NOT_FOUND, UNAVAILABLE.
    pub async fn stats(&self, id: &str) -> Result<Any, TaskError> {
        self.tasks().container(id)?;
        let (machine, request) = (self.machine.get()?, container_request(id));
        let stats = machine.call_bounded("Stats", &request, MAX_STATS);
        metrics::packed(&self.agent_call("Stats", stats).await?)
    }

    /// Task.Pids: pids in the guest, and the names of the execs among them.
    ///
    /// # Errors
    /// NOT_FOUND, UNAVAILABLE.
    pub async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, TaskError> {
        self.tasks().container(id)?;
        let (machine, request) = (self.machine.get()?, container_request(id));
        let pids = machine.call_bounded::<PidsResponse>("Pids", &request, MAX_PIDS_BYTES);
        let listed = self.agent_call("Pids", pids).await?;
        let tasks = self.tasks();
        let info = |process: caisson_protos::agent::ProcessInfo| {
            let mut info = ProcessInfo { pid: process.pid, ..ProcessInfo::default() };
            // Of the guest's names only those count that were given to it.
            if tasks.has_exec(id, &process.exec_id) {
                info.info = details(process.exec_id).into();
            }
            info
        };
        Ok(listed.processes.into_iter().take(MAX_PIDS).map(info).collect())
    }
}

fn details(exec_id: String) -> Option<Any> {
    let details = ProcessDetails { exec_id, ..ProcessDetails::default() };
    let value = details.write_to_bytes().ok()?;
    Some(Any { type_url: ProcessDetails::descriptor().full_name().to_owned(), value, ..Any::default() })
}

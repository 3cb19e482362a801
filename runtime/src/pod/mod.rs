//! A pod: its machine, its containers, and what each task request does to them. Requests that change something run in
//! tasks of their own ([`crate::service`]), so a client that hangs up never leaves one half done; what a failed request
//! has made is dropped, and dropping undoes it.

mod container;
mod create;
mod delete;
pub mod hooks;
mod oom;
mod process;

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_protos::agent::{ContainerRequest, ProcessRequest};
use containerd_shim_protos::api::StateResponse;
use slog::{Logger, error};
use tokio::{sync::watch, time::timeout};
use ttrpc::context::{Context, with_duration};

pub use self::delete::DRAIN_LIMIT;
use crate::{
    allotment::Allotment,
    errors::TaskError,
    events::Publisher,
    host_view::HostView,
    lifecycle::{Exit, Status},
    machine::MachineHandle,
    share::Share,
    spec::BundleSpec,
    tasks::{Name, Tasks},
    timeline::Timeline,
};

/// How long the agent may take for one call. A call that takes this long hangs.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long the machine's end may take to be understood after the agent's connection broke.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the daemon has made for a pod before it serves. What is missing could not be had: then there is no machine
/// either.
#[derive(Debug, Default)]
pub struct Provision {
    /// The shared directory.
    pub share: Option<Share>,
    /// The bundle's spec, and the id of the container that it is for.
    pub spec: Option<(String, BundleSpec)>,
    /// The host's mount namespace.
    pub host: Option<HostView>,
    /// The machine's size and the pod's cgroup.
    pub allotment: Option<Allotment>,
    /// Whether the guest can have bind mounts.
    pub has_host_share: bool,
    /// What is wrong with the spec: the answer to Create.
    pub refused: Option<String>,
}

/// What a pod is made of.
pub struct Pod {
    machine: MachineHandle,
    /// None: the launch failed before there was one, and the machine is lost.
    share: Mutex<Option<Share>>,
    /// None: likewise, or the pod has ended.
    allotment: Mutex<Option<Allotment>>,
    host: Option<HostView>,
    has_host_share: bool,
    refused: Option<String>,
    tasks: Mutex<Tasks<Publisher>>,
    /// The bundle's spec as it was read at the start, for the container that the pod was started for.
    spec: Mutex<Option<(String, BundleSpec)>>,
    /// The first container that was created: the one whose namespaces others of the pod may join.
    first: OnceLock<String>,
    /// How long output may stand still before Delete gives it up.
    drain_limit: Duration,
    timeline: Arc<Timeline>,
    log: Logger,
    ended: watch::Sender<bool>,
}

fn limited() -> Context {
    with_duration(CALL_LIMIT)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn container_request(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..ContainerRequest::default() }
}

fn process_request(name: &Name) -> ProcessRequest {
    ProcessRequest { container_id: name.container.clone(), exec_id: name.exec.clone(), ..ProcessRequest::default() }
}

impl Pod {
    /// A pod on a machine that may still be booting.
    pub fn new(
        machine: MachineHandle,
        provision: Provision,
        events: Publisher,
        drain_limit: Duration,
        timeline: Arc<Timeline>,
        log: Logger,
    ) -> Arc<Self> {
        let pod = Arc::new(Self {
            machine,
            share: Mutex::new(provision.share),
            allotment: Mutex::new(provision.allotment),
            host: provision.host,
            has_host_share: provision.has_host_share,
            refused: provision.refused,
            tasks: Mutex::new(Tasks::new(events)),
            spec: Mutex::new(provision.spec),
            first: OnceLock::new(),
            drain_limit,
            timeline,
            log,
            ended: watch::Sender::new(false),
        });
        tokio::spawn(Arc::clone(&pod).watch_machine());
        pod
    }

    async fn watch_machine(self: Arc<Self>) {
        self.machine.lost().await;
        self.tasks().machine_lost(SystemTime::now());
    }

    fn tasks(&self) -> MutexGuard<'_, Tasks<Publisher>> {
        lock(&self.tasks)
    }

    /// The answer of the agent or, if the machine ends first, why it did.
    async fn agent_call<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, TaskError> {
        tokio::select! {
            biased;
            answer = call => match answer {
                Ok(answer) => Ok(answer),
                Err(error) => {
                    let error = TaskError::from_agent(name, &error);
                    if error.code() == ttrpc::Code::UNAVAILABLE {
                        // The connection breaks a moment before the machine's end is understood.
                        let lost = timeout(LAST_WORDS, self.machine.lost()).await;
                        return Err(lost.map_or(error, |reason| TaskError::unavailable(reason.as_ref())));
                    }
                    Err(error)
                }
            },
            reason = self.machine.lost() => Err(TaskError::unavailable(reason.as_ref())),
        }
    }

    /// Task.State.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn state(&self, name: &Name) -> Result<StateResponse, TaskError> {
        self.tasks().state(name)
    }

    /// Task.Wait.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub async fn wait(&self, name: &Name) -> Result<Exit, TaskError> {
        let exit = self.tasks().wait(name)?;
        exit.await
    }

    /// The pid of a container's init process as containerd knows it, 0 if there is none.
    pub fn pid(&self, id: &str) -> u32 {
        self.tasks().pid(&Name::new(id, ""))
    }

    /// Whether the pod has a container, be it one that is only being created.
    ///
    /// # Errors
    /// NOT_FOUND if it has none.
    pub fn check_occupied(&self) -> Result<(), TaskError> {
        if self.tasks().is_empty() {
            return Err(TaskError::not_found("the pod has no container"));
        }
        Ok(())
    }

    /// Whether a process is there and has not ended.
    fn is_alive(&self, name: &Name) -> bool {
        self.tasks().entry(name).is_ok_and(|entry| entry.process.status() != Status::Stopped)
    }

    /// Task.Shutdown: ends the pod if it has no container any more, or in any case if `now`.
    pub async fn shutdown(&self, now: bool) {
        if !now && !self.tasks().is_empty() {
            return;
        }
        self.machine.stop().await;
        self.end_streams().await;
        drop(lock(&self.share).take());
        let allotment = lock(&self.allotment).take();
        if let Some(allotment) = allotment {
            // It may have to wait for what somebody else has put into the cgroup.
            let removed = tokio::task::spawn_blocking(move || allotment.end()).await;
            if let Ok(Err(error)) = removed {
                error!(self.log, "the pod left something behind"; "what" => "cgroup", "error" => %error);
            }
        }
        self.ended.send_replace(true);
    }

    /// Waits for the pod's end.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

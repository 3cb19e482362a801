//! A pod: its machine, its containers, and what each task request does to them. Requests that change something run in
//! tasks of their own ([`crate::shim::service`]), so a client that hangs up never leaves one half done; what a failed request
//! has made is dropped, and dropping undoes it.

mod container;
mod create;
mod delete;
mod hooks;
pub mod lifecycle;
pub mod metrics;
pub mod network;
mod oom;
mod process;
pub mod tasks;
pub mod update;

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_protos::agent::{ContainerRequest, ProcessRequest};
use containerd_shim_protos::api::StateResponse;
use slog::{Logger, error};
use tokio::{sync::watch, time::timeout};
use ttrpc::context::Context;

use crate::{
    host::namespaces::{HostView, on_own_thread},
    network::{TaskThread, forward},
    pod::{
        lifecycle::{Exit, Status},
        network::PodNetwork,
        tasks::{Name, Tasks},
    },
    rootfs::share::Share,
    shim::{
        errors::{Silence, TaskError},
        events::Publisher,
    },
    spec::BundleSpec,
    vm::{allotment::Allotment, supervisor::MachineHandle, timeline::Timeline},
};

/// How long a pod waits for others.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the agent's answer to one call. One that takes this long hangs: the agent's own limits are shorter, but for the
    /// container's hooks, which come on top.
    pub call: Duration,
    /// For a killed process to end.
    pub kill: Duration,
    /// For output that its reader does not go on reading; ten seconds, as in containerd's own shim.
    pub drain: Duration,
    /// For the guest to write its files back when its pod is ended with containers in it; the agent gives up after ten seconds.
    pub write_back: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { call: seconds(75), kill: seconds(10), drain: seconds(10), write_back: seconds(15) }
    }
}

/// How long the machine's end may take to be understood after the agent's connection broke.
const LOSS_LIMIT: Duration = Duration::from_secs(2);

/// What the daemon has made for a pod before it serves.
#[derive(Debug)]
pub enum Provision {
    /// The specification asks for what cannot be: the answer to Create, and nothing was started.
    Refused(String),
    /// Something of the host failed, and the machine is lost for that reason.
    Failed,
    /// All is there.
    Ready(Box<Provisions>),
}

/// The container that a pod is started for.
#[derive(Debug)]
pub struct First {
    /// Its id.
    pub id: String,
    /// The bundle's spec.
    pub spec: BundleSpec,
    /// Its pid.
    pub task: TaskThread,
}

/// What a pod has of its host.
#[derive(Debug)]
pub struct Provisions {
    /// The shared directory.
    pub share: Share,
    /// The container that the pod is started for; a test's pod has none.
    pub first: Option<First>,
    /// The host's mount namespace.
    pub host: HostView,
    /// The machine's size and the pod's cgroup; a test's pod has none.
    pub allotment: Option<Allotment>,
    /// Whether the guest can have bind mounts.
    pub has_host_share: bool,
    /// Its network.
    pub network: PodNetwork,
}

/// What a pod is made of.
pub struct Pod {
    machine: MachineHandle,
    /// None: the launch failed before there was one, and the machine is lost.
    share: Mutex<Option<Arc<Share>>>,
    /// None: likewise, or the pod has ended.
    allotment: Mutex<Option<Allotment>>,
    host: Option<HostView>,
    has_host_share: bool,
    refused: Option<String>,
    tasks: Mutex<Tasks<Publisher>>,
    /// None: as with `share`.
    network: Option<PodNetwork>,
    /// The container that the pod was started for, until it is created.
    started_for: Mutex<Option<First>>,
    /// The first container that was created, and its pid: the one whose namespaces others of the pod may join.
    first: OnceLock<(String, u32)>,
    limits: Limits,
    timeline: Arc<Timeline>,
    log: Logger,
    ended: watch::Sender<bool>,
}

/// The agent is given no limit of its own: [`Pod::agent_call`] has it, so that a deadline cannot be taken for a lost
/// connection.
fn no_deadline() -> Context {
    Context::default()
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
        limits: Limits,
        timeline: Arc<Timeline>,
        log: Logger,
    ) -> Arc<Self> {
        let (refused, ready) = match provision {
            Provision::Refused(why) => (Some(why), None),
            Provision::Failed => (None, None),
            Provision::Ready(ready) => (None, Some(*ready)),
        };
        let has_host_share = ready.as_ref().is_some_and(|ready| ready.has_host_share);
        let (share, first, host, allotment, network) = match ready {
            Some(Provisions { share, first, host, allotment, network, .. }) => {
                (Some(Arc::new(share)), first, Some(host), allotment, Some(network))
            }
            None => (None, None, None, None, None),
        };
        let pod = Arc::new(Self {
            machine,
            share: Mutex::new(share),
            allotment: Mutex::new(allotment),
            host,
            has_host_share,
            refused,
            tasks: Mutex::new(Tasks::new(events)),
            network,
            started_for: Mutex::new(first),
            first: OnceLock::new(),
            limits,
            timeline,
            log,
            ended: watch::Sender::new(false),
        });
        tokio::spawn(Arc::clone(&pod).watch_machine());
        if let Some(network) = &pod.network {
            // While the machine boots.
            tokio::spawn(forward::run(network.namespace().clone(), pod.machine.clone(), pod.log.clone()));
        }
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
        self.agent_call_within(name, self.limits.call, call).await
    }

    /// The same for a call that may take longer.
    async fn agent_call_within<T>(
        &self,
        name: &'static str,
        limit: Duration,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, TaskError> {
        tokio::select! {
            biased;
            answer = timeout(limit, call) => {
                let Ok(answer) = answer else { return Err(TaskError::deadline(name)) };
                let error = match answer {
                    Ok(answer) => return Ok(answer),
                    Err(error) => TaskError::from_agent(name, &error),
                };
                if error.silence() == Some(Silence::Lost) {
                    // The connection breaks a moment before the machine's end is understood.
                    let lost = timeout(LOSS_LIMIT, self.machine.lost()).await;
                    return Err(lost.map_or(error, |reason| TaskError::lost(reason.as_ref())));
                }
                Err(error)
            },
            reason = self.machine.lost() => Err(TaskError::lost(reason.as_ref())),
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

    /// Forgets a process. With a container go its mounts, on a thread of its own: the end of an overlay writes files back.
    async fn remove(&self, name: &Name) {
        let removed = self.tasks().remove(name);
        if !name.exec.is_empty() {
            return;
        }
        if let Err(error) = on_own_thread("unmount", move || drop(removed)).await {
            error!(self.log, "cannot start a thread to unmount"; "container" => &name.container, "error" => %error);
        }
    }

    /// Whether a process is there and has not ended.
    fn is_alive(&self, name: &Name) -> bool {
        self.tasks().entry(name).is_ok_and(|entry| entry.process.status() != Status::Stopped)
    }

    /// Task.Shutdown: ends the pod if it has no container any more, or in any case if `now`.
    pub async fn shutdown(&self, now: bool) {
        let is_empty = self.tasks().is_empty();
        if !now && !is_empty {
            return;
        }
        if !is_empty && let Ok(machine) = self.machine.get() {
            // Deleted containers have written their files back; those that are still there do it now. The machine powers itself off.
            let request = caisson_protos::agent::Empty::new();
            let shutdown = machine.agent.shutdown(no_deadline(), &request);
            if let Err(error) = self.agent_call_within("Shutdown", self.limits.write_back, shutdown).await
                && error.silence() != Some(Silence::Lost)
            {
                error!(self.log, "the guest has not written its files back"; "error" => %error);
            }
        }
        self.machine.stop().await;
        self.end_network().await;
        self.end_streams().await;
        let (share, allotment) = (lock(&self.share).take(), lock(&self.allotment).take());
        let unmounted = on_own_thread("unmount", move || drop(share)).await;
        if let Err(error) = unmounted {
            error!(self.log, "cannot remove everything of the pod"; "what" => "mounts", "error" => %error);
        }
        if let Some(allotment) = allotment {
            // It may have to wait for what somebody else has put into the cgroup.
            let removed = on_own_thread("cgroup", move || allotment.end().map_err(|error| error.to_string())).await;
            if let Err(error) = removed.map_err(|error| error.to_string()).flatten() {
                error!(self.log, "cannot remove everything of the pod"; "what" => "cgroup", "error" => %error);
            }
        }
        self.ended.send_replace(true);
    }

    /// Waits for the pod's end.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

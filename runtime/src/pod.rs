//! A pod: its machine, its containers, and what each task request does to them. Requests that change something run in tasks
//! of their own ([`crate::service`]), so a client that hangs up never leaves one half done; what a failed request
//! has made is dropped, and dropping undoes it.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_protos::agent::{
    ContainerRequest, CreateRequest, ExecRequest, KillRequest, ProcessRequest, ResizePtyRequest, WaitResponse,
};
use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteResponse, ExecProcessRequest, ProcessInfo, StateResponse},
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskIO},
    shim::oci::ProcessDetails,
};
use protobuf::{Message, MessageField, MessageFull, well_known_types::any::Any};
use slog::{Logger, debug, error, warn};
use tokio::{sync::watch, time::timeout};
use ttrpc::context::{Context, with_duration};

use crate::{
    errors::TaskError,
    events::{Publisher, timestamp},
    flags::is_identifier,
    lifecycle::{Exit, KILLED, Status},
    machine::{Machine, MachineHandle},
    mount::Mount,
    options,
    share::{Rootfs, Share},
    spec::BundleSpec,
    stdio::{Fifos, FirstOutput, Stdio},
    tasks::{Name, Tasks},
    timeline::{Stage, Timeline},
};

/// How long the agent may take for one call. A call that takes this long hangs.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long Delete waits for output that has not been read, as containerd's own shim does.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How long the machine's end may take to be understood after the agent's connection broke.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What a pod is made of.
pub struct Pod {
    machine: MachineHandle,
    /// None: the launch failed before there was one, and the machine is lost.
    share: Mutex<Option<Share>>,
    tasks: Mutex<Tasks<Publisher>>,
    /// The bundle's spec as it was read at the start, for the container that the pod was started for.
    spec: Mutex<Option<(String, BundleSpec)>>,
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

fn process_request(name: &Name) -> ProcessRequest {
    ProcessRequest { container_id: name.container.clone(), exec_id: name.exec.clone(), ..ProcessRequest::default() }
}

/// The guest's word on how a process ended: its status is one byte, whatever the guest says. The time is the host's own,
/// because a guest's clock may be anything.
fn exit_of(response: &WaitResponse) -> Exit {
    Exit { status: response.exit_status & 0xff, at: SystemTime::now() }
}

impl Pod {
    /// A pod on a machine that may still be booting. `spec` is the spec of the container `id`, if it was read already.
    pub fn new(
        machine: MachineHandle,
        share: Option<Share>,
        spec: Option<(String, BundleSpec)>,
        events: Publisher,
        timeline: Arc<Timeline>,
        log: Logger,
    ) -> Arc<Self> {
        let pod = Arc::new(Self {
            machine,
            share: Mutex::new(share),
            tasks: Mutex::new(Tasks::new(events)),
            spec: Mutex::new(spec),
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

    /// Task.Create.
    ///
    /// # Errors
    /// Whatever keeps the container from being; then nothing of it stays.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, TaskError> {
        if !is_identifier(&request.id) {
            return Err(TaskError::invalid_argument(format!("container id {:?} is no identifier", request.id)));
        }
        if !request.checkpoint.is_empty() {
            return Err(TaskError::unimplemented("Create from a checkpoint"));
        }
        if let Some(options) = request.options.as_ref() {
            options::check(options)?;
        }
        let name = Name::new(&request.id, "");
        let stdio = Stdio::new(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        self.tasks().add_container(&request.id, &request.bundle, stdio.clone())?;
        let created = self.create_container(&name, &request, &stdio).await;
        if let Err(error) = &created {
            warn!(self.log, "container not created"; "container" => &request.id, "error" => %error);
            drop(self.tasks().remove(&name));
        }
        created
    }

    async fn create_container(
        self: &Arc<Self>,
        name: &Name,
        request: &CreateTaskRequest,
        stdio: &Stdio,
    ) -> Result<u32, TaskError> {
        // The host's part is done while the machine boots.
        let spec = self.take_spec(&request.id, &request.bundle)?;
        let fifos = Fifos::open(stdio).map_err(|error| TaskError::invalid_argument(error.to_string()))?;
        let rootfs = self.mount_rootfs(request, &spec.rootfs).await?;
        self.tasks().container(&name.container)?.rootfs = Some(rootfs);

        let machine = self.machine.ready().await?;
        let connected =
            fifos.connect(&machine.dialer).await.map_err(|error| TaskError::unavailable(error.to_string()))?;
        let create = CreateRequest {
            container_id: request.id.clone(),
            spec: spec.json,
            rootfs: Share::rootfs_name(&request.id),
            stdio: MessageField::some(connected.ports.clone()),
            ..CreateRequest::default()
        };
        self.agent_call("Create", machine.agent.create(limited(), &create)).await?;
        self.timeline.mark(Stage::ContainerCreated);
        let copies = connected.copy(Some(self.first_output()));

        let mut tasks = self.tasks();
        tasks.prepared(name, machine.pid, copies)?;
        let io = TaskIO {
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..TaskIO::default()
        };
        tasks.news().publish(&TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(io),
            pid: machine.pid,
            ..TaskCreate::default()
        });
        drop(tasks);
        tokio::spawn(Arc::clone(self).watch_process(name.clone(), Arc::clone(&machine)));
        Ok(machine.pid)
    }

    fn take_spec(&self, id: &str, bundle: &str) -> Result<BundleSpec, TaskError> {
        if let Some((of, spec)) = lock(&self.spec).take()
            && of == id
        {
            return Ok(spec);
        }
        BundleSpec::read(Path::new(bundle)).map_err(|error| TaskError::invalid_argument(error.to_string()))
    }

    async fn mount_rootfs(&self, request: &CreateTaskRequest, fallback: &Path) -> Result<Rootfs, TaskError> {
        let mounts: Vec<Mount> = (request.rootfs.iter())
            .map(|mount| Mount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
            })
            .collect();
        if let Some(share) = &*lock(&self.share) {
            let mounted = share.mount_rootfs(&request.id, &mounts, fallback);
            return mounted.map_err(|error| TaskError::failed_precondition(error.to_string()));
        }
        // There is no share because there is no machine; that is the error to tell.
        Err(self.machine.ready().await.err().unwrap_or_else(|| TaskError::unavailable("the pod has ended")))
    }

    fn first_output(self: &Arc<Self>) -> FirstOutput {
        let (timeline, log) = (Arc::clone(&self.timeline), self.log.clone());
        Arc::new(move || {
            timeline.mark(Stage::FirstOutput);
            timeline.log(&log);
        })
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

    /// Waits in the guest for a process's end.
    async fn watch_process(self: Arc<Self>, name: Name, machine: Arc<Machine>) {
        match machine.agent.wait(Context::default(), &process_request(&name)).await {
            Ok(response) => {
                self.tasks().exited(&name, exit_of(&response));
                if name.exec.is_empty() {
                    self.timeline.log(&self.log);
                }
            }
            // The machine's end tells all exits, and a process that was deleted is nobody's concern. Otherwise the agent has
            // lost its process or its connection, and nothing in the pod can be relied on any more.
            Err(error) => {
                let is_lost = timeout(LAST_WORDS, self.machine.lost()).await.is_ok();
                if !is_lost && self.is_alive(&name) {
                    let error = TaskError::from_agent("Wait", &error);
                    error!(self.log, "the agent has lost a process"; "process" => name.id(), "error" => %error);
                    self.machine.stop().await;
                }
            }
        }
    }

    /// Task.Start.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION, or why the program does not run.
    pub async fn start(self: &Arc<Self>, name: Name) -> Result<u32, TaskError> {
        self.tasks().entry(&name)?.process.begin_start()?;
        let started = match self.machine.get() {
            Ok(machine) => {
                let request = process_request(&name);
                let call = machine.agent.start(limited(), &request);
                self.agent_call("Start", call).await.map(|_| machine)
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(machine) => {
                if name.exec.is_empty() {
                    self.timeline.mark(Stage::ContainerStarted);
                } else {
                    tokio::spawn(Arc::clone(self).watch_process(name.clone(), machine));
                }
                self.tasks().started(&name)
            }
            Err(error) => {
                // As a shell has it: 127 no such program, 126 not to be executed; with its machine it was killed.
                let status = match error.code() {
                    ttrpc::Code::NOT_FOUND => 127,
                    ttrpc::Code::INVALID_ARGUMENT => 126,
                    _ => KILLED,
                };
                self.tasks().start_failed(&name, Exit { status, at: SystemTime::now() });
                // containerd takes NOT_FOUND for "no such task".
                let error = match error.code() {
                    ttrpc::Code::NOT_FOUND => TaskError::failed_precondition(error.to_string()),
                    _ => error,
                };
                Err(error.context(if name.exec.is_empty() {
                    "cannot start the container"
                } else {
                    "cannot start the exec"
                }))
            }
        }
    }

    /// Task.Exec.
    ///
    /// # Errors
    /// NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, or why it cannot be.
    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<(), TaskError> {
        if !is_identifier(&request.exec_id) {
            return Err(TaskError::invalid_argument(format!("exec id {:?} is no identifier", request.exec_id)));
        }
        let name = Name::new(&request.id, &request.exec_id);
        let stdio = Stdio::new(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        self.tasks().add_exec(&name, stdio.clone())?;
        let added = self.exec_process(&name, &stdio, request.spec.value.clone()).await;
        if added.is_err() {
            drop(self.tasks().remove(&name));
        }
        added
    }

    async fn exec_process(self: &Arc<Self>, name: &Name, stdio: &Stdio, process: Vec<u8>) -> Result<(), TaskError> {
        let machine = self.machine.get()?;
        let fifos = Fifos::open(stdio).map_err(|error| TaskError::invalid_argument(error.to_string()))?;
        let connected =
            fifos.connect(&machine.dialer).await.map_err(|error| TaskError::unavailable(error.to_string()))?;
        let exec = ExecRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            process,
            stdio: MessageField::some(connected.ports.clone()),
            ..ExecRequest::default()
        };
        self.agent_call("Exec", machine.agent.exec(limited(), &exec)).await?;
        let mut tasks = self.tasks();
        tasks.prepared(name, machine.pid, connected.copy(None))?;
        let (container_id, exec_id) = (name.container.clone(), name.exec.clone());
        tasks.news().publish(&TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Task.Kill.
    ///
    /// # Errors
    /// NOT_FOUND if there is nothing to signal.
    pub async fn kill(&self, name: &Name, signal: u32, all: bool) -> Result<(), TaskError> {
        self.tasks().entry(name)?.process.check_kill()?;
        if !(1..=64).contains(&signal) {
            return Err(TaskError::invalid_argument(format!("signal {signal} is none of 1 to 64")));
        }
        let machine = self.machine.get()?;
        let request = KillRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal,
            all,
            ..KillRequest::default()
        };
        let killed = self.agent_call("Kill", machine.agent.kill(limited(), &request)).await;
        killed.map(drop).map_err(|error| match error.code() {
            // It ended a moment ago.
            ttrpc::Code::NOT_FOUND | ttrpc::Code::FAILED_PRECONDITION => {
                TaskError::not_found("process already finished")
            }
            _ => error,
        })
    }

    /// Task.Delete.
    ///
    /// # Errors
    /// NOT_FOUND, or FAILED_PRECONDITION while it runs.
    pub async fn delete(&self, name: &Name) -> Result<DeleteResponse, TaskError> {
        let (unstarted, pid) = {
            let mut tasks = self.tasks();
            let entry = tasks.entry(name)?;
            (entry.process.begin_delete()?, tasks.pid(name))
        };
        if let Err(error) = self.delete_in_guest(name, unstarted).await {
            if let Ok(entry) = self.tasks().entry(name) {
                entry.process.delete_failed(SystemTime::now());
            }
            return Err(error);
        }
        let mut tasks = self.tasks();
        let exit = tasks.entry(name)?.process.exit().unwrap_or(Exit { status: KILLED, at: SystemTime::now() });
        // Unmounts the root before anybody hears of it.
        let removed = tasks.remove(name);
        drop(removed);
        if name.exec.is_empty() {
            tasks.news().publish(&TaskDelete {
                container_id: name.container.clone(),
                id: name.container.clone(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..TaskDelete::default()
            });
        }
        let exited_at = timestamp(exit.at);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..DeleteResponse::default() })
    }

    async fn delete_in_guest(&self, name: &Name, unstarted: bool) -> Result<(), TaskError> {
        let Ok(machine) = self.machine.get() else { return Ok(()) };
        if unstarted && name.exec.is_empty() {
            let request =
                KillRequest { container_id: name.container.clone(), signal: 9, all: true, ..KillRequest::default() };
            let _ = machine.agent.kill(limited(), &request).await;
            let request = process_request(name);
            let ended = machine.agent.wait(with_duration(KILL_LIMIT), &request);
            let _ = self.agent_call("Wait", ended).await;
        }
        let drained = self.tasks().entry(name)?.copies.as_ref().map(|copies| copies.drained(DRAIN_LIMIT));
        if let Some(drained) = drained
            && !unstarted
            && !drained.await
        {
            debug!(self.log, "output left unread"; "process" => name.id());
        }
        let request = process_request(name);
        match self.agent_call("Delete", machine.agent.delete(limited(), &request)).await {
            Ok(_) => Ok(()),
            // Nothing of it is there: a start that failed, or the machine's end.
            Err(error) if matches!(error.code(), ttrpc::Code::NOT_FOUND | ttrpc::Code::UNAVAILABLE) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Task.ResizePty.
    ///
    /// # Errors
    /// NOT_FOUND, or FAILED_PRECONDITION without a terminal.
    pub async fn resize(&self, name: &Name, width: u32, height: u32) -> Result<(), TaskError> {
        let terminal = self.tasks().entry(name)?.stdio.terminal;
        if !terminal {
            return Err(TaskError::failed_precondition(format!("process {} has no terminal", name.id())));
        }
        let machine = self.machine.get()?;
        let request = ResizePtyRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.agent_call("ResizePty", machine.agent.resize_pty(limited(), &request)).await.map(drop)
    }

    /// Task.CloseIO.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn close_stdin(&self, name: &Name) -> Result<(), TaskError> {
        if let Some(copies) = &self.tasks().entry(name)?.copies {
            copies.close_stdin();
        }
        Ok(())
    }

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
        drop(lock(&self.share).take());
        self.ended.send_replace(true);
    }

    /// Waits for the pod's end.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

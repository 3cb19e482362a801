//! A pod's containers and their processes: which there are, in which state, and who waits for whom. Every
//! change of state and its event happen here together, under one lock, so the order of events is the order
//! of changes. No I/O: the calls to the agent are the pod's ([`crate::pod`]).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{StateResponse, Status as ApiStatus},
    events::task::{TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart},
};
use protobuf::EnumOrUnknown;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    host::hooks::Pending,
    network::TaskThread,
    pod::lifecycle::{Exit, KILLED, Process, Status},
    rootfs::share::{Binds, Rootfs},
    shim::{
        errors::TaskError,
        events::{Event, Publisher, timestamp},
    },
    stdio::{Copies, Stdio},
};

/// Takes events. The publisher, or a test.
pub trait EventSink: Send + Sync {
    /// Publishes one event; never waits.
    fn publish<E: Event>(&self, event: &E);
}

impl EventSink for Publisher {
    fn publish<E: Event>(&self, event: &E) {
        self.publish(event);
    }
}

/// Names a process: a container and, unless it is the container's init process, an exec.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The container.
    pub container: String,
    /// Empty: the init process.
    pub exec: String,
}

impl Name {
    /// From a request's two fields.
    pub fn new(container: &str, exec: &str) -> Self {
        Self { container: container.to_owned(), exec: exec.to_owned() }
    }

    /// The process's own name: what TaskExit calls its id.
    pub fn id(&self) -> &str {
        if self.exec.is_empty() { &self.container } else { &self.exec }
    }
}

/// One process.
#[derive(Debug)]
pub struct Entry {
    /// Its state.
    pub process: Process,
    /// As containerd said it.
    pub stdio: Stdio,
    /// Running, once it was created.
    pub copies: Option<Copies>,
    /// One Delete at a time: the next waits for what becomes of it.
    pub deleting: Arc<tokio::sync::Mutex<()>>,
    pid: u32,
    exit: watch::Sender<Option<Exit>>,
}

impl Entry {
    fn new(is_init: bool, stdio: Stdio) -> Self {
        Self {
            process: Process::new(is_init),
            stdio,
            copies: None,
            deleting: Arc::default(),
            pid: 0,
            exit: watch::Sender::new(None),
        }
    }
}

/// One container.
#[derive(Debug)]
pub struct Container {
    bundle: String,
    init: Entry,
    execs: BTreeMap<String, Entry>,
    /// What its pid on the host is, until it ends.
    pub task: Option<TaskThread>,
    /// Its bind mounts, once they are there; gone before what they lie in is.
    pub binds: Option<Binds>,
    /// Its mounts, once they are there.
    pub rootfs: Option<Rootfs>,
    /// Its hooks that have not run yet.
    pub hooks: Option<Box<Pending>>,
    /// How long the agent may take to start it.
    pub start_limit: Duration,
    /// What watches it for kills for want of memory, once it was started.
    pub oom_watch: JoinSet<()>,
}

/// See the module's introduction.
#[derive(Debug)]
pub struct Tasks<S> {
    containers: BTreeMap<String, Container>,
    events: S,
}

/// Most execs of one container at one time.
const MAX_EXECS: usize = 1024;

impl<S: EventSink> Tasks<S> {
    /// An empty book.
    pub fn new(events: S) -> Self {
        Self { containers: BTreeMap::new(), events }
    }

    /// Where events go.
    pub fn events(&self) -> &S {
        &self.events
    }

    /// Whether there is no container.
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    /// Reserves a container's place.
    ///
    /// # Errors
    /// ALREADY_EXISTS.
    pub fn add_container(&mut self, id: &str, bundle: &str, stdio: Stdio) -> Result<(), TaskError> {
        if self.containers.contains_key(id) {
            return Err(TaskError::already_exists(format!("container {id} already exists")));
        }
        let container = Container {
            bundle: bundle.to_owned(),
            init: Entry::new(true, stdio),
            execs: BTreeMap::new(),
            task: None,
            binds: None,
            rootfs: None,
            hooks: None,
            start_limit: Duration::ZERO,
            oom_watch: JoinSet::new(),
        };
        self.containers.insert(id.to_owned(), container);
        Ok(())
    }

    /// Reserves an exec's place.
    ///
    /// # Errors
    /// NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION.
    pub fn add_exec(&mut self, name: &Name, stdio: Stdio) -> Result<(), TaskError> {
        let container = self.container(&name.container)?;
        if container.execs.contains_key(&name.exec) {
            return Err(TaskError::already_exists(format!("id {}", name.exec)));
        }
        container.init.process.check_exec()?;
        if container.execs.len() >= MAX_EXECS {
            return Err(TaskError::failed_precondition(format!("{MAX_EXECS} execs are there already: delete some")));
        }
        container.execs.insert(name.exec.clone(), Entry::new(false, stdio));
        Ok(())
    }

    /// A container.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn container(&mut self, id: &str) -> Result<&mut Container, TaskError> {
        self.containers.get_mut(id).ok_or_else(|| TaskError::not_found(format!("container {id} not created")))
    }

    /// A process.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn entry(&mut self, name: &Name) -> Result<&mut Entry, TaskError> {
        let container = self.container(&name.container)?;
        if name.exec.is_empty() {
            return Ok(&mut container.init);
        }
        let missing = || TaskError::not_found(format!("process does not exist {}", name.exec));
        container.execs.get_mut(&name.exec).ok_or_else(missing)
    }

    /// May a process be started? If so, ask the agent, and report the answer by [`started`](Self::started) or
    /// [`start_failed`](Self::start_failed).
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION.
    pub fn begin_start(&mut self, name: &Name) -> Result<(), TaskError> {
        self.entry(name)?;
        if !name.exec.is_empty() {
            self.container(&name.container)?.init.process.check_exec()?;
        }
        Ok(self.entry(name)?.process.begin_start()?)
    }

    /// The container stands still.
    ///
    /// # Errors
    /// NOT_FOUND or FAILED_PRECONDITION if it ended or was removed meanwhile.
    pub fn paused(&mut self, id: &str) -> Result<(), TaskError> {
        self.container(id)?.init.process.paused()?;
        self.events.publish(&TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() });
        Ok(())
    }

    /// The container goes on.
    ///
    /// # Errors
    /// NOT_FOUND or FAILED_PRECONDITION if it ended or was removed meanwhile.
    pub fn resumed(&mut self, id: &str) -> Result<(), TaskError> {
        self.container(id)?.init.process.resumed()?;
        self.events.publish(&TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() });
        Ok(())
    }

    /// The guest's kernel has killed in the container for want of memory.
    pub fn out_of_memory(&mut self, id: &str) {
        if self.containers.contains_key(id) {
            self.events.publish(&TaskOOM { container_id: id.to_owned(), ..TaskOOM::default() });
        }
    }

    /// Whether the container has an exec of this name.
    pub fn has_exec(&self, id: &str, exec: &str) -> bool {
        self.containers.get(id).is_some_and(|container| container.execs.contains_key(exec))
    }

    /// Waits until the execs of a container that run now have ended.
    pub fn execs_ended(&self, id: &str) -> impl Future<Output = ()> + use<S> {
        let execs = self.containers.get(id).into_iter().flat_map(|container| container.execs.values());
        let running = execs.filter(|exec| exec.process.status() == Status::Running);
        let mut exits: Vec<_> = running.map(|exec| exec.exit.subscribe()).collect();
        async move {
            for exit in &mut exits {
                // An error: it was deleted meanwhile.
                let _ = exit.wait_for(Option::is_some).await;
            }
        }
    }

    /// Forgets a process; with an init process its container.
    pub fn remove(&mut self, name: &Name) -> Removed {
        if name.exec.is_empty() {
            let container = self.containers.remove(&name.container);
            return Removed { _entry: None, _container: container };
        }
        let container = self.containers.get_mut(&name.container);
        Removed { _entry: container.and_then(|container| container.execs.remove(&name.exec)), _container: None }
    }

    /// The agent has the process ready and its streams flow.
    ///
    /// # Errors
    /// NOT_FOUND if it was removed meanwhile.
    pub fn prepared(&mut self, name: &Name, pid: u32, copies: Copies) -> Result<(), TaskError> {
        let entry = self.entry(name)?;
        entry.process.prepared();
        entry.pid = pid;
        entry.copies = Some(copies);
        Ok(())
    }

    /// The process runs its program; its pid.
    ///
    /// # Errors
    /// NOT_FOUND if it was removed meanwhile.
    pub fn started(&mut self, name: &Name) -> Result<u32, TaskError> {
        let entry = self.entry(name)?;
        let (early, pid) = (entry.process.started(), entry.pid);
        let container_id = name.container.clone();
        if name.exec.is_empty() {
            self.events.publish(&TaskStart { container_id, pid, ..TaskStart::default() });
        } else {
            let exec_id = name.exec.clone();
            self.events.publish(&TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() });
        }
        self.publish_exit(name, early);
        Ok(pid)
    }

    /// The process could not run its program.
    pub fn start_failed(&mut self, name: &Name, exit: Exit) {
        let exit = self.entry(name).ok().and_then(|entry| entry.process.start_failed(exit));
        self.publish_exit(name, exit);
    }

    /// The process has ended. True if this was not known.
    pub fn exited(&mut self, name: &Name, exit: Exit) -> bool {
        let exit = self.entry(name).ok().and_then(|entry| entry.process.exited(exit));
        self.publish_exit(name, exit);
        exit.is_some()
    }

    /// A container is deleted that was never started: its init process, which waited for that, was killed.
    pub fn killed_unstarted(&mut self, id: &str, at: SystemTime) {
        self.publish_exit(&Name::new(id, ""), Some(Exit { status: KILLED, at }));
    }

    /// The running copies of every process, to be ended.
    pub fn take_copies(&mut self) -> Vec<Copies> {
        let containers = self.containers.values_mut();
        let entries = containers.flat_map(|container| container.execs.values_mut().chain([&mut container.init]));
        entries.filter_map(|entry| entry.copies.take()).collect()
    }

    /// The machine has ended: everything that ran in it was killed.
    pub fn machine_lost(&mut self, at: SystemTime) {
        let names: Vec<Name> = (self.containers.iter())
            .flat_map(|(id, container)| {
                // Execs first: an init process's exit is the last event of its container.
                container.execs.keys().map(|exec| Name::new(id, exec)).chain([Name::new(id, "")])
            })
            .collect();
        for name in names {
            self.exited(&name, Exit { status: KILLED, at });
        }
    }

    fn publish_exit(&mut self, name: &Name, exit: Option<Exit>) {
        let Some(exit) = exit else { return };
        if name.exec.is_empty()
            && let Ok(container) = self.container(&name.container)
        {
            container.task = None;
        }
        let Ok(entry) = self.entry(name) else { return };
        entry.exit.send_replace(Some(exit));
        let pid = entry.pid;
        self.events.publish(&TaskExit {
            container_id: name.container.clone(),
            id: name.id().to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..TaskExit::default()
        });
    }

    /// Waits for a process's exit. Any number of waiters get it, however late they come; the error comes if the
    /// process is deleted without ever having run.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn wait(&mut self, name: &Name) -> Result<impl Future<Output = Result<Exit, TaskError>> + use<S>, TaskError> {
        let mut exit = self.entry(name)?.exit.subscribe();
        let id = name.id().to_owned();
        Ok(async move {
            let deleted = || TaskError::not_found(format!("process {id} was deleted"));
            let exit = exit.wait_for(Option::is_some).await.map_err(|_| deleted())?;
            (*exit).ok_or_else(deleted)
        })
    }

    /// The state of a process as containerd gets it.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn state(&mut self, name: &Name) -> Result<StateResponse, TaskError> {
        let container = self.container(&name.container)?;
        let (bundle, of_container) = (container.bundle.clone(), container.init.process.status());
        let entry = self.entry(name)?;
        let status = match of_container {
            // So is everything in it, whatever else it is.
            Status::Pausing | Status::Paused => of_container,
            _ => entry.process.status(),
        };
        let status = match status {
            Status::Created => ApiStatus::CREATED,
            Status::Running => ApiStatus::RUNNING,
            Status::Pausing => ApiStatus::PAUSING,
            Status::Paused => ApiStatus::PAUSED,
            Status::Stopped => ApiStatus::STOPPED,
        };
        let exit = entry.process.exit();
        Ok(StateResponse {
            id: name.id().to_owned(),
            bundle,
            pid: entry.pid,
            status: EnumOrUnknown::new(status),
            stdin: entry.stdio.stdin.clone(),
            stdout: entry.stdio.stdout.clone(),
            stderr: entry.stdio.stderr.clone(),
            terminal: entry.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).unwrap_or_default(),
            exec_id: name.exec.clone(),
            ..StateResponse::default()
        })
    }

    /// The pid that containerd got; 0 if there is no such process.
    pub fn pid(&mut self, name: &Name) -> u32 {
        self.entry(name).map_or(0, |entry| entry.pid)
    }
}

/// What was taken out of the book. Dropping it ends the copies and unmounts the root.
#[derive(Debug)]
pub struct Removed {
    _entry: Option<Entry>,
    _container: Option<Container>,
}

#[cfg(test)]
mod tests;

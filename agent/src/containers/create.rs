//! Create, and Start of any process.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_protos::agent::CreateRequest;
use slog::{info, warn};
use tokio::sync::RwLock;

use super::{
    Container, Containers, Error, check_name,
    error::Result,
    lock,
    process::{Pending, Process},
    trying,
};
use crate::{
    handshake::{AgentEnd, Reply},
    launch::PidNamespace,
    lifecycle::Lifecycle,
    plan::{InitPlan, Plan},
    spec::{self, Accepted, process::Inherited},
    stdio::{self, HostStreams},
    sys,
};

/// __NEW_UTS_LEN of include/uapi/linux/utsname.h.
const MAX_HOSTNAME: usize = 64;
/// How long a stage may take to prepare. A file server that does not answer is the usual reason.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long entering the program may take, which reads it from the file server.
const ENTER_LIMIT: Duration = Duration::from_secs(30);

impl Containers {
    /// Prepares a container. Returns its init process's pid.
    ///
    /// # Errors
    /// Then nothing of it stays.
    pub async fn create(&self, request: CreateRequest) -> Result<i32> {
        let id = request.container_id;
        check_name("container_id", &id)?;
        let rootfs = relative(&request.rootfs)?;
        let stdio = request.stdio.unwrap_or_default();
        let has_binds = !request.binds.is_empty();
        let mut accepted = spec::container(&request.spec, stdio.terminal)?;
        // The machine's own name says nothing to anyone.
        accepted.view.hostname.get_or_insert_with(|| id.chars().take(MAX_HOSTNAME).collect());
        self.note(&id, &accepted.notes);

        let process = &accepted.process;
        let container = Arc::new(Container {
            id: id.clone(),
            init: Arc::new(Process::new(Lifecycle::init(), None)),
            execs: Mutex::default(),
            cgroup: Mutex::default(),
            inherited: Inherited {
                capabilities: process.capabilities,
                rlimits: process.rlimits.clone(),
                oom_score_adj: process.oom_score_adj,
            },
            seccomp: process.seccomp.clone(),
            paused: RwLock::default(),
            updating: tokio::sync::Mutex::default(),
        });
        {
            let mut map = lock(&self.map);
            if map.contains_key(&id) {
                return Err(Error::Exists(id));
            }
            map.insert(id.clone(), container.clone());
        }
        let built = async {
            let share = self.share.get(has_binds)?;
            let streams = self.host_streams(&stdio).await?;
            self.build(&container, accepted, share, rootfs, streams).await
        };
        match built.await {
            Ok(pid) => {
                info!(self.log, "container created"; "container" => &id, "pid" => pid);
                Ok(pid)
            }
            Err(error) => {
                if let Err(leftover) = self.clear(&container).await {
                    warn!(self.log, "a failed container left something"; "container" => &id, "error" => %leftover);
                }
                lock(&self.map).remove(&id);
                Err(error)
            }
        }
    }

    async fn build(
        &self,
        container: &Container,
        accepted: Accepted,
        share: PathBuf,
        rootfs: PathBuf,
        streams: HostStreams,
    ) -> Result<i32> {
        let cgroup = self.cgroups.create(&container.id, &accepted.resources)?;
        *lock(&container.cgroup) = Some(cgroup.clone());
        let init = &container.init;
        let (pid, mut stage) = self.launch(init, PidNamespace::New)?;
        let process = accepted.process;
        let (terminal, user) = (process.terminal.is_some(), process.user.clone());
        let cgroup = cgroup.path().to_owned();
        let plan = Plan::Init(Box::new(InitPlan { share, rootfs, cgroup, view: accepted.view, process }));
        let handle = if terminal {
            let master = prepare(&mut stage, &plan, Vec::new()).await?.ok_or(Error::StageEnded)?;
            stdio::terminal(streams, master).map_err(trying("attach the terminal"))?
        } else {
            let (fds, handle) = stdio::pipes(streams, &user).map_err(trying("make the standard streams"))?;
            prepare(&mut stage, &plan, fds.into()).await?;
            handle
        };
        init.set_stdio(handle);
        if init.prepared(stage) { Ok(pid) } else { Err(Error::StageEnded) }
    }

    /// Starts a stage for `process`. From here on the reaper tells its end.
    pub(super) fn launch(&self, process: &Arc<Process>, namespace: PidNamespace<'_>) -> Result<(i32, AgentEnd)> {
        let mut by_pid = lock(&self.by_pid);
        let (pid, stage) = self.launcher.launch(namespace)?;
        process.spawned(pid);
        by_pid.insert(pid, process.clone());
        Ok((pid, stage))
    }

    /// Lets a created process run its program. Returns its pid.
    ///
    /// # Errors
    /// Also if the program cannot be entered; the process has then ended.
    pub async fn start(&self, id: &str, exec: &str) -> Result<i32> {
        let container = self.container(id)?;
        let process = self.process(id, exec)?;
        let who = || if exec.is_empty() { id.to_owned() } else { exec.to_owned() };
        let in_state = |error| Error::State { who: who(), error };
        if !exec.is_empty() {
            container.init.running().map_err(|error| Error::State { who: id.to_owned(), error })?;
        }
        let _going = if exec.is_empty() { None } else { Some(container.going().await?) };
        let mut stage = match process.start().map_err(in_state)? {
            Pending::Init(stage) => stage,
            Pending::Exec(plan, streams) => self.start_exec(&container, &process, *plan, streams).await?,
        };
        if let Err(error) = enter(&mut stage).await {
            // A stage that told why ends by itself, with a status that says so; one that is stuck must not stay.
            if !matches!(error, Error::Stage(_))
                && let Ok(pid) = process.target()
            {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
            return Err(error);
        }
        process.entered();
        Ok(process.pid().unwrap_or(0))
    }
}

/// Sends the plan and waits until the stage is ready. Returns the terminal's master side if there is one.
pub(super) async fn prepare(stage: &mut AgentEnd, plan: &Plan, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>> {
    let work = async {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        stage.send_plan(plan, &borrowed).await.map_err(trying("send the plan to the stage"))?;
        stage.receive().await.map_err(trying("hear from the stage"))
    };
    let answer = limited("preparing the process", PREPARE_LIMIT, work).await?;
    match answer {
        Some((Reply::Ready, terminal)) => Ok(terminal),
        Some((Reply::Failed(failure), _)) => Err(failure.into()),
        None => Err(Error::StageEnded),
    }
}

async fn enter(stage: &mut AgentEnd) -> Result<()> {
    let work = async {
        stage.send_go().await.map_err(trying("let the stage go on"))?;
        stage.receive().await.map_err(trying("hear from the stage"))
    };
    match limited("entering the program", ENTER_LIMIT, work).await? {
        // The socket closed on exec. A process that was killed before that has ended, as Wait will tell.
        None => Ok(()),
        Some((Reply::Failed(failure), _)) => Err(failure.into()),
        Some((Reply::Ready, _)) => Err(Error::StageEnded),
    }
}

async fn limited<T>(what: &'static str, limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Error::TimedOut { what, seconds: limit.as_secs() };
    tokio::time::timeout(limit, work).await.map_err(late)?
}

fn relative(path: &str) -> Result<PathBuf> {
    let normal = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
    if path.is_empty() || path.contains('\0') || !Path::new(path).components().all(normal) {
        return Err(Error::Rootfs(path.to_owned()));
    }
    Ok(path.into())
}

//! Create, and Start of any process.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_protos::agent::{CreateRequest, JoinedNamespace};
use slog::{info, warn};
use tokio::sync::RwLock;

use super::{
    Container, Containers, Error, check_name,
    delete::KILL_LIMIT,
    error::Result,
    lock, outside,
    process::{Pending, Process},
    trying,
};
use crate::{
    handshake::{AgentEnd, Reply},
    launch::PidNamespace,
    lifecycle::{Lifecycle, Phase},
    plan::{HookPlan, InitPlan, NamespaceKind, Plan},
    spec::{self, Accepted, Answers, SpecError, namespaces::KINDS as NAMESPACE_KINDS, process::Inherited},
    stdio::{self, HostStreams},
    sys,
};

/// __NEW_UTS_LEN of include/uapi/linux/utsname.h.
const MAX_HOSTNAME: usize = 64;
/// How long a stage may take to prepare. A file server that does not answer is the usual reason.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long entering the program may take, which reads it from the file server.
const ENTER_LIMIT: Duration = Duration::from_secs(30);
/// How long a hook may take that has no timeout of its own.
const HOOK_LIMIT: Duration = Duration::from_secs(600);

impl Containers {
    /// Prepares a container. Returns its init process's pid.
    ///
    /// # Errors
    /// Then nothing of it stays.
    pub async fn create(&self, request: CreateRequest) -> Result<i32> {
        let id = request.container_id;
        check_name("container_id", &id)?;
        let rootfs = relative("rootfs", &request.rootfs)?;
        let stdio = request.stdio.unwrap_or_default();
        let has_binds = !request.binds.is_empty();
        let mut answers = Answers { id: id.clone(), terminal: stdio.terminal, ..Answers::default() };
        for bind in &request.binds {
            let place = usize::try_from(bind.mount).unwrap_or(usize::MAX);
            if answers.binds.insert(place, relative("binds.path", &bind.path)?).is_some() {
                let problem = format!("mount {place} has two sources");
                return Err(SpecError::new("binds", problem).into());
            }
        }
        let joined = self.joined(&request.joins, &mut answers)?;
        let mut accepted = spec::container(&request.spec, &answers)?;
        if accepted.namespaces.makes(NamespaceKind::Uts) {
            // The machine's own name says nothing to anyone.
            accepted.view.hostname.get_or_insert_with(|| id.chars().take(MAX_HOSTNAME).collect());
        }
        self.note(&id, &accepted.notes);

        let container = Arc::new(Container {
            id: id.clone(),
            init: Arc::new(Process::new(Lifecycle::init(), None)),
            execs: Mutex::default(),
            cgroup: Mutex::default(),
            paused: RwLock::default(),
            updating: tokio::sync::Mutex::default(),
            seccomp: accepted.process.seccomp.clone(),
            inherited: Inherited::from(&accepted.process),
            namespaces: accepted.namespaces.clone(),
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
            self.build(&container, accepted, joined, (share, rootfs), streams).await
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
        joined: BTreeMap<usize, OwnedFd>,
        (share, rootfs): (PathBuf, PathBuf),
        streams: HostStreams,
    ) -> Result<i32> {
        let cgroup = self.cgroups.create(&container.id, &accepted.resources)?;
        *lock(&container.cgroup) = Some(cgroup.clone());
        let init = &container.init;
        let Accepted { view, process, namespaces, hooks, .. } = accepted;
        let begins_outside = namespaces.needs_rebirth() || namespaces.joins(NamespaceKind::Pid);
        let birthplace = if begins_outside { PidNamespace::Own } else { PidNamespace::New };
        let (_, mut stage) = self.launch(init, birthplace)?;
        let cgroup = cgroup.path().to_owned();
        let start = patience(ENTER_LIMIT, &hooks.start_container);
        let plan = Plan::Init(Box::new(InitPlan { share, rootfs, cgroup, namespaces, view, process, hooks }));
        // In the order of the plan: of the kinds.
        let joined = joined.into_values().collect();
        self.bring_up(init, &mut stage, &plan, joined, streams).await?;
        if init.prepared(stage, start) { Ok(init.pid().unwrap_or(0)) } else { Err(Error::StageEnded) }
    }

    /// Opens the namespaces that a request joins, by the place of their kind in the order of joining.
    fn joined(&self, joins: &[JoinedNamespace], answers: &mut Answers) -> Result<BTreeMap<usize, OwnedFd>> {
        let mut opened = BTreeMap::new();
        for join in joins {
            let kinds = NAMESPACE_KINDS.into_iter().enumerate();
            let found = kinds.into_iter().find(|(_, kind)| spec::namespaces::name(*kind) == join.type_);
            let Some((place, kind)) = found else {
                return Err(SpecError::new("joins.type", format!("{:?} is no kind of namespace", join.type_)).into());
            };
            let other = self.container(&join.container_id)?;
            if kind == NamespaceKind::User {
                if !other.namespaces.has_users() {
                    let problem = format!("{:?} has no user namespace of its own", join.container_id);
                    return Err(SpecError::new("joins.container_id", problem).into());
                }
                answers.ids = other.namespaces.ids.clone();
            }
            let in_state = |error| Error::State { who: join.container_id.clone(), error };
            // Before, its process may still be in the agent's own namespaces.
            if other.init.phase() == Phase::Creating {
                return Err(in_state(other.init.wrong_state("created")));
            }
            // A child that has not been reaped keeps its number.
            let pid = other.init.target().map_err(in_state)?;
            let path = format!("/proc/{pid}/ns/{}", kernel_name(kind));
            let file = std::fs::File::open(&path).map_err(|error| Error::Io { what: format!("open {path}"), error })?;
            if opened.insert(place, file.into()).is_some() {
                return Err(SpecError::new("joins.type", format!("{:?} is there twice", join.type_)).into());
            }
            answers.joins.push(kind);
        }
        Ok(opened)
    }

    /// Hands a stage its plan, with `fds` before its standard streams, and waits until it is ready.
    pub(super) async fn bring_up(
        &self,
        process: &Arc<Process>,
        stage: &mut AgentEnd,
        plan: &Plan,
        mut fds: Vec<OwnedFd>,
        streams: HostStreams,
    ) -> Result<()> {
        let handle = if plan.process().terminal.is_some() {
            let master = self.prepare(process, stage, plan, fds).await?.ok_or(Error::StageEnded)?;
            stdio::terminal(streams, master).map_err(trying("attach the terminal"))?
        } else {
            let user = outside::user(plan)?;
            let (standard, handle) = stdio::pipes(streams, &user).map_err(trying("make the standard streams"))?;
            fds.extend(standard);
            self.prepare(process, stage, plan, fds).await?;
            handle
        };
        process.set_stdio(handle);
        outside::set(process.target().map_err(|_| Error::StageEnded)?, plan)
    }

    /// Sends the plan and waits until the stage is ready. Returns the terminal's master side if there is one.
    async fn prepare(
        &self,
        process: &Arc<Process>,
        stage: &mut AgentEnd,
        plan: &Plan,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<OwnedFd>> {
        let limit = match plan {
            Plan::Init(plan) => patience(PREPARE_LIMIT, &plan.hooks.create_container),
            Plan::Exec(_) => PREPARE_LIMIT,
        };
        let work = async {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            stage.send_plan(plan, &borrowed).await.map_err(trying("send the plan to the stage"))?;
            let mut answer = stage.receive().await.map_err(trying("receive the stage's answer"))?;
            let mut terminal = None;
            if let Some((Reply::Terminal, master)) = answer {
                terminal = master;
                answer = stage.receive().await.map_err(trying("receive the stage's answer"))?;
            }
            if let Some((Reply::Born(pid), _)) = answer {
                if !is_child(pid, process.pid()) {
                    return Err(Error::StageEnded);
                }
                self.replace_stage(process, pid);
                if let Plan::Exec(exec) = plan {
                    let file = exec.cgroup.join("cgroup.procs");
                    let failed = |error| Error::Io { what: format!("write {pid} to {}", file.display()), error };
                    std::fs::write(&file, pid.to_string()).map_err(failed)?;
                }
                stage.send_seen().await.map_err(trying("answer the stage"))?;
                answer = stage.receive().await.map_err(trying("receive the stage's answer"))?;
            }
            Ok((answer, terminal))
        };
        let (answer, from_stage) = limited("preparing the process", limit, work).await?;
        match answer {
            // What comes from beside the container's other processes is not relied on.
            Some((Reply::Ready, _)) if plan.enters_last() => Ok(from_stage),
            Some((Reply::Ready, terminal)) => Ok(terminal),
            Some((Reply::Failed(failure), _)) => Err(failure.into()),
            Some((Reply::Born(_) | Reply::Terminal, _)) | None => Err(Error::StageEnded),
        }
    }

    /// The stage's child takes its place. It cannot have been reaped yet: it is a child of the stage, which waits.
    fn replace_stage(&self, process: &Arc<Process>, pid: i32) {
        let mut by_pid = lock(&self.by_pid);
        if let Some(stage) = process.pid() {
            by_pid.remove(&stage);
        }
        process.spawned(pid);
        by_pid.insert(pid, process.clone());
    }

    /// Starts a stage for `process`. From here on the reaper tells its end.
    pub(super) fn launch(&self, process: &Arc<Process>, namespace: PidNamespace) -> Result<(i32, AgentEnd)> {
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
            container.init.created().map_err(|error| Error::State { who: id.to_owned(), error })?;
        }
        let _going = if exec.is_empty() { None } else { Some(container.going().await?) };
        let (mut stage, limit) = match process.start().map_err(in_state)? {
            Pending::Init(stage, limit) => (stage, limit),
            Pending::Exec(plan, streams) => {
                let prepared = self.prepare_exec(&container, &process, *plan, streams).await;
                (prepared.inspect_err(|_| Self::abandon(&process))?, ENTER_LIMIT)
            }
        };
        if let Err(error) = enter(&mut stage, limit).await {
            // A stage that reported its failure ends by itself, with a status that says so; one that is stuck must not stay.
            if !matches!(error, Error::Stage(_))
                && let Ok(pid) = process.target()
            {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
            // The caller may delete it at once, which it may not while it runs.
            let _ = tokio::time::timeout(KILL_LIMIT, process.ended()).await;
            return Err(error);
        }
        process.entered();
        Ok(process.pid().unwrap_or(0))
    }
}

async fn enter(stage: &mut AgentEnd, limit: Duration) -> Result<()> {
    let work = async {
        stage.send_go().await.map_err(trying("let the stage go on"))?;
        stage.receive().await.map_err(trying("receive the stage's answer"))
    };
    match limited("entering the program", limit, work).await? {
        // The socket closed on exec. A process that was killed before that has ended, as Wait will tell.
        None => Ok(()),
        Some((Reply::Failed(failure), _)) => Err(failure.into()),
        Some((Reply::Ready | Reply::Born(_) | Reply::Terminal, _)) => Err(Error::StageEnded),
    }
}

async fn limited<T>(what: &'static str, limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Error::TimedOut { what, seconds: limit.as_secs() };
    tokio::time::timeout(limit, work).await.map_err(late)?
}

/// Whether process `pid` is a child of process `parent`. What names it may come from within the container's pid namespace, and
/// must not be any process of the machine.
fn is_child(pid: i32, parent: Option<i32>) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let found = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<i32>().ok());
    found.is_some() && found == parent
}

/// How long something may take on the way of which these hooks run.
fn patience(limit: Duration, hooks: &[HookPlan]) -> Duration {
    hooks.iter().fold(limit, |limit, hook| {
        limit.saturating_add(hook.timeout.map_or(HOOK_LIMIT, |seconds| Duration::from_secs(seconds.into())))
    })
}

/// The file's name in /proc/PID/ns.
fn kernel_name(kind: NamespaceKind) -> &'static str {
    match kind {
        NamespaceKind::Network => "net",
        NamespaceKind::Mount => "mnt",
        other => spec::namespaces::name(other),
    }
}

fn relative(field: &'static str, path: &str) -> Result<PathBuf> {
    let normal = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
    if path.is_empty() || path.contains('\0') || !Path::new(path).components().all(normal) {
        return Err(Error::Path { field, path: path.to_owned() });
    }
    Ok(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_the_stages_child_does_not_take_its_place() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(is_child(pid, Some(own)));
        for (pid, parent) in
            [(pid, Some(pid)), (pid, None), (own, Some(own)), (1, Some(own)), (0, Some(0)), (-1, Some(own))]
        {
            assert!(!is_child(pid, parent), "{pid} {parent:?}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

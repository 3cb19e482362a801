//! Task.Create: the host's part of a container (spec, streams, root file system), which is done while the machine
//! boots, and then the agent's.

use std::{path::Path, sync::Arc, time::SystemTime};

use caisson_protos::agent::{BindSource, CreateRequest, JoinedNamespace};
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
};
use protobuf::MessageField;
use slog::{info, warn};

use super::{First, Pod, lock, no_deadline};
use crate::{
    host::namespaces::on_own_thread,
    pod::{
        lifecycle::{Exit, KILLED},
        tasks::Name,
    },
    rootfs::{
        binds::{self, Source},
        mount::Mount,
        share::{Binds, Rootfs, RootfsError, Share},
    },
    shim::{
        errors::{Silence, TaskError},
        flags::is_identifier,
        options,
    },
    spec::{BundleSpec, SpecError},
    stdio::{FirstOutput, Stdio},
    vm::{allotment::Allotment, timeline::Stage},
};

/// Where the guest finds the source of the mount at position `mount`: in the place of the first mount with the same source.
fn bind_source(container: &str, mount: u32, sources: &[(u32, Source)]) -> BindSource {
    let same = sources.iter().find_map(|(index, source)| match source {
        Source::Same(first) if *index == mount => Some(*first),
        _ => None,
    });
    BindSource { mount, path: Share::bind_name(container, same.unwrap_or(mount)), ..BindSource::default() }
}

impl Pod {
    /// Task.Create.
    ///
    /// # Errors
    /// Why the container cannot be created; then nothing of it remains.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, TaskError> {
        if !is_identifier(&request.id) {
            return Err(TaskError::invalid_argument(format!(
                "container id {:?} is not a valid identifier",
                request.id
            )));
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
            if error.silence() == Some(Silence::Deadline) {
                self.end_uncreated(&name).await;
            }
            let hooks = self.tasks().container(&name.container).ok().and_then(|container| container.hooks.take());
            self.remove(&name).await;
            self.run_poststop(hooks).await;
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
        let First { spec, task, .. } = self.first_or_next(&request.id, &request.bundle).await?;
        let pid = task.pid();
        self.tasks().container(&name.container)?.task = Some(task);
        if let Some(note) = &spec.devices.note {
            info!(self.log, "{}", note; "container" => &request.id);
        }
        let sources = self.open_binds(&spec).await?;
        let streams = self.open_streams(name, stdio).await?;
        let rootfs = self.mount_rootfs(request, &spec.rootfs).await?;
        self.tasks().container(&name.container)?.rootfs = Some(rootfs);
        let bind_sources: Vec<_> =
            spec.binds.iter().map(|bind| bind_source(&request.id, bind.index, &sources)).collect();
        let binds = self.mount_binds(&request.id, sources).await?;
        self.tasks().container(&name.container)?.binds = Some(binds);

        let joins = self.joined(&spec)?;
        let guests_spec = self.guests_spec(&spec)?;

        let machine = self.machine.ready().await?;
        self.run_create_hooks(name, &spec, pid, Path::new(&request.bundle)).await?;
        self.configure_network(&machine).await?;
        let connected = streams.connect(&machine.dialer).await?;
        let create = CreateRequest {
            container_id: request.id.clone(),
            spec: guests_spec,
            rootfs: Share::rootfs_name(&request.id),
            stdio: MessageField::some(connected.ports.clone()),
            binds: bind_sources,
            joins,
            ..CreateRequest::default()
        };
        let limit = self.limits.call.saturating_add(spec.hooks.in_guest);
        self.tasks().container(&name.container)?.start_limit = limit;
        self.agent_call_within("Create", limit, machine.agent.create(no_deadline(), &create)).await?;
        self.timeline.mark(Stage::ContainerCreated);
        let _ = self.first.set((request.id.clone(), pid));
        let copies = connected.copy(Some(self.first_output()));

        // Last, because from here on writers get on.
        copies.open_input();
        let mut tasks = self.tasks();
        tasks.prepared(name, pid, copies)?;
        let io = TaskIO {
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..TaskIO::default()
        };
        tasks.events().publish(&TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(io),
            pid,
            ..TaskCreate::default()
        });
        if self.machine.is_lost() {
            // Its end was reported while the container was not yet there to be ended with it.
            tasks.exited(name, Exit { status: KILLED, at: SystemTime::now() });
        }
        drop(tasks);
        tokio::spawn(Arc::clone(self).watch_process(name.clone(), Arc::clone(&machine)));
        Ok(pid)
    }

    /// What is there of the container that the pod was started for; made for every other one.
    async fn first_or_next(&self, id: &str, bundle: &str) -> Result<First, TaskError> {
        if let Some(refused) = &self.refused {
            return Err(TaskError::invalid_argument(refused.clone()));
        }
        if let Some(first) = lock(&self.started_for).take_if(|first| first.id == id) {
            return Ok(first);
        }
        let invalid = |error: SpecError| TaskError::invalid_argument(error.to_string());
        let spec = BundleSpec::read(Path::new(bundle)).map_err(invalid)?;
        let (Some(host), Some(network)) = (&self.host, &self.network) else { return Err(self.no_machine().await) };
        let (id, namespace) = (id.to_owned(), network.namespace().clone());
        let work = move || {
            spec.check_network(&namespace).map_err(invalid)?;
            let task = namespace.task_thread().map_err(|error| TaskError::internal(format!("the task's pid: {error}")));
            Ok(First { id, spec, task: task? })
        };
        host.run(work).await.map_err(|error| TaskError::internal(format!("the host's mount namespace: {error}")))?
    }

    /// The specification for the agent.
    fn guests_spec(&self, spec: &BundleSpec) -> Result<Vec<u8>, TaskError> {
        let size = lock(&self.allotment).as_ref().map(Allotment::size);
        let Some(size) = size else { return Ok(spec.json.clone()) };
        spec.for_guest(size).map_err(|error| TaskError::invalid_argument(error.to_string()))
    }

    /// The namespaces of the pod's first container that this one joins.
    fn joined(&self, spec: &BundleSpec) -> Result<Vec<JoinedNamespace>, TaskError> {
        let joined = match self.first.get() {
            Some((first, pid)) => spec.joined(*pid, first),
            None => spec.joined(0, ""),
        };
        joined.map_err(|error| TaskError::invalid_argument(error.to_string()))
    }

    async fn open_binds(&self, spec: &BundleSpec) -> Result<Vec<(u32, Source)>, TaskError> {
        if spec.binds.is_empty() {
            return Ok(Vec::new());
        }
        let Some(host) = &self.host else { return Err(self.no_machine().await) };
        if !self.has_host_share {
            let message =
                "mounts: the pod's first container had no bind mounts, so the machine has no device for others'";
            return Err(TaskError::failed_precondition(message));
        }
        let binds = spec.binds.clone();
        let opened = host.run(move || binds::open(&binds)).await;
        let opened = opened.map_err(|error| TaskError::internal(format!("the host's mount namespace: {error}")))?;
        opened.map_err(|error| TaskError::invalid_argument(error.to_string()))
    }

    async fn mount_binds(&self, id: &str, sources: Vec<(u32, Source)>) -> Result<Binds, TaskError> {
        let id = id.to_owned();
        self.mount(move |share| share.mount_binds(&id, sources)).await
    }

    /// Mounts below the share, on a thread of its own: a mount may wait for its file system.
    async fn mount<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Share) -> Result<T, RootfsError> + Send + 'static,
    ) -> Result<T, TaskError> {
        let share = lock(&self.share).clone();
        let Some(share) = share else { return Err(self.no_machine().await) };
        let mounted = on_own_thread("mount", move || work(&share)).await;
        let mounted = mounted.map_err(|error| TaskError::internal(format!("cannot mount: {error}")))?;
        mounted.map_err(|error| TaskError::failed_precondition(error.to_string()))
    }

    /// Something of the pod is missing because there is no machine; that is the error to report.
    async fn no_machine(&self) -> TaskError {
        self.machine.ready().await.err().unwrap_or_else(|| TaskError::unavailable("the pod has ended"))
    }

    async fn mount_rootfs(&self, request: &CreateTaskRequest, fallback: &Path) -> Result<Rootfs, TaskError> {
        let mounts: Vec<Mount> = (request.rootfs.iter())
            .map(|mount| Mount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
                target: mount.target.clone(),
            })
            .collect();
        let (id, fallback) = (request.id.clone(), fallback.to_owned());
        self.mount(move |share| share.mount_rootfs(&id, &mounts, &fallback)).await
    }

    fn first_output(self: &Arc<Self>) -> FirstOutput {
        let (timeline, log) = (Arc::clone(&self.timeline), self.log.clone());
        Arc::new(move || {
            timeline.mark(Stage::FirstOutput);
            timeline.log(&log);
        })
    }
}

//! The task service as containerd calls it. One implementation serves `containerd.task.v2.Task` (containerd 1.6, 1.7) and
//! `containerd.task.v3.Task` (2.x): the two differ in nothing but the package's name.
//!
//! ttrpc drops a handler when its client hangs up. Whatever changes something therefore runs as a task of its own, to its
//! end, even if the client has gone.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
        StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::{Task, create_task},
};
use protobuf::MessageField;
use tokio::{sync::oneshot, time::timeout};
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{
    pod::Pod,
    pod::tasks::Name,
    shim::{errors::TaskError, events::timestamp},
};

/// Both names of the service, for one pod.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = |name: &str| {
        let task: Arc<dyn Task + Send + Sync> = Arc::new(TaskService { pod: Arc::clone(pod) });
        create_task(task).into_values().map(move |service| (name.to_owned(), service)).next()
    };
    ["containerd.task.v2.Task", "containerd.task.v3.Task"].into_iter().filter_map(service).collect()
}

/// How long Shutdown waits for the machine's end before it answers.
const SHUTDOWN_ANSWER: Duration = Duration::from_secs(1);

struct TaskService {
    pod: Arc<Pod>,
}

/// Runs `work` to its end, even if the caller is dropped.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    Ok(done.unwrap_or_else(|_| Err(TaskError::internal("the request's task failed")))?)
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = detached(async move { pod.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (pod, name) = (Arc::clone(&self.pod), Name::new(&request.id, &request.exec_id));
        let pid = detached(async move { pod.start(name).await }).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pod, name) = (Arc::clone(&self.pod), Name::new(&request.id, &request.exec_id));
        let (answer, deleted) = oneshot::channel();
        tokio::spawn(async move {
            // The client would now call Shutdown. If it is gone (containerd was killed), nobody does.
            if answer.send(pod.delete(&name).await).is_err() {
                pod.shutdown(false).await;
            }
        });
        Ok(deleted.await.unwrap_or_else(|_| Err(TaskError::internal("the request's task failed")))?)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let (pod, name) = (Arc::clone(&self.pod), Name::new(&request.id, &request.exec_id));
        detached(async move { pod.kill(&name, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.pod.state(&Name::new(&request.id, &request.exec_id))?)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.pod.wait(&Name::new(&request.id, &request.exec_id)).await?;
        let exited_at = timestamp(exit.at);
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..WaitResponse::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let name = Name::new(&request.id, &request.exec_id);
        self.pod.resize(&name, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        // Standard input is all that can be closed; like containerd's own shim this one ignores a second call.
        self.pod.close_stdin(&Name::new(&request.id, &request.exec_id))?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.pod.pids(&request.id).await?;
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // A containerd that starts anew asks this of each shim that it finds, and ends one that refuses. A pod whose containerd
        // died before Create has no other end.
        self.pod.check_occupied()?;
        let (shim_pid, task_pid) = (std::process::id(), self.pod.pid(&request.id));
        Ok(ConnectResponse { shim_pid, task_pid, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        // `now` does not count: a pod with containers goes on, as with containerd's own shim.
        let ending = tokio::spawn(async move { pod.shutdown(false).await });
        // containerd waits three seconds for this answer; a machine on a crowded host may take longer to be gone, and then
        // goes on ending behind it.
        let _ = timeout(SHUTDOWN_ANSWER, ending).await;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.pause(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.pod.state(&Name::new(&request.id, ""))?;
        Err(TaskError::unimplemented("Checkpoint").into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.update(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod.stats(&request.id).await?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..StatsResponse::default() })
    }
}

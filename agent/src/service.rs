//! The calls: from ttrpc requests to [`Containers`] and from its errors to statuses.
//!
//! A call that changes something runs as a task of its own: when the caller's connection breaks ttrpc drops the call's
//! future, and half a Create must not stay.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use caisson_protos::{
    agent::{
        ConfigureNetworkRequest, ContainerRequest, CreateRequest, CreateResponse, Empty, ExecRequest, KillRequest,
        PidsResponse, ProcessRequest, ResizePtyRequest, StartResponse, StatsResponse, UpdateRequest, WaitOomRequest,
        WaitOomResponse, WaitResponse,
    },
    agent_ttrpc::{Agent, create_agent},
};
use futures_core::Stream;
use slog::{Logger, error, warn};
use tokio::sync::mpsc;
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext, transport::Listener},
    get_status,
};

use crate::{
    blocking,
    containers::{Containers, Error},
    lifecycle::Exit,
    network::Network,
    streams::Streams,
    transport::{Accept, ByteStream},
};

/// How long Shutdown waits for file systems to be written back.
const SYNC_LIMIT: Duration = Duration::from_secs(10);

/// Ends the machine; does not return on success.
pub type PowerOff = Box<dyn Fn() + Send + Sync>;

struct Service {
    containers: Arc<Containers>,
    network: Arc<Network>,
    power_off: PowerOff,
    log: Logger,
}

/// Serves calls that come through `calls`, and takes the standard streams that come through `stdio`.
///
/// # Errors
/// If the server cannot start.
pub async fn serve(
    calls: impl Accept,
    stdio: impl Accept,
    streams: Streams,
    containers: Arc<Containers>,
    power_off: PowerOff,
    log: Logger,
) -> io::Result<Server> {
    tokio::spawn(take_streams(stdio, streams, log.clone()));
    let listener = ttrpc_listener(calls, log.clone());
    let service = create_agent(Arc::new(Service { containers, network: Arc::default(), power_off, log }));
    let mut server = Server::new().add_listener(listener).register_service(service);
    server.start().await.map_err(io::Error::other)?;
    Ok(server)
}

async fn take_streams(mut listener: impl Accept, streams: Streams, log: Logger) {
    loop {
        match listener.accept().await {
            Ok((stream, port)) => {
                if !streams.arrive(port, stream) {
                    warn!(log, "a standard stream was refused"; "port" => port);
                }
            }
            Err(error) => accept_failed(&log, &error).await,
        }
    }
}

/// Says so, and waits a moment.
pub(crate) async fn accept_failed(log: &Logger, error: &io::Error) {
    error!(log, "cannot accept a connection"; "error" => %error);
    // Out of descriptors, most likely; trying at once would only spin.
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Accepted connections in the form that ttrpc takes.
struct Incoming(mpsc::Receiver<io::Result<Box<dyn ByteStream>>>);

impl Stream for Incoming {
    type Item = io::Result<Box<dyn ByteStream>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

fn ttrpc_listener(mut listener: impl Accept, log: Logger) -> Listener {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if sender.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Err(error) => accept_failed(&log, &error).await,
            }
        }
    });
    Listener::new(Incoming(receiver))
}

impl Service {
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match tokio::spawn(work).await {
            Ok(result) => self.answer(result),
            Err(error) => Err(status(Code::INTERNAL, error)),
        }
    }

    fn answer<T>(&self, result: Result<T, Error>) -> ttrpc::Result<T> {
        result.map_err(|error| {
            slog::info!(self.log, "call refused"; "error" => %error);
            status(error.code(), &error)
        })
    }
}

fn status(code: Code, error: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, error))
}

fn wait_response((exit, pid): (Exit, i32)) -> WaitResponse {
    WaitResponse {
        exit_status: exit.status,
        exited_at_ns: exit.at_ns,
        pid: u32::try_from(pid).unwrap_or(0),
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<CreateResponse> {
        let containers = self.containers.clone();
        let pid = self.run(async move { containers.create(request).await }).await?;
        Ok(CreateResponse { pid: u32::try_from(pid).unwrap_or(0), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        self.run(async move { containers.exec(request).await }).await?;
        Ok(Empty::default())
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StartResponse> {
        let containers = self.containers.clone();
        let pid = self.run(async move { containers.start(&request.container_id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid: u32::try_from(pid).unwrap_or(0), ..Default::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let ended = self.containers.wait(&request.container_id, &request.exec_id).await;
        self.answer(ended).map(wait_response)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.answer(self.containers.kill(&request))?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.answer(self.containers.resize(&request))?;
        Ok(Empty::default())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.answer(self.containers.close_stdin(&request.container_id, &request.exec_id))?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.answer(self.containers.pids(&request.container_id))?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let containers = self.containers.clone();
        self.run(async move { containers.delete(&request.container_id, &request.exec_id).await })
            .await
            .map(wait_response)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        self.run(async move { containers.pause(&request.container_id).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        self.run(async move { containers.resume(&request.container_id).await }).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        self.run(async move { containers.update(request).await }).await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.answer(self.containers.stats(&request.container_id))
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> ttrpc::Result<WaitOomResponse> {
        let kills = self.containers.wait_oom(&request.container_id, request.seen).await;
        Ok(WaitOomResponse { kills: self.answer(kills)?, ..Default::default() })
    }

    async fn configure_network(&self, _: &TtrpcContext, request: ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        let network = Arc::clone(&self.network);
        match blocking::run(move || network.configure(&request)).await {
            Ok(Ok(())) => Ok(Empty::default()),
            Ok(Err(error)) => {
                warn!(self.log, "the network cannot be as the host has it"; "error" => %error);
                Err(status(error.code(), &error))
            }
            Err(error) => Err(status(Code::INTERNAL, error)),
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        match tokio::time::timeout(SYNC_LIMIT, blocking::run(rustix::fs::sync)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(self.log, "no thread for writing file systems back"; "error" => %error);
                rustix::fs::sync();
            }
            Err(_) => warn!(self.log, "file systems are not written back in time"; "seconds" => SYNC_LIMIT.as_secs()),
        }
        (self.power_off)();
        Ok(Empty::default())
    }
}

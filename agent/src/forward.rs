//! Port forwarding: the shim opens a stream for each connection that a client makes to loopback in the pod's network namespace on the
//! host, and says where to; the agent connects there, in the guest's own network namespace, which all containers of the pod share.
//! [`caisson_forward`] has the protocol.
//!
//! What cannot be reached is said by closing the stream. Only the host can open one ([`crate::transport::HostOnly`]); a container that
//! could would reach no more than it does by itself.

use std::{io, sync::Arc, time::Duration};

use caisson_forward::{Broken, Target, carry, target::NotLoopback};
use caisson_protos::guest::MAX_FORWARDS;
use slog::{Logger, debug};
use tokio::{io::AsyncReadExt, net::TcpStream, sync::Semaphore, time::timeout};

use crate::{
    service::accept_failed,
    transport::{Accept, ByteStream},
};

/// How long the shim may take to say where to connect. It does so at once.
const TARGET_LIMIT: Duration = Duration::from_secs(10);
/// How long a server may take to accept. One whose queue is full is asked again by the kernel after 1, 3, 7 and 15 seconds.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Why a connection was not made, or ended before its time.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("the host did not say where to connect: {0}")]
    NoTarget(io::Error),
    #[error("the host asked for what cannot be: {0}")]
    Target(#[from] NotLoopback),
    #[error("cannot connect to {0}: {1}")]
    Connect(Target, io::Error),
    #[error("the connection to {0}: {1}")]
    Broken(Target, Broken),
}

/// Serves the streams that come through `listener`, for ever.
pub async fn serve(mut listener: impl Accept, log: Logger) {
    let places = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // The shim opens no more, but may close one earlier than its server lets go of it.
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                    debug!(log, "too many forwarded connections"; "limit" => MAX_FORWARDS);
                    continue;
                };
                let log = log.clone();
                tokio::spawn(async move {
                    if let Err(error) = forward(stream).await {
                        debug!(log, "forwarded connection"; "error" => %error);
                    }
                    drop(place);
                });
            }
            Err(error) => accept_failed(&log, &error).await,
        }
    }
}

async fn forward(mut stream: Box<dyn ByteStream>) -> Result<(), Failed> {
    let mut target = [0; Target::LEN];
    let read = timeout(TARGET_LIMIT, stream.read_exact(&mut target)).await;
    read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(Failed::NoTarget)?;
    let target = Target::decode(target)?;
    let tcp = timeout(CONNECT_LIMIT, connect(target)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let tcp = tcp.map_err(|error| Failed::Connect(target, error))?;
    carry(tcp, stream).await.map_err(|broken| Failed::Broken(target, broken))
}

async fn connect(target: Target) -> io::Result<TcpStream> {
    let [first, other] = target.attempts();
    match TcpStream::connect(first).await {
        Ok(tcp) => Ok(tcp),
        // What the client has dialled is what it wants to know about.
        Err(error) => TcpStream::connect(other).await.map_err(|_| error),
    }
}

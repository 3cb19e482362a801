//! Port forwarding. containerd serves it by dialling 127.0.0.1 or ::1 in the pod's network namespace on the host, where with a virtual
//! machine nobody listens. Here the shim does:
//!
//! ```text
//!   pod's network namespace on the host                                 guest
//!     client ──► 127.0.0.1:PORT ─┐
//!                   ::1:PORT ────┤ sk_lookup
//!                                ▼
//!                             Listener ══► shim ══ stream of its own ══► agent ──► 127.0.0.1:PORT, ::1:PORT
//! ```
//!
//! A BPF program of type sk_lookup chooses the socket for a new connection before the kernel looks for a listener at its port. It
//! gives every TCP connection to loopback, whatever its port, to the listener; the accepted socket's own address is what the client has
//! dialled. There is no NAT, no rule and no netfilter, and nothing to clean up: the program is attached as long as the
//! listener's descriptor is open. Connections that exist are found before, and everything but TCP to loopback is as it was.
//!
//! The accept says nothing about the guest. A client that the guest refuses sees its connection reset a moment later.
//!
//! [`run`] does it all for a pod.

mod bpf;
mod listener;
mod program;
#[cfg(test)]
mod tests;

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use caisson_forward::{Broken, Target, carry, target::NotLoopback};
use caisson_protos::guest::{FORWARD_PORT, MAX_FORWARDS};
use slog::{Logger, debug, warn};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub use self::listener::{ListenError, Listener};
use super::Namespace;
use crate::{
    host::namespaces::on_own_thread,
    vm::{
        dial::{DialError, Dialer},
        supervisor::MachineHandle,
    },
};

/// How long nothing is accepted when the process has no descriptor for another connection.
const REST: Duration = Duration::from_millis(100);

/// Why a connection was reset.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("its address cannot be found out: {0}")]
    Address(io::Error),
    #[error("it was made to another address: {0}")]
    Target(#[from] NotLoopback),
    #[error("{0}: {1}")]
    Dial(Target, DialError),
    #[error("{0}: {1}")]
    Broken(Target, Broken),
}

/// Forwards the ports of a pod until its machine has ended. Where the kernel cannot, it says so once and does nothing.
pub async fn run(namespace: Namespace, machine: MachineHandle, log: Logger) {
    let opened = on_own_thread("forward", move || Listener::open(&namespace)).await;
    let listener = match opened.map_err(ListenError::Namespace).flatten() {
        Ok(listener) => listener,
        Err(error) => {
            warn!(log, "ports of this pod cannot be forwarded"; "error" => %error);
            return;
        }
    };
    // Clients that come while the machine boots wait in the queue.
    let Ok(ready) = machine.ready().await else { return };
    tokio::select! {
        served = serve(listener, &ready.dialer, &log) => {
            if let Err(error) = served {
                warn!(log, "ports of this pod are not forwarded any more"; "error" => %error);
            }
        }
        _ = machine.lost() => {}
    }
}

/// Whether this host can forward ports, found out in a network namespace that goes at once.
///
/// # Errors
/// Why it cannot.
pub fn check() -> Result<(), ListenError> {
    let namespace = Namespace::new().map_err(ListenError::Namespace)?;
    Listener::open(&namespace).map(drop)
}

/// Serves the clients. When it is dropped, their connections are reset.
///
/// # Errors
/// If the listener cannot be registered with the runtime.
async fn serve(listener: Listener, dialer: &Arc<Dialer>, log: &Logger) -> io::Result<()> {
    let Listener { ipv4, ipv6, redirection: _attached } = listener;
    let ipv4 = registered(ipv4)?;
    let ipv6 = ipv6.map(registered).transpose()?;
    let mut connections = JoinSet::new();
    loop {
        let client = tokio::select! {
            Some(_) = connections.join_next() => continue,
            client = ipv4.accept() => client,
            Some(client) = accept(ipv6.as_ref()) => client,
        };
        match client {
            Ok((client, _)) if connections.len() < MAX_FORWARDS => {
                let (dialer, log) = (Arc::clone(dialer), log.clone());
                connections.spawn(async move {
                    if let Err(error) = forward(client, &dialer).await {
                        debug!(log, "forwarded connection reset"; "error" => %error);
                    }
                });
            }
            Ok((client, _)) => {
                debug!(log, "forwarded connection refused: there are too many"; "limit" => MAX_FORWARDS);
                // It cannot fail for a socket; the client would see an end.
                let _ = client.set_zero_linger();
            }
            // The client has gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                warn!(log, "cannot accept a connection to a forwarded port"; "error" => %error);
                // Out of descriptors, most likely; trying at once would only spin.
                tokio::time::sleep(REST).await;
            }
        }
    }
}

fn registered(socket: OwnedFd) -> io::Result<TcpListener> {
    TcpListener::from_std(socket.into())
}

async fn accept(listener: Option<&TcpListener>) -> Option<io::Result<(TcpStream, std::net::SocketAddr)>> {
    Some(listener?.accept().await)
}

async fn forward(client: TcpStream, dialer: &Dialer) -> Result<(), Failed> {
    // Whatever goes wrong is a reset.
    client.set_zero_linger().map_err(Failed::Address)?;
    let target = Target::new(client.local_addr().map_err(Failed::Address)?)?;
    let failed = |error| Failed::Dial(target, error);
    let (mut stream, _) = dialer.dial(FORWARD_PORT).await.map_err(failed)?;
    stream.write_all(&target.encode()).await.map_err(|error| failed(error.into()))?;
    carry(client, stream).await.map_err(|broken| Failed::Broken(target, broken))
}

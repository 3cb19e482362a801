//! Work that blocks, on a thread of its own. Unlike with the runtime's pool a thread that cannot be had (a container may
//! have taken the machine's last process) is an error and not the agent's end.

use std::{io, thread};

use tokio::sync::oneshot;

/// Runs `work` on a new thread and waits for it.
///
/// # Errors
/// If there is no thread to be had.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (send, receive) = oneshot::channel();
    thread::Builder::new().name("blocking".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = send.send(work());
    })?;
    receive.await.map_err(io::Error::other)
}

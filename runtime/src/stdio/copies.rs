//! The copy loops of one process's streams.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slog::{Logger as Log, debug, warn};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe::Sender,
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use super::{Connected, Sink, logger::Logger};

/// Bytes that one read takes at most; a FIFO holds 64 KiB.
const BUFFER: usize = 32 * 1024;

/// Called once, when the first byte of output has come.
pub type FirstOutput = Arc<dyn Fn() + Send + Sync>;

impl Connected {
    /// Lets it flow.
    pub fn copy(self, first_output: Option<FirstOutput>) -> Copies {
        let mut outputs = JoinSet::new();
        for (name, output) in ["stdout", "stderr"].into_iter().zip(self.outputs) {
            let Some((sink, stream)) = output else { continue };
            // The guest's end of this stream was half-closed by nobody: the shim writes nothing to it.
            let (log, first) = (self.log.clone(), first_output.clone());
            outputs.spawn(async move {
                let copied = match sink {
                    Sink::Pipe(pipe) => pump(stream, pipe, first).await,
                    Sink::File(file) => pump(stream, file, first).await,
                };
                if let Err(error) = copied {
                    warn!(log, "output has nowhere to go any more"; "stream" => name, "error" => %error);
                }
            });
        }
        let (drained, done) = watch::channel(false);
        let outputs = tokio::spawn(async move {
            while outputs.join_next().await.is_some() {}
            let _ = drained.send(true);
        });
        let (holder, stdin) = match self.stdin {
            Some(((fifo, holder), stream)) => {
                let log = self.log.clone();
                let copy = async move {
                    if let Err(error) = pump(fifo, stream, None).await {
                        debug!(log, "input is not read any more"; "error" => %error);
                    }
                };
                (Some(holder), Some(tokio::spawn(copy)))
            }
            None => (None, None),
        };
        Copies {
            holder: Mutex::new(holder),
            done,
            tasks: [Some(outputs.abort_handle()), stdin.map(|task| task.abort_handle())],
            loggers: self.loggers,
        }
    }
}

/// Copies until the end of `from`, then ends `to`; or until `to` takes no more.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    first: Option<FirstOutput>,
) -> io::Result<()> {
    let mut first = first;
    let mut buffer = vec![0; BUFFER];
    // An error is an end, too: the machine's.
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if let Some(first) = first.take() {
            first();
        }
        let Some(bytes) = buffer.get(..read) else { break };
        to.write_all(bytes).await?;
    }
    to.shutdown().await
}

/// The running copies of one process. Dropped, they end at once, and their loggers with them.
#[derive(Debug)]
pub struct Copies {
    holder: Mutex<Option<Sender>>,
    done: watch::Receiver<bool>,
    tasks: [Option<AbortHandle>; 2],
    loggers: Vec<Logger>,
}

impl Copies {
    /// Ends the input after what the client has written, when the client has closed its end.
    pub fn close_stdin(&self) {
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits until all output is in its FIFOs, but no longer than `limit`: something that still holds the output in the
    /// guest, or a client that does not read, must not hold up a Delete.
    pub fn drained(&self, limit: Duration) -> impl Future<Output = bool> + use<> {
        let mut done = self.done.clone();
        async move { timeout(limit, done.wait_for(|done| *done)).await.is_ok() }
    }

    /// Ends them, and gives the loggers their time to end.
    pub async fn end(mut self, log: &Log) {
        self.abort();
        for logger in self.loggers.drain(..) {
            logger.end(log).await;
        }
    }

    #[cfg(test)]
    pub(super) fn loggers(&self) -> usize {
        self.loggers.len()
    }

    fn abort(&self) {
        for task in self.tasks.iter().flatten() {
            task.abort();
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.abort();
    }
}

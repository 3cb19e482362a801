//! The pod's machine as the rest of the shim sees it: it boots, is ready (the agent answers), and is lost, once,
//! for a reason. [`supervise`] owns the processes; everybody else has a [`MachineHandle`].
//!
//! ```text
//!   Booting ──agent's Ready message, agent dialled──► Ready ──monitor or file server ended, or stop──► Lost(reason)
//!      └───────────── any error, or no Ready within the limit ───────────────────────────────────────────▲
//! ```

use std::{
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use caisson_protos::{
    agent_ttrpc::AgentClient,
    guest::{AGENT_PORT, READY_PORT, Ready},
    monitor::ExitReason,
};
use caisson_vmm_client::{
    CallError, Child, Control, Ended, GuestStreams,
    control::{self, Answer},
};
use slog::{Logger, debug, error, info};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{UnixStream, unix::pipe},
    sync::{Notify, watch},
    time::timeout,
};
use ttrpc::asynchronous::{Client, transport::Socket};

use crate::{
    shim::errors::TaskError,
    vm::{
        dial::{DialError, Dialer},
        timeline::{Stage, Timeline, now_ns},
    },
};

/// A machine whose agent answers.
pub struct Machine {
    /// Opens streams to the guest.
    pub dialer: Arc<Dialer>,
    /// Calls to the agent.
    pub agent: AgentClient,
    /// Commands to the monitor.
    pub control: Control,
    rpc: Client,
}

impl Machine {
    /// Dials the agent.
    ///
    /// # Errors
    /// If it does not accept.
    pub async fn connect(dialer: Arc<Dialer>, control: Control) -> Result<Self, DialError> {
        let (stream, _) = dialer.dial(AGENT_PORT).await?;
        let rpc = Client::new(Socket::new(stream));
        Ok(Self { dialer, agent: AgentClient::new(rpc.clone()), control, rpc })
    }

    /// Calls the agent for an answer that can be large: one of more than `limit` bytes is refused before it is decoded,
    /// because a decoded message can take forty times the memory of its bytes.
    ///
    /// # Errors
    /// The call's; INTERNAL for an answer that is too large.
    pub async fn call_bounded<T: protobuf::Message>(
        &self,
        method: &str,
        request: &impl protobuf::Message,
        limit: usize,
    ) -> ttrpc::Result<T> {
        let refuse = |what: String| ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, what));
        let mut call = ttrpc::proto::Request::new();
        (call.service, call.method) = ("caisson.agent.v1.Agent".into(), method.into());
        call.payload = request.write_to_bytes().map_err(|error| refuse(error.to_string()))?;
        let answer = self.rpc.request(call).await?;
        if answer.payload.len() > limit {
            return Err(refuse(format!("the answer has {} bytes, more than {limit}", answer.payload.len())));
        }
        T::parse_from_bytes(&answer.payload).map_err(|error| refuse(format!("the answer cannot be read: {error}")))
    }
}

/// See the module's picture.
#[derive(Clone)]
pub enum MachineState {
    /// On its way.
    Booting,
    /// It can be used.
    Ready(Arc<Machine>),
    /// It has ended, or never came up; its processes are gone.
    Lost(Arc<str>),
}

/// What the rest of the shim has of the machine. Cheap to clone.
#[derive(Clone)]
pub struct MachineHandle {
    state: watch::Receiver<MachineState>,
    stop: Arc<Notify>,
}

/// The supervisor's end of a [`MachineHandle`].
pub struct MachineOwner {
    state: watch::Sender<MachineState>,
    stop: Arc<Notify>,
}

/// A handle and its owner.
pub fn machine() -> (MachineHandle, MachineOwner) {
    let (sender, receiver) = watch::channel(MachineState::Booting);
    let stop = Arc::new(Notify::new());
    (MachineHandle { state: receiver, stop: Arc::clone(&stop) }, MachineOwner { state: sender, stop })
}

impl MachineOwner {
    /// Publishes the state. Lost is the last one.
    pub fn set(&self, state: MachineState) {
        self.state.send_replace(state);
    }

    /// Whether it has not been ready yet.
    fn is_booting(&self) -> bool {
        matches!(*self.state.borrow(), MachineState::Booting)
    }

    /// Waits until somebody wants the machine to end.
    pub async fn stop_wanted(&self) {
        self.stop.notified().await;
    }
}

impl MachineHandle {
    /// Waits for the machine to be ready. The supervisor limits how long.
    ///
    /// # Errors
    /// Why it is not there.
    pub async fn ready(&self) -> Result<Arc<Machine>, TaskError> {
        let mut state = self.state.clone();
        match state.wait_for(|state| !matches!(state, MachineState::Booting)).await.as_deref() {
            Ok(MachineState::Ready(machine)) => Ok(Arc::clone(machine)),
            Ok(MachineState::Lost(reason)) => Err(TaskError::lost(reason.as_ref())),
            Ok(MachineState::Booting) | Err(_) => Err(TaskError::lost("the shim is ending")),
        }
    }

    /// The machine, if it is ready now.
    ///
    /// # Errors
    /// Why it is not there.
    pub fn get(&self) -> Result<Arc<Machine>, TaskError> {
        match &*self.state.borrow() {
            MachineState::Ready(machine) => Ok(Arc::clone(machine)),
            MachineState::Lost(reason) => Err(TaskError::lost(reason.as_ref())),
            MachineState::Booting => Err(TaskError::unavailable("the machine is still booting")),
        }
    }

    /// Whether it has ended, or never came up.
    pub fn is_lost(&self) -> bool {
        matches!(*self.state.borrow(), MachineState::Lost(_))
    }

    /// Waits until it is lost, and says why.
    pub async fn lost(&self) -> Arc<str> {
        let mut state = self.state.clone();
        match state.wait_for(|state| matches!(state, MachineState::Lost(_))).await.as_deref() {
            Ok(MachineState::Lost(reason)) => Arc::clone(reason),
            _ => "the machine's supervisor has ended".into(),
        }
    }

    /// Ends the machine and waits until its processes are gone.
    pub async fn stop(&self) {
        self.stop.notify_one();
        self.lost().await;
    }
}

/// The processes and descriptors of a machine that was just launched.
pub struct Launched {
    /// When caisson-vmm was spawned ([`now_ns`]).
    pub spawned_ns: u64,
    /// The files that it boots from, in words.
    pub image: String,
    /// caisson-vmm.
    pub vmm: Child,
    /// caisson-fsd.
    pub fsd: Child,
    /// The control socket, Configure and Start already sent.
    pub control: OwnedFd,
    /// Where the monitor announces the guest's streams.
    pub guest_streams: OwnedFd,
    /// What the guest's console says, if that is wanted.
    pub console: Option<OwnedFd>,
    /// Streams to the guest.
    pub dialer: Dialer,
}

/// How long a process that is ending may take to say why, or to be gone.
const LOSS_LIMIT: Duration = Duration::from_secs(1);
/// Reason of an end that somebody asked for.
const STOPPED: &str = "the machine was stopped";

/// Looks after the machine from its launch to its end.
pub async fn supervise(
    launched: Result<Launched, String>,
    owner: MachineOwner,
    limit: Duration,
    timeline: Arc<Timeline>,
    log: Logger,
) {
    let reason = match launched {
        Ok(launched) => run(launched, &owner, limit, &timeline, &log).await,
        Err(reason) => reason,
    };
    if reason == STOPPED {
        info!(log, "machine stopped");
    } else {
        error!(log, "machine lost"; "reason" => &reason);
    }
    owner.set(MachineState::Lost(reason.into()));
}

async fn run(launched: Launched, owner: &MachineOwner, limit: Duration, timeline: &Timeline, log: &Logger) -> String {
    let Launched { spawned_ns, image, mut vmm, mut fsd, control, guest_streams, console, dialer } = launched;
    timeline.mark_at(Stage::VmmSpawned, spawned_ns);
    if let Some(console) = console {
        tokio::spawn(log_console(console, log.clone()));
    }
    let reason = {
        let work = async {
            let (control, driver, configured, started) = control::attach(control).map_err(system)?;
            let streams = GuestStreams::new(guest_streams).map_err(system)?;
            let mut driver = tokio::spawn(driver.run());
            let boot = timeout(limit, boot(configured, started, &streams, (dialer, control), timeline, log));
            let booted = tokio::select! {
                biased;
                booted = boot => booted.unwrap_or_else(|_| Err(BootError::TooLong(limit))),
                ended = &mut driver => return Err(ended_words(ended.ok())),
            };
            match booted {
                Ok(machine) => owner.set(MachineState::Ready(Arc::new(machine))),
                // Its last words say more.
                Err(BootError::Monitor(CallError::Ended | CallError::Send(_)) | BootError::MonitorClosed) => {
                    return Err(ended_words(driver.await.ok()));
                }
                Err(error) => return Err(error.to_string()),
            }
            loop {
                tokio::select! {
                    ended = &mut driver => return Err(ended_words(ended.ok())),
                    // The guest has nothing more to say on streams of its own: dropped, which resets them.
                    stream = streams.next() => match stream {
                        Ok(Some((announced, _))) => {
                            debug!(log, "guest's stream refused"; "port" => announced.host_port);
                        }
                        Ok(None) => return Err(ended_words(driver.await.ok())),
                        Err(error) => return Err(system(error)),
                    },
                }
            }
        };
        let work = async { work.await.map_or_else(|reason| reason, |never: std::convert::Infallible| match never {}) };
        tokio::pin!(work);
        tokio::select! {
            biased;
            () = owner.stop_wanted() => STOPPED.to_owned(),
            reason = &mut work => reason,
            status = fsd.wait() => {
                let ended = format!("caisson-fsd ended: {}", status_words(&status));
                // In good order it ends only behind the monitor, whose own reason is the one to report.
                match status {
                    Ok(status) if status.success() => timeout(LOSS_LIMIT, work).await.unwrap_or(ended),
                    _ => ended,
                }
            }
        }
    };
    // A monitor that closed its socket is about to end; its exit status says more than that.
    let closed = reason == CLOSED;
    if !closed {
        vmm.kill();
    }
    fsd.kill();
    let status = match timeout(LOSS_LIMIT, vmm.wait()).await {
        Ok(status) => status,
        Err(_) => {
            vmm.kill();
            vmm.wait().await
        }
    };
    let _ = fsd.wait().await;
    let reason = if closed { format!("{CLOSED}: {}", status_words(&status)) } else { reason };
    // Before the agent answers, a bad kernel or initramfs is the likely cause: named.
    if reason != STOPPED && owner.is_booting() { format!("{reason}; it was booting from {image}") } else { reason }
}

const CLOSED: &str = "caisson-vmm ended without saying why";

fn system(error: io::Error) -> String {
    format!("the shim's connection to caisson-vmm failed: {error}")
}

fn ended_words(ended: Option<Ended>) -> String {
    match ended {
        Some(Ended::Notice(notice)) => {
            let hint = match notice.reason {
                ExitReason::Reset | ExitReason::TripleFault => " (debug_console = true shows the guest's last words)",
                _ => "",
            };
            let detail: String = notice.detail.chars().take(512).collect();
            format!("the machine ended: {}: {detail}{hint}", notice.reason.as_str())
        }
        Some(Ended::Closed) => CLOSED.to_owned(),
        Some(Ended::Broken(what)) => format!("caisson-vmm broke the control protocol: {what}"),
        None => "the shim's connection to caisson-vmm was lost".to_owned(),
    }
}

fn status_words(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(libc::SIGSYS)) => {
                "killed by signal 31 (SIGSYS): a system call that its filter forbids; journalctl -k --grep type=1326 has its number".into()
            }
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => status.to_string(),
        },
        Err(error) => format!("its exit status is unknown: {error}"),
    }
}

/// A boot that did not come to a ready agent.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error("the machine cannot start: {0}")]
    Monitor(#[from] CallError),
    #[error("the monitor closed before the guest was ready")]
    MonitorClosed,
    #[error("invalid ready message from the guest: {0}")]
    Ready(String),
    #[error("the agent does not answer: {0}")]
    Dial(#[from] DialError),
    #[error(
        "the guest's agent was not ready {0:?} after the start: debug_console = true shows what the guest is doing"
    )]
    TooLong(Duration),
}

async fn boot(
    configured: Answer,
    started: Answer,
    streams: &GuestStreams,
    (dialer, control): (Dialer, Control),
    timeline: &Timeline,
    log: &Logger,
) -> Result<Machine, BootError> {
    configured.wait().await?;
    started.wait().await?;
    timeline.mark(Stage::VmStarted);
    let ready = loop {
        match streams.next().await {
            Ok(Some((announced, stream))) if announced.host_port == READY_PORT => break read_ready(stream).await?,
            Ok(Some(_)) => {}
            Ok(None) => return Err(BootError::MonitorClosed),
            Err(error) => return Err(BootError::Ready(error.to_string())),
        }
    };
    let now = now_ns();
    timeline.mark_at(Stage::AgentReady, now);
    // The guest's clock and ours run alike; only the difference of two of its times is used.
    timeline.mark_at(Stage::Kernel, now.saturating_sub(ready.ready_ns.saturating_sub(ready.agent_started_ns)));
    let release: String = ready.kernel_release.chars().take(64).collect();
    debug!(log, "agent ready"; "kernel" => release);
    Ok(Machine::connect(Arc::new(dialer), control).await?)
}

/// Bytes of the longest ready message.
const MAX_READY: u64 = 256;

async fn read_ready(stream: std::os::unix::net::UnixStream) -> Result<Ready, BootError> {
    let invalid = |what: String| BootError::Ready(what);
    stream.set_nonblocking(true).map_err(|error| invalid(error.to_string()))?;
    let stream = UnixStream::from_std(stream).map_err(|error| invalid(error.to_string()))?;
    let mut bytes = Vec::new();
    stream.take(MAX_READY + 1).read_to_end(&mut bytes).await.map_err(|error| invalid(error.to_string()))?;
    if bytes.len() as u64 > MAX_READY {
        return Err(invalid(format!("longer than {MAX_READY} bytes")));
    }
    postcard::from_bytes(&bytes).map_err(|error| invalid(error.to_string()))
}

/// Longest line of the guest's console that is logged whole, bytes.
const MAX_CONSOLE_LINE: u64 = 512;

async fn log_console(console: OwnedFd, log: Logger) {
    let Ok(console) = pipe::Receiver::from_owned_fd(console) else { return };
    let log = log.new(slog::o!("guest" => "console"));
    let mut lines = BufReader::with_capacity(1024, console);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_CONSOLE_LINE).read_until(b'\n', &mut line).await {
            Ok(1..) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end();
                if !text.is_empty() {
                    info!(log, "{}", text);
                }
            }
            _ => break,
        }
    }
}

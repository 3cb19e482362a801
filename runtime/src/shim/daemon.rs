//! The shim's daemon, one for each pod. Its first act is the machine: everything that containerd does until it calls Create
//! (reading the address, connecting, preparing the request) the guest's kernel uses to boot.
//!
//! ```text
//!   main ─► log ─► configuration ─► config.json ─► mount namespace ─► launch ─► runtime: serve until Shutdown ─► clean up
//! ```
//!
//! Whatever fails before the runtime serves is kept and becomes the answer to Create, where a user sees it.

use std::{
    env,
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use slog::{Logger, error, info, warn};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    host::{
        config::Config,
        paths::{PodPaths, allow_missing},
        processes::raise_own_oom_score,
    },
    pod::{First, Limits, Pod, Provision, Provisions},
    rootfs::{binds, share::enter_mount_namespace},
    shim::{
        events::{Destination, Publisher},
        flags::Flags,
        service,
        start::{BEGAN, LISTENER_FD, TTRPC_ADDRESS},
    },
    spec::BundleSpec,
    vm::{
        launch::{self, LaunchError, launch},
        supervisor::{self, Launched},
        timeline::{Stage, Timeline, now_ns},
    },
};

/// How long the last events may take to reach containerd.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);
/// How long the last answers may take to leave.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Runs the daemon in the bundle directory, from its first moment to its end.
///
/// # Errors
/// Only what keeps it from serving at all; nobody sees it but the log.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    flags.check_names()?;
    let began = env::var(BEGAN).ok().and_then(|began| began.parse().ok()).unwrap_or_else(now_ns);
    // SAFETY: `start` put the listening socket there, and nothing else in this process knows the number.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(LISTENER_FD) });
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("no listening socket was passed")?;
    let bundle = env::current_dir().context("the bundle directory is gone")?;
    let config = Config::load();
    let level = config.as_ref().map_or(slog::Level::Info, |config| config.level(flags.debug));
    let sink = open_log(&bundle)?;
    let log = caisson_log::logger("shim", sink.try_clone().context("cannot copy the log")?, level);
    let log = log.new(slog::o!("pod" => flags.id.clone()));
    caisson_log::bridge(log.clone());
    std::panic::set_hook(Box::new({
        let log = log.clone();
        move |panic| error!(log, "the shim failed"; "panic" => panic.to_string())
    }));

    if let Err(error) = raise_own_oom_score() {
        warn!(log, "cannot set the shim's OOM score adjustment"; "error" => %error);
    }
    let timeline = Arc::new(Timeline::new(began));
    let prepared = Prepared::new(flags, config.map_err(|error| error.to_string()), &bundle, &sink);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let served = runtime.block_on(serve(flags, listener, prepared, timeline, log));
    // A file that output goes to may lie on a disk that does not answer: nobody waits for that.
    runtime.shutdown_background();
    served
}

/// What there is before the runtime: the machine, or why there is none.
struct Prepared {
    paths: PodPaths,
    /// What the daemon listens on.
    socket: PathBuf,
    boot_limit: Duration,
    provision: Provision,
    launched: Result<Launched, String>,
}

impl Prepared {
    fn new(flags: &Flags, config: Result<Config, String>, bundle: &Path, log: &File) -> Self {
        let state_dir = config.as_ref().map_or_else(|_| Config::default().state_dir, |config| config.state_dir.clone());
        let paths = PodPaths::new(&state_dir, &flags.namespace, &flags.id);
        let socket = paths.socket(&flags.address, &flags.namespace, &flags.id);
        let (boot_limit, provision) = (Duration::from_secs(30), Provision::Failed);
        let mut prepared = Self { paths, socket, boot_limit, provision, launched: Err(String::new()) };
        prepared.launched = config.and_then(|config| prepared.launch(&config, flags, bundle, log));
        prepared
    }

    fn launch(&mut self, config: &Config, flags: &Flags, bundle: &Path, log: &File) -> Result<Launched, String> {
        self.boot_limit = Duration::from_secs(config.boot_timeout_s.into());
        // What the specification asks for and cannot be is refused before anything starts.
        let spec = BundleSpec::read(bundle).and_then(|spec| spec.check_first().map(|()| spec));
        let spec = self.accept(spec)?;
        self.accept(binds::check(&spec.binds))?;
        let network = self.accept(spec.open_network())?;
        let host = enter_mount_namespace().map_err(|error| error.to_string())?;
        let (namespace, id, socket) = (&flags.namespace, &flags.id, &self.socket);
        let pod = launch::Pod { namespace, id, bundle, socket, spec: &spec, network: network.as_ref() };
        let launched = match launch(config, &self.paths, pod, log.as_fd()) {
            Err(error) if error.is_refusal() => self.accept(Err(error))?,
            launched => launched.map_err(|error: LaunchError| error.to_string())?,
        };
        self.provision = Provision::Ready(Box::new(Provisions {
            share: launched.share,
            first: Some(First { id: flags.id.clone(), spec, task: launched.task }),
            host,
            allotment: Some(launched.allotment),
            has_host_share: launched.has_host_share,
            network: launched.network,
        }));
        Ok(launched.machine)
    }

    /// Keeps what is wrong with the specification as the answer to Create.
    fn accept<T>(&mut self, checked: Result<T, impl ToString>) -> Result<T, String> {
        checked.map_err(|error| {
            let message = error.to_string();
            self.provision = Provision::Refused(message.clone());
            message
        })
    }
}

async fn serve(
    flags: &Flags,
    listener: UnixListener,
    prepared: Prepared,
    timeline: Arc<Timeline>,
    log: Logger,
) -> anyhow::Result<()> {
    let Prepared { paths, socket, boot_limit, provision, launched } = prepared;
    listener.set_nonblocking(true).context("the listening socket")?;
    let listener = tokio::net::UnixListener::from_std(listener).context("the listening socket")?;
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;

    let (handle, owner) = supervisor::machine();
    tokio::spawn(supervisor::supervise(launched, owner, boot_limit, Arc::clone(&timeline), log.clone()));
    let events = Publisher::start(destination(flags), &flags.namespace, log.clone());
    let pod = Pod::new(handle, provision, events.clone(), Limits::default(), Arc::clone(&timeline), log.clone());
    let mut server = Server::new().add_listener(Listener::from(listener)).register_service(service::services(&pod));
    server.start().await.context("cannot serve")?;
    timeline.mark(Stage::ShimStart);

    tokio::select! {
        () = pod.ended() => {}
        _ = terminate.recv() => end(&pod, &log, "SIGTERM").await,
        _ = interrupt.recv() => end(&pod, &log, "SIGINT").await,
    }
    // The answer to Shutdown, and what else is on its way, leaves before the process does.
    if tokio::time::timeout(ANSWER_LIMIT, server.shutdown()).await.is_err() {
        warn!(log, "responses unsent at exit");
    }
    events.flush(FLUSH_LIMIT).await;
    remove(&paths, &socket, &log);
    Ok(())
}

async fn end(pod: &Pod, log: &Logger, signal: &str) {
    info!(log, "ending"; "signal" => signal);
    pod.shutdown(true).await;
}

fn destination(flags: &Flags) -> Destination {
    match env::var(TTRPC_ADDRESS) {
        Ok(path) if !path.is_empty() => Destination::Ttrpc(path),
        _ => Destination::Command { program: PathBuf::from(&flags.publish_binary), address: flags.address.clone() },
    }
}

fn remove(paths: &PodPaths, socket: &Path, log: &Logger) {
    for (what, removed) in [("socket", allow_missing(std::fs::remove_file(socket))), ("directory", paths.remove())] {
        if let Err(error) = removed {
            error!(log, "cannot remove everything of the pod"; "what" => what, "error" => %error);
        }
    }
}

/// The bundle's log FIFO, which containerd reads; opened so that neither opening nor writing ever waits for it. Without one
/// (the shim was started by hand) log lines go to standard error.
fn open_log(bundle: &Path) -> anyhow::Result<File> {
    let mut fifo = File::options();
    // For reading, too: a FIFO that only writes cannot be opened while containerd is away.
    fifo.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    match fifo.open(bundle.join("log")) {
        Ok(fifo) => Ok(fifo),
        Err(_) => {
            let mut stderr = File::from(std::io::stderr().as_fd().try_clone_to_owned().context("no log")?);
            stderr.flush().context("no log")?;
            Ok(stderr)
        }
    }
}

//! `caisson-agent`: PID 1 of the guest. The same binary, re-executed with one argument, is the stage that becomes a
//! container's process.
//!
//! It has a C `main`. Before Rust's own, the runtime would open /dev/null, which does not exist before the agent has
//! mounted /dev, and abort; and each container would pay for the stack-overflow handler of a stage that lives for a
//! millisecond.

#![no_main]

use std::{
    convert::Infallible,
    ffi::{CStr, c_char, c_int},
    path::PathBuf,
};

use anyhow::Context;
use caisson_agent::{
    boot,
    cgroup::Cgroups,
    containers::{Containers, Share},
    forward,
    launch::Launcher,
    power,
    reaper::Reaper,
    service, stage,
    streams::Streams,
    transport::{HostOnly, connect_host},
};
use caisson_protos::guest::{AGENT_PORT, FORWARD_PORT, READY_PORT, Ready, SHARE_MOUNT, STDIO_PORT};
use slog::{Level, Logger, error, info, warn};
use tokio::io::AsyncWriteExt;

/// Called by the C library's start code.
#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    // SAFETY: the C library hands over `argc` valid strings that live as long as the process.
    let argument = (argc > 1).then(|| unsafe { CStr::from_ptr(*argv.add(1)) });
    if argument.is_some_and(|argument| argument.to_bytes() == stage::ARGUMENT.as_bytes()) {
        return stage::main().into();
    }
    if std::process::id() != 1 {
        eprintln!("caisson-agent: it runs as PID 1 of a Caisson guest and has nothing to do elsewhere");
        return 2;
    }
    agent()
}

fn agent() -> c_int {
    let started_ns = boottime_ns();
    let booted = boot::prepare();
    let log = match boot::kernel_log() {
        Some(kmsg) => caisson_log::logger("agent", kmsg, Level::Info),
        None => caisson_log::logger("agent", std::io::stderr(), Level::Info),
    };
    caisson_log::bridge(log.clone());
    // The machine ends with a panic of its PID 1; without a console the kernel's log is the only witness.
    let last_words = log.clone();
    std::panic::set_hook(Box::new(move |panic| error!(last_words, "{}", panic)));
    let result = booted.context("prepare the guest").and_then(|()| run(started_ns, &log));
    let Err(error) = result;
    error!(log, "the agent cannot go on, powering off"; "error" => format!("{error:#}"));
    end(&log);
    1
}

fn run(started_ns: u64, log: &Logger) -> anyhow::Result<Infallible> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let calls = HostOnly::listen(AGENT_PORT).with_context(|| format!("listen on vsock port {AGENT_PORT}"))?;
        let stdio = HostOnly::listen(STDIO_PORT).with_context(|| format!("listen on vsock port {STDIO_PORT}"))?;
        let forwards =
            HostOnly::listen(FORWARD_PORT).with_context(|| format!("listen on vsock port {FORWARD_PORT}"))?;
        let reaper = Reaper::new().context("handle SIGCHLD")?;
        let cgroups = Cgroups::prepare(boot::CGROUP_MOUNT.as_ref())?;
        if let Err(error) = cgroups.keep_for_agent() {
            warn!(log, "no memory is kept for the agent"; "error" => %error);
        }
        let launcher = Launcher::new(PathBuf::from("/proc/self/exe")).context("open the agent's pid namespace")?;
        let streams = Streams::default();
        let share = Share::VirtioFs(SHARE_MOUNT.into());
        let containers = Containers::new(share, cgroups, launcher, streams.clone(), log.clone());
        let power_log = log.clone();
        let power_off = Box::new(move || end(&power_log));
        let _server = service::serve(calls, stdio, streams, containers.clone(), power_off, log.clone()).await?;
        tokio::spawn(forward::serve(forwards, log.clone()));
        tokio::spawn(announce(started_ns, log.clone()));
        reaper.run(containers).await;
        anyhow::bail!("no more SIGCHLD from the runtime: children cannot be reaped")
    })
}

/// Says that everything listens. A host that cannot hear it would wait in vain, so the machine ends then.
async fn announce(started_ns: u64, log: Logger) {
    let kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
    let said = async {
        let mut stream = connect_host(READY_PORT).await?;
        let ready = Ready { kernel_release, agent_started_ns: started_ns, ready_ns: boottime_ns() };
        stream.write_all(&postcard::to_stdvec(&ready).map_err(std::io::Error::other)?).await?;
        AsyncWriteExt::shutdown(&mut stream).await
    };
    match said.await {
        Ok(()) => info!(log, "ready"),
        Err(error) => {
            error!(log, "cannot report to the host that the agent is ready"; "port" => READY_PORT, "error" => %error)
        }
    }
}

fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// Ends the machine, by whatever means there are.
fn end(log: &Logger) {
    let error = power::off();
    error!(log, "cannot power off through the monitor's port, trying the kernel"; "error" => %error);
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        error!(log, "cannot power off"; "error" => %error);
    }
}

//! Runs hooks on the host: in the host's mount namespace with the bundle as the working directory, as runc runs them,
//! the container's state as JSON on standard input. Input and output are files in memory, so that no hook waits for the
//! shim or the shim for what a hook has left running.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use caisson_vmm_client::process::open_pidfd;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{Pid, chdir},
};
use serde_json::json;
use tokio::sync::oneshot;

use crate::{
    host::namespaces::HostView,
    spec::{BundleSpec, hooks::Hook},
};

/// At most this much of a failed hook's output is reported, in bytes.
const MAX_WORDS: u64 = 1024;
/// A stack for a few system calls, bytes.
const STACK: usize = 256 * 1024;

/// A hook that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("{field}: cannot run {path:?}: {source}")]
    Run {
        /// The specification's field.
        field: String,
        /// The program.
        path: String,
        /// The error.
        source: io::Error,
    },
    /// It says that it failed.
    #[error("{field}: {path:?} ended with {status}: {words}")]
    Failed {
        /// The specification's field.
        field: String,
        /// The program.
        path: String,
        /// How.
        status: ExitStatus,
        /// What it wrote last.
        words: String,
    },
    /// It took too long and was killed.
    #[error("{field}: {path:?} did not end within {limit:?} (its timeout) and was killed")]
    TooLong {
        /// The specification's field.
        field: String,
        /// The program.
        path: String,
        /// The hook's timeout.
        limit: Duration,
    },
}

/// What is still to run for a container.
#[derive(Debug)]
pub struct Pending {
    /// Where they run.
    pub bundle: PathBuf,
    /// Once it has been started.
    pub poststart: Vec<Hook>,
    /// The state that those get.
    pub running: State,
    /// Once it is gone.
    pub poststop: Vec<Hook>,
    /// The state that those get.
    pub stopped: State,
}

/// The container's state as hooks get it (the runtime specification's "State").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    json: String,
}

impl State {
    /// `status` is creating, created, running or stopped; `pid` is the task's on the host, None once it is gone.
    pub fn new(spec: &BundleSpec, id: &str, status: &str, pid: Option<u32>, bundle: &Path) -> Self {
        let mut state = json!({
            "ociVersion": spec.version,
            "id": id,
            "status": status,
            "bundle": bundle,
            "annotations": spec.annotations,
        });
        if let (Some(pid), Some(state)) = (pid, state.as_object_mut()) {
            state.insert("pid".into(), pid.into());
        }
        Self { json: state.to_string() }
    }
}

/// In the bundle while poststop hooks are still to run: the state that they get. `delete` runs them after a crash.
const OWED: &str = "poststop.json";

/// Writes down that a container has poststop hooks to run.
///
/// # Errors
/// What the file system says.
pub fn owe(state: &State, bundle: &Path) -> io::Result<()> {
    fs::write(bundle.join(OWED), &state.json)
}

/// They are about to run. Whether that was still to be done.
pub fn settle(bundle: &Path) -> bool {
    fs::remove_file(bundle.join(OWED)).is_ok()
}

/// Runs the poststop hooks that a crashed shim has left, in the calling process's own mount namespace, which must be
/// the host's. What went wrong, in sentences.
pub fn run_pending(bundle: &Path) -> Vec<String> {
    let Ok(json) = fs::read_to_string(bundle.join(OWED)) else { return Vec::new() };
    let (spec, host) = (BundleSpec::read(bundle), HostView::here());
    settle(bundle);
    match (spec, host) {
        (Ok(spec), Ok(host)) => {
            let state = State { json };
            let run = |hook: &Hook| run_here(hook, &state, bundle, &host).err().map(|error| error.to_string());
            spec.hooks.poststop.iter().filter_map(run).collect()
        }
        (Err(error), _) => vec![error.to_string()],
        (_, Err(error)) => vec![error.to_string()],
    }
}

/// Runs one hook to its end.
///
/// # Errors
/// See [`HookError`].
pub async fn run(hook: &Hook, state: &State, bundle: &Path, host: &HostView) -> Result<(), HookError> {
    let (sender, receiver) = oneshot::channel();
    let (field, path) = (hook.field.clone(), hook.path.display().to_string());
    let failed = move |source| HookError::Run { field, path, source };
    let (hook, state, bundle, host) = (hook.clone(), state.clone(), bundle.to_owned(), host.clone());
    // A thread, because waiting for a child without one would need a handler of signals for the whole process.
    let thread = thread::Builder::new().name("hook".into()).stack_size(STACK);
    let running = thread.spawn(move || drop(sender.send(run_here(&hook, &state, &bundle, &host))));
    match running {
        Err(error) => Err(failed(error)),
        Ok(_) => receiver.await.unwrap_or_else(|_| Err(failed(io::Error::other("the thread that ran it failed")))),
    }
}

fn run_here(hook: &Hook, state: &State, bundle: &Path, host: &HostView) -> Result<(), HookError> {
    let (field, path) = (|| hook.field.clone(), || hook.path.display().to_string());
    let cannot = |source| HookError::Run { field: field(), path: path(), source };
    let deadline = hook.timeout.map(|limit| Instant::now() + limit);
    let mut words = memory().map_err(cannot)?;
    let mut child = spawn(hook, state, bundle, host, &words).map_err(cannot)?;
    let status = match wait(&mut child, deadline) {
        Ok(Some(status)) => status,
        ended => {
            let _ = child.kill();
            let _ = child.wait();
            return match ended {
                Err(error) => Err(cannot(error)),
                Ok(_) => {
                    Err(HookError::TooLong { field: field(), path: path(), limit: hook.timeout.unwrap_or_default() })
                }
            };
        }
    };
    if status.success() {
        return Ok(());
    }
    Err(HookError::Failed { field: field(), path: path(), status, words: last_words(&mut words) })
}

fn memory() -> io::Result<File> {
    Ok(memfd_create(c"caisson-hook", MFdFlags::MFD_CLOEXEC)?.into())
}

fn spawn(hook: &Hook, state: &State, bundle: &Path, host: &HostView, words: &File) -> io::Result<Child> {
    let mut input = memory()?;
    input.write_all(state.json.as_bytes())?;
    input.rewind()?;
    let bundle = CString::new(bundle.as_os_str().as_bytes())?;
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command.env_clear();
    command.envs(hook.env.iter().filter_map(|variable| variable.split_once('=')));
    command.stdin(input).stdout(words.try_clone()?).stderr(Stdio::from(words.try_clone()?));
    let host = host.clone();
    // SAFETY: between fork and exec the closure makes only system calls (setns, chdir) on what was made before.
    unsafe {
        command.pre_exec(move || {
            host.enter()?;
            Ok(chdir(bundle.as_c_str())?)
        });
    }
    command.spawn()
}

/// Waits for the end; None if `deadline` comes first.
fn wait(child: &mut Child, deadline: Option<Instant>) -> io::Result<Option<ExitStatus>> {
    let Some(deadline) = deadline else { return child.wait().map(Some) };
    let pidfd = open_pidfd(Pid::from_raw(child.id().cast_signed()))?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), PollFlags::POLLIN)], left) {
            Ok(1..) => return child.wait().map(Some),
            Ok(_) if Instant::now() >= deadline => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The end of what a hook wrote, on one line.
fn last_words(words: &mut File) -> String {
    let mut bytes = Vec::new();
    let length = words.metadata().map_or(0, |metadata| metadata.len());
    let read = words
        .seek(io::SeekFrom::Start(length.saturating_sub(MAX_WORDS)))
        .and_then(|_| words.take(MAX_WORDS).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if read.is_err() || line.is_empty() { "it wrote nothing".into() } else { line }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, path::PathBuf};

    use nix::mount::{MsFlags, mount};
    use serde_json::Value;

    use super::*;
    use crate::rootfs::share::enter_mount_namespace;

    struct Stage {
        bundle: tempfile::TempDir,
        host: HostView,
    }

    fn stage() -> Stage {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(
            bundle.path().join("config.json"),
            json!({
                "ociVersion": "1.0.2", "annotations": { "a": "b" },
                "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
                "root": { "path": "rootfs" },
                "linux": { "namespaces": [
                    { "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }
                ] },
            })
            .to_string(),
        )
        .unwrap();
        Stage { bundle, host: enter_mount_namespace().expect("these tests run as root") }
    }

    impl Stage {
        fn hook(&self, script: &str, timeout: Option<u64>) -> Hook {
            let path = self.bundle.path().join("hook");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            Hook {
                field: "hooks.prestart[0]".into(),
                path,
                args: vec!["zero".into(), "one two".into()],
                env: vec!["KEY=value=x".into(), "PATH=/bin:/usr/bin".into()],
                timeout: timeout.map(Duration::from_secs),
            }
        }

        async fn run(&self, hook: &Hook) -> Result<(), HookError> {
            let spec = BundleSpec::read(self.bundle.path()).unwrap();
            let state = State::new(&spec, "one", "creating", Some(4711), self.bundle.path());
            run(hook, &state, self.bundle.path(), &self.host).await
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.bundle.path().join(name)).unwrap()
        }
    }

    #[tokio::test]
    async fn a_hook_gets_its_words_and_the_containers_state() {
        let stage = stage();
        let hook = stage.hook("cat > state; echo \"$1\" > arguments; env > environment; pwd > directory", Some(60));
        stage.run(&hook).await.unwrap();
        let state: Value = serde_json::from_str(&stage.read("state")).unwrap();
        let bundle = stage.bundle.path();
        let expected = json!({
            "ociVersion": "1.0.2", "id": "one", "status": "creating", "pid": 4711, "bundle": bundle, "annotations": { "a": "b" },
        });
        assert_eq!(state, expected);
        assert_eq!(stage.read("arguments"), "one two\n");
        assert_eq!(PathBuf::from(stage.read("directory").trim()), bundle);
        let environment = stage.read("environment");
        assert!(environment.contains("KEY=value=x\n") && !environment.contains("CARGO"), "{environment}");
    }

    #[tokio::test]
    async fn a_hook_runs_in_the_hosts_mount_namespace() {
        let stage = stage();
        // Hides the bundle from the shim's own.
        let hook = stage.hook("echo here > seen", None);
        let hidden = tempfile::tempdir().unwrap();
        mount(Some(stage.bundle.path()), hidden.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        mount(Some("t"), stage.bundle.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::copy(hidden.path().join("config.json"), stage.bundle.path().join("config.json")).unwrap();
        stage.run(&hook).await.unwrap();
        assert!(hidden.path().join("seen").exists() && !stage.bundle.path().join("seen").exists());
    }

    #[tokio::test]
    async fn failures_are_reported_with_the_field_and_the_last_words() {
        let stage = stage();
        let message = stage.run(&stage.hook("echo first; echo oh >&2; exit 3", None)).await.unwrap_err().to_string();
        for word in ["hooks.prestart[0]", "/hook", "exit status: 3", "first oh"] {
            assert!(message.contains(word), "{word}: {message}");
        }
        let missing = Hook { path: "/no/such/hook".into(), ..stage.hook("", None) };
        let message = stage.run(&missing).await.unwrap_err().to_string();
        assert!(message.contains("cannot run \"/no/such/hook\"") && message.contains("No such file"), "{message}");
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_killed() {
        let stage = stage();
        let hook = stage.hook("echo $$ > pid; exec sleep 1000", Some(1));
        assert!(matches!(stage.run(&hook).await, Err(HookError::TooLong { .. })));
        let pid = stage.read("pid");
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "it is gone and reaped");
    }

    #[tokio::test]
    async fn what_a_hook_leaves_running_is_not_waited_for() {
        let stage = stage();
        let hook = stage.hook("sleep 1000 & echo $! > pid", None);
        stage.run(&hook).await.unwrap();
        let pid = stage.read("pid").trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

//! The `start` command: containerd waits for it, so it does the least there is to do. It binds the socket, lets the daemon go
//! (which begins with the machine at once) and prints the socket's address, in the form that this containerd reads:
//!
//! | containerd | asks by                               | is answered                                  |
//! |------------|---------------------------------------|----------------------------------------------|
//! | 1.6, 1.7   | flags and environment                 | the address                                  |
//! | 2.0 to 2.2 | the same, MAX_SHIM_VERSION=3 or more  | JSON: version 3, address, protocol           |
//! | 2.3 on     | BootstrapParams on standard input     | BootstrapResult, protobuf                    |

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use containerd_shim_protos::{
    TASK_API_VERSION,
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
};
use protobuf::{Enum, Message, well_known_types::any::Any};

use crate::{
    host::{
        config::{Config, PATH_VARIABLE},
        paths::PodPaths,
    },
    shim::{flags::Flags, options},
    vm::timeline::now_ns,
};

/// containerd's socket for events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// The newest task API that containerd speaks.
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// When `start` began ([`now_ns`]), for the daemon's timeline.
pub const BEGAN: &str = "CAISSON_BEGAN_NS";
/// Where the daemon finds its listening socket.
pub const LISTENER_FD: i32 = 3;
/// The most that is read from standard input, bytes.
const MAX_INPUT: u64 = 10 << 20;

/// How containerd wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Address,
    Json,
    Bootstrap,
}

/// What containerd asked for, whichever way it did.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    reply: Reply,
    /// containerd's socket for events, if it came with the request and not by the environment.
    ttrpc_address: Option<String>,
    debug: bool,
    config: Option<PathBuf>,
}

impl Request {
    fn read(flags: &Flags, input: &[u8], max_version: Option<&str>) -> anyhow::Result<Self> {
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && !input.is_empty()
            // An Any of the older way parses as these parameters, too, with its type as the id.
            && (params.instance_id == flags.id && params.namespace == flags.namespace)
        {
            let mut config = None;
            for extension in &params.extensions {
                config = config.or(extension.value.as_ref().map(options::config_path).transpose()?.flatten());
            }
            return Ok(Self {
                reply: Reply::Bootstrap,
                ttrpc_address: Some(params.containerd_ttrpc_address).filter(|address| !address.is_empty()),
                debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
                config,
            });
        }
        let options = Any::parse_from_bytes(input)
            .context("standard input is neither runtime options nor bootstrap parameters")?;
        let json = max_version.and_then(|version| version.parse::<i32>().ok()).is_some_and(|version| version >= 3);
        Ok(Self {
            reply: if json { Reply::Json } else { Reply::Address },
            ttrpc_address: None,
            debug: flags.debug,
            config: options::config_path(&options)?,
        })
    }
}

impl Reply {
    fn encode(self, address: &str) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::Address => address.as_bytes().to_vec(),
            Self::Json => serde_json::to_vec(
                &serde_json::json!({ "version": TASK_API_VERSION, "address": address, "protocol": "ttrpc" }),
            )?,
            Self::Bootstrap => BootstrapResult {
                version: TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            }
            .write_to_bytes()?,
        })
    }
}

/// Runs `start` in the bundle directory; what to print.
///
/// # Errors
/// Whatever keeps the daemon from being started.
pub fn start(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    let began = now_ns();
    flags.check_names()?;
    let request = Request::read(flags, &read_input()?, env::var(MAX_SHIM_VERSION).ok().as_deref())?;
    if let Some(path) = &request.config {
        // SAFETY: this process has one thread.
        unsafe { env::set_var(PATH_VARIABLE, path) };
    }
    // A configuration that cannot be used is Create's error; the socket then lies where it would without one.
    let state_dir = Config::load().unwrap_or_default().state_dir;
    let paths = PodPaths::new(&state_dir, &flags.namespace, &flags.id);
    let socket = paths.socket(&flags.address, &flags.namespace, &flags.id);
    let address = format!("unix://{}", socket.display());
    // containerd 1.6 reads this file to find the shim again after its own restart.
    fs::write("address", &address).context("cannot write the bundle's address file")?;
    if let Some(listener) = bind(&paths.sockets(), &socket)? {
        let pid = spawn_daemon(flags, &request, listener.into(), began);
        let pid = pid.inspect_err(|_| drop(fs::remove_file(&socket)))?;
        fs::write("shim.pid", pid.to_string()).context("cannot write the bundle's shim.pid")?;
    }
    request.reply.encode(&address)
}

fn read_input() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    // SAFETY: descriptor 0 is open in every program that containerd starts; it is borrowed for this call alone.
    let stdin = unsafe { BorrowedFd::borrow_raw(0) };
    let mut stdin = File::from(stdin.try_clone_to_owned().context("cannot read standard input")?);
    let kind = stdin.metadata().context("cannot read standard input")?.file_type();
    // Nobody types parameters at a terminal, and /dev/null has none.
    if !kind.is_char_device() {
        Read::by_ref(&mut stdin).take(MAX_INPUT).read_to_end(&mut input).context("cannot read standard input")?;
    }
    Ok(input)
}

/// The listening socket; None if a living shim has it already.
fn bind(directory: &Path, socket: &Path) -> anyhow::Result<Option<UnixListener>> {
    let failed = || format!("cannot bind {}", socket.display());
    match UnixListener::bind(socket) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(directory).with_context(failed)?;
            Ok(Some(UnixListener::bind(socket).with_context(failed)?))
        }
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Ok(None);
            }
            fs::remove_file(socket).with_context(failed)?;
            Ok(Some(UnixListener::bind(socket).with_context(failed)?))
        }
        Err(error) => Err(error).with_context(failed),
    }
}

/// Starts this program again as the daemon: a session of its own, no standard descriptors, the socket as descriptor 3.
fn spawn_daemon(flags: &Flags, request: &Request, listener: OwnedFd, began: u64) -> anyhow::Result<u32> {
    let mut daemon = Command::new("/proc/self/exe");
    daemon.arg0("containerd-shim-caisson-v2");
    daemon.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    daemon.args(["-publish-binary", &flags.publish_binary]);
    if request.debug {
        daemon.arg("-debug");
    }
    daemon.env(BEGAN, began.to_string());
    if let Some(address) = &request.ttrpc_address {
        daemon.env(TTRPC_ADDRESS, address);
    }
    daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Descriptor 3 may be taken, by the listener itself or by the standard library; a copy above it is neither.
    let copy = nix::fcntl::fcntl(listener.as_fd(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(LISTENER_FD + 1))?;
    // SAFETY: fcntl has just made this descriptor for us.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // 3 stays taken until the daemon has its program, so the standard library's own descriptors get other numbers.
    let occupied = File::open("/dev/null")?;
    if listener.as_raw_fd() != LISTENER_FD && occupied.as_raw_fd() != LISTENER_FD && !is_open(LISTENER_FD) {
        bail!("descriptor {LISTENER_FD} cannot be kept free for the daemon");
    }
    // SAFETY: between fork and exec the closure makes only async-signal-safe calls and allocates nothing.
    unsafe {
        daemon.pre_exec(move || {
            nix::unistd::setsid()?;
            if libc::dup2(copy.as_raw_fd(), LISTENER_FD) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(daemon.spawn().context("cannot start the shim's daemon")?.id())
}

fn is_open(fd: i32) -> bool {
    // SAFETY: F_GETFD reads one flag of a descriptor, or fails.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;
    use protobuf::MessageField;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "one".into(), namespace: "ns".into(), ..Flags::default() }
    }

    fn generic(path: &str) -> Any {
        let value = [b"\x12", &[u8::try_from(path.len()).unwrap()][..], path.as_bytes()].concat();
        Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    #[test]
    fn each_containerd_is_answered_in_its_own_form() {
        let plain = Request::read(&flags(), b"", None).unwrap();
        assert_eq!(plain.reply.encode("unix:///s").unwrap(), b"unix:///s");
        assert_eq!(Request::read(&flags(), b"", Some("2")).unwrap().reply, Reply::Address);
        let json = Request::read(&flags(), b"", Some("4")).unwrap().reply.encode("unix:///s").unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json, serde_json::json!({ "version": 3, "address": "unix:///s", "protocol": "ttrpc" }));
        let params = BootstrapParams {
            instance_id: "one".into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "/c.ttrpc".into(),
            extensions: vec![Extension { value: MessageField::some(generic("/c.toml")), ..Extension::default() }],
            ..BootstrapParams::default()
        };
        let bootstrap = Request::read(&flags(), &params.write_to_bytes().unwrap(), Some("4")).unwrap();
        assert_eq!(bootstrap.reply, Reply::Bootstrap);
        assert_eq!((bootstrap.ttrpc_address, bootstrap.config), (Some("/c.ttrpc".into()), Some("/c.toml".into())));
        let result = BootstrapResult::parse_from_bytes(&bootstrap.reply.encode("unix:///s").unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
    }

    #[test]
    fn options_on_standard_input_name_the_configuration_or_are_refused_by_type() {
        let request = Request::read(&flags(), &generic("/c.toml").write_to_bytes().unwrap(), None).unwrap();
        assert_eq!((request.reply, request.config), (Reply::Address, Some("/c.toml".into())));
        let runc = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![8, 1], ..Any::default() };
        let refused = Request::read(&flags(), &runc.write_to_bytes().unwrap(), None).unwrap_err().to_string();
        assert!(refused.contains("containerd.runc.v1.Options"), "{refused}");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_kept() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = directory.path().join("s");
        let socket = sockets.join("x.sock");
        let listener = bind(&sockets, &socket).unwrap().expect("a new one");
        assert!(bind(&sockets, &socket).unwrap().is_none(), "somebody listens");
        drop(listener);
        assert!(bind(&sockets, &socket).unwrap().is_some(), "nobody listens any more");
    }
}

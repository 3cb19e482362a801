//! The shim binary of the runtime `io.containerd.caisson.v2`: containerd runs `start` and `delete`, and `start` runs the daemon.

use std::{env, io::Write, process::ExitCode};

use anyhow::bail;
use caisson_runtime::shim::{daemon, delete, flags::Flags, info, start};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-caisson-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let flags = Flags::parse(env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()))?;
    let output = if flags.version {
        info::version().into_bytes()
    } else if flags.info {
        info::runtime_info()?
    } else {
        match flags.action.as_str() {
            "start" => start::start(&flags)?,
            "delete" => delete::delete(&flags)?,
            "" => return daemon::run(&flags),
            other => bail!("unknown action {other:?}: start and delete are known"),
        }
    };
    std::io::stdout().write_all(&output)?;
    Ok(())
}

//! The operator's command.

use std::{io::stdout, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Caisson: a containerd runtime that gives each pod a machine of its own.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Check whether this host is fit to run pods; exit status 1 if something is missing.
    Check,
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Action::Check => {
            let fit = caisson_runtime::host::check::check(&mut stdout().lock()).context("cannot print")?;
            Ok(if fit { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

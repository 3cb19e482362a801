//! What a call can answer instead of success.

use std::io;

use ttrpc::Code;

use crate::{
    cgroup::CgroupError,
    launch::LaunchError,
    lifecycle::StateError,
    plan::{Failure, FailureKind},
    spec::SpecError,
    streams::ClaimError,
};

pub(super) type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that cannot be one.
    #[error("{field}: {name:?} is not 1 to 76 characters of [A-Za-z0-9._-] beginning with a letter or digit")]
    Name {
        /// The request's field.
        field: &'static str,
        /// Its value.
        name: String,
    },
    /// A path that cannot be one.
    #[error("{field}: {path:?} is not a relative path without \"..\"")]
    Path {
        /// The request's field.
        field: &'static str,
        /// Its value.
        path: String,
    },
    /// A signal that does not exist.
    #[error("signal: {0} is not between 1 and 64")]
    Signal(u32),
    /// A size that no terminal has.
    #[error("{field}: {value} exceeds 65535 cells")]
    Cells {
        /// The request's field.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// Streams that contradict each other.
    #[error("stdio.stderr_port: {0} with a terminal, whose stdout carries both")]
    StderrWithTerminal(u32),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The streams.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Unknown.
    #[error("container {0:?} not found")]
    NoContainer(String),
    /// Unknown.
    #[error("exec {exec:?} of container {container:?} not found")]
    NoExec {
        /// The container's name.
        container: String,
        /// The exec's name.
        exec: String,
    },
    /// The name is in use.
    #[error("{0:?} already exists")]
    Exists(String),
    /// Not now.
    #[error("{who}: {error}")]
    State {
        /// The container or exec.
        who: String,
        /// Where it is and where it would have to be.
        error: StateError,
    },
    /// Not this one.
    #[error("{0}: the process has no terminal")]
    NoTerminal(String),
    /// Another call is at it.
    #[error("{0}: it is being deleted")]
    Deleting(String),
    /// The kernel refused a cgroup or a limit.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The kernel refused a process.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The stage reported its failure.
    #[error(transparent)]
    Stage(#[from] Failure),
    /// The stage could not tell.
    #[error("the process's stage ended before it was ready")]
    StageEnded,
    /// Something took too long.
    #[error("{what} took more than {seconds} s")]
    TimedOut {
        /// What.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The kernel refused something else.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
}

impl Error {
    /// The status that agent.proto promises for it.
    pub fn code(&self) -> Code {
        match self {
            Self::Name { .. }
            | Self::Path { .. }
            | Self::Signal(_)
            | Self::Cells { .. }
            | Self::StderrWithTerminal(_)
            | Self::Spec(_)
            | Self::Cgroup(CgroupError::Limit(_)) => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoExec { .. } | Self::State { error: StateError::Finished, .. } => {
                Code::NOT_FOUND
            }
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Claim(_) | Self::State { .. } | Self::NoTerminal(_) | Self::Deleting(_) => Code::FAILED_PRECONDITION,
            Self::Stage(failure) => match failure.kind {
                FailureKind::NotFound => Code::NOT_FOUND,
                FailureKind::Invalid => Code::INVALID_ARGUMENT,
                FailureKind::Internal => Code::INTERNAL,
            },
            Self::Cgroup(CgroupError::Io { .. } | CgroupError::Devices { .. } | CgroupError::Late { .. })
            | Self::Launch(_)
            | Self::StageEnded
            | Self::TimedOut { .. }
            | Self::Io { .. } => Code::INTERNAL,
        }
    }
}

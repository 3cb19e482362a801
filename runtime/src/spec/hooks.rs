//! The hooks that run on the host. (createContainer and startContainer run in the guest: the agent's.)

use std::{path::PathBuf, time::Duration};

use caisson_oci::{FieldError, hooks::Program};
use oci_spec::runtime::{Hook as SpecHook, Spec};

/// One program to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The specification's name of it.
    pub field: String,
    /// Absolute.
    pub path: PathBuf,
    /// With the program's own name in front.
    pub args: Vec<String>,
    /// `KEY=value`, all that it gets.
    pub env: Vec<String>,
    /// How long it may take; None: as long as it likes.
    pub timeout: Option<Duration>,
}

/// All of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// prestart, then createRuntime.
    pub create: Vec<Hook>,
    /// poststart.
    pub poststart: Vec<Hook>,
    /// poststop.
    pub poststop: Vec<Hook>,
    /// How long those in the guest (createContainer, startContainer) may take together.
    pub in_guest: Duration,
}

/// How long the agent lets a hook without a timeout of its own run.
const GUEST_HOOK: Duration = Duration::from_secs(600);

fn in_guest(hooks: &Option<Vec<SpecHook>>) -> Duration {
    let limit =
        |hook: &SpecHook| hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    hooks.iter().flatten().map(|hook| limit(hook).unwrap_or(GUEST_HOOK)).fold(Duration::ZERO, Duration::saturating_add)
}

pub(super) fn check(spec: &Spec) -> Result<Hooks, FieldError> {
    let Some(hooks) = spec.hooks() else { return Ok(Hooks::default()) };
    #[allow(deprecated, reason = "prestart is out of fashion and in use")]
    let prestart = hooks.prestart();
    let mut create = list("prestart", prestart)?;
    create.extend(list("createRuntime", hooks.create_runtime())?);
    Ok(Hooks {
        create,
        poststart: list("poststart", hooks.poststart())?,
        poststop: list("poststop", hooks.poststop())?,
        in_guest: in_guest(hooks.create_container()).saturating_add(in_guest(hooks.start_container())),
    })
}

fn list(kind: &str, hooks: &Option<Vec<SpecHook>>) -> Result<Vec<Hook>, FieldError> {
    hooks.iter().flatten().enumerate().map(|(index, hook)| one(format!("hooks.{kind}[{index}]"), hook)).collect()
}

fn one(field: String, hook: &SpecHook) -> Result<Hook, FieldError> {
    let Program { field, path, args, env, timeout } = Program::of(field, hook)?;
    let timeout = timeout.map(|seconds| Duration::from_secs(seconds.into()));
    Ok(Hook { field, path, args, env: env.unwrap_or_default(), timeout })
}

//! The hooks that run on the host, at their moments in a container's life: prestart and createRuntime before the agent
//! makes it, poststart when it runs, poststop when it is gone. One of the first two that fails fails Create, the others
//! are logged.

use std::path::Path;

use slog::warn;

use super::Pod;
use crate::{
    host::hooks::{Pending, State, owe, run, settle},
    pod::tasks::Name,
    shim::errors::TaskError,
    spec::{BundleSpec, hooks::Hook},
};

impl Pod {
    /// Runs those of a container that is about to be created, and remembers the rest.
    pub(super) async fn run_create_hooks(
        &self,
        name: &Name,
        spec: &BundleSpec,
        pid: u32,
        bundle: &Path,
    ) -> Result<(), TaskError> {
        let state = |status, pid| State::new(spec, &name.container, status, pid, bundle);
        let hooks = &spec.hooks;
        if *hooks == Default::default() {
            return Ok(());
        }
        self.tasks().container(&name.container)?.hooks = Some(Box::new(Pending {
            bundle: bundle.to_owned(),
            poststart: hooks.poststart.clone(),
            running: state("running", Some(pid)),
            poststop: hooks.poststop.clone(),
            stopped: state("stopped", None),
        }));
        if !hooks.poststop.is_empty()
            && let Err(error) = owe(&state("stopped", None), bundle)
        {
            warn!(self.log, "cannot persist poststop hooks: they will not run after a crash of the shim"; "error" => %error);
        }
        let creating = state("creating", Some(pid));
        for hook in &hooks.create {
            let Some(host) = &self.host else { return Err(TaskError::unavailable("the pod has ended")) };
            let done = run(hook, &creating, bundle, host).await;
            done.map_err(|error| TaskError::failed_precondition(error.to_string()))?;
        }
        Ok(())
    }

    /// Runs those of a container that has just been started.
    pub(super) async fn run_poststart(&self, name: &Name) {
        let pending = self.tasks().container(&name.container).ok().and_then(|container| {
            let pending = container.hooks.as_mut()?;
            Some((std::mem::take(&mut pending.poststart), pending.running.clone(), pending.bundle.clone()))
        });
        if let Some((hooks, state, bundle)) = pending {
            self.run_logged(&hooks, &state, &bundle).await;
        }
    }

    /// Runs those of a container that is gone.
    pub(super) async fn run_poststop(&self, pending: Option<Box<Pending>>) {
        if let Some(pending) = pending {
            settle(&pending.bundle);
            self.run_logged(&pending.poststop, &pending.stopped, &pending.bundle).await;
        }
    }

    async fn run_logged(&self, hooks: &[Hook], state: &State, bundle: &Path) {
        let Some(host) = &self.host else { return };
        for hook in hooks {
            if let Err(error) = run(hook, state, bundle, host).await {
                warn!(self.log, "a hook failed"; "error" => %error);
            }
        }
    }
}

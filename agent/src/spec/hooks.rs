//! Hooks: programs that run while a container comes to life.
//!
//! `prestart`, `createRuntime`, `poststart` and `poststop` run on the host and are the shim's; they are accepted here and nothing
//! is done about them. `createContainer` and `startContainer` run in the guest. It holds no program but the agent, so
//! their paths are looked up in the container's own root file system.

use caisson_oci::hooks::Program;
use oci_spec::runtime::{Hook, Hooks};

use super::Result;
use crate::plan::{HookPlan, HookPlans, HookState};

pub(super) fn plan(hooks: Option<&Hooks>, about: HookState) -> Result<HookPlans> {
    let list = |name: &str, list: Option<&Vec<Hook>>| -> Result<Vec<HookPlan>> {
        let list = list.map(Vec::as_slice).unwrap_or_default();
        list.iter().enumerate().map(|(index, hook)| one(format!("hooks.{name}[{index}]"), hook)).collect()
    };
    Ok(HookPlans {
        create_container: list("createContainer", hooks.and_then(|hooks| hooks.create_container().as_ref()))?,
        start_container: list("startContainer", hooks.and_then(|hooks| hooks.start_container().as_ref()))?,
        about,
    })
}

fn one(field: String, hook: &Hook) -> Result<HookPlan> {
    let Program { field, path, args, env, timeout } = Program::of(field, hook)?;
    Ok(HookPlan { path, args, env, timeout, field })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(json: serde_json::Value) -> Result<HookPlans> {
        plan(Some(&serde_json::from_value(json).unwrap()), HookState::default())
    }

    #[test]
    fn only_the_guests_hooks_are_planned() {
        let hook = serde_json::json!([{"path": "/h", "args": ["h", "x"], "env": ["A=1"], "timeout": 3}]);
        let plans = planned(serde_json::json!({
            "prestart": hook, "createRuntime": hook, "createContainer": hook, "startContainer": [{"path": "/s"}],
            "poststart": hook, "poststop": hook,
        }));
        let plans = plans.unwrap();
        let [create] = plans.create_container.as_slice() else { panic!("{plans:?}") };
        assert_eq!((create.args.len(), create.env.as_deref().map(<[_]>::len), create.timeout), (2, Some(1), Some(3)));
        let [start] = plans.start_container.as_slice() else { panic!("{plans:?}") };
        assert_eq!((start.field.as_str(), &start.env, start.timeout), ("hooks.startContainer[0]", &None, None));
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        for (hook, field) in [(serde_json::json!({"path": "bin/h"}), "hooks.createContainer[0].path")] {
            assert_eq!(planned(serde_json::json!({"createContainer": [hook]})).unwrap_err().field, field);
        }
    }
}

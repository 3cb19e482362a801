//! One hook of the specification: a program with its arguments, environment and time limit.

use std::path::PathBuf;

use oci_spec::runtime::Hook;

use crate::FieldError;

/// One program to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The specification's name of it, as `hooks.createContainer[0]`.
    pub field: String,
    /// Absolute.
    pub path: PathBuf,
    /// With the program's own name in front.
    pub args: Vec<String>,
    /// `NAME=value`; None if the specification does not name any.
    pub env: Option<Vec<String>>,
    /// Seconds, more than 0; None if it may take as long as it wants.
    pub timeout: Option<u32>,
}

impl Program {
    /// Checks the hook that the specification has at `field`.
    ///
    /// # Errors
    /// The first of its fields that cannot be honoured.
    pub fn of(field: String, hook: &Hook) -> Result<Self, FieldError> {
        let wrong = |name: &str, message: String| FieldError::new(format!("{field}.{name}"), message);
        let path = hook.path().clone();
        if !path.is_absolute() {
            return Err(wrong("path", format!("{path:?} is not an absolute path")));
        }
        let timeout = match hook.timeout() {
            None => None,
            Some(seconds) => Some(u32::try_from(seconds).ok().filter(|seconds| *seconds > 0).ok_or_else(|| {
                wrong("timeout", format!("{seconds} is not a number of seconds from 1 to {}", u32::MAX))
            })?),
        };
        let (args, env) = (hook.args().clone().unwrap_or_default(), hook.env().clone());
        let has_nul = |words: &[String]| words.iter().any(|word| word.contains('\0'));
        for (name, has_nul) in [
            ("path", path.to_string_lossy().contains('\0')),
            ("args", has_nul(&args)),
            ("env", has_nul(env.as_deref().unwrap_or_default())),
        ] {
            if has_nul {
                return Err(wrong(name, "contains a NUL byte, which no argument can have".into()));
            }
        }
        if let Some(entry) = env.iter().flatten().find(|entry| entry.find('=').is_none_or(|place| place == 0)) {
            return Err(wrong("env", format!("{entry:?} is not NAME=value")));
        }
        Ok(Self { path, args, env, timeout, field })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(json: serde_json::Value) -> Result<Program, FieldError> {
        Program::of("hooks.poststop[0]".into(), &serde_json::from_value(json).unwrap())
    }

    #[test]
    fn a_hook_is_a_program() {
        let full = program(serde_json::json!({"path": "/h", "args": ["h", "x"], "env": ["A=1"], "timeout": 3}));
        let expected = Program {
            field: "hooks.poststop[0]".into(),
            path: "/h".into(),
            args: vec!["h".into(), "x".into()],
            env: Some(vec!["A=1".into()]),
            timeout: Some(3),
        };
        assert_eq!(full.unwrap(), expected);
        let short = program(serde_json::json!({"path": "/h"})).unwrap();
        assert_eq!((short.args.len(), short.env, short.timeout), (0, None, None));
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        for (hook, field) in [
            (serde_json::json!({"path": "bin/h"}), "path"),
            (serde_json::json!({"path": "/h\0"}), "path"),
            (serde_json::json!({"path": "/h", "timeout": 0}), "timeout"),
            (serde_json::json!({"path": "/h", "timeout": -1}), "timeout"),
            (serde_json::json!({"path": "/h", "args": ["\0"]}), "args"),
            (serde_json::json!({"path": "/h", "env": ["A"]}), "env"),
            (serde_json::json!({"path": "/h", "env": ["=A"]}), "env"),
        ] {
            assert_eq!(program(hook).unwrap_err().field, format!("hooks.poststop[0].{field}"));
        }
    }
}

//! The command line of a shim, as containerd writes it: Go's flag syntax. A flag begins with one or two dashes, takes
//! its value from behind `=` or from the next argument, a boolean flag takes none, and the first argument that
//! is no flag is the action.
//!
//! ```text
//! containerd-shim-caisson-v2 -namespace default -address /run/containerd/containerd.sock \
//!     -publish-binary /usr/bin/containerd -id busybox-1 [-bundle DIR] [-debug] start|delete
//! ```

/// What containerd asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The task's (pod's) id.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// containerd's own binary, whose `publish` command sends events where there is no ttrpc socket.
    pub publish_binary: String,
    /// The bundle directory; empty: the working directory.
    pub bundle: String,
    /// Log at debug level.
    pub debug: bool,
    /// Print the version and end.
    pub version: bool,
    /// Print a description of the runtime and end (containerd 2).
    pub info: bool,
    /// `start`, `delete`, or empty: be the daemon.
    pub action: String,
}

/// A command line that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Not a flag of a shim.
    #[error("unknown flag {0}: this program is started by containerd, see the README for how")]
    Unknown(String),
    /// The last argument is a flag that needs a value.
    #[error("flag {0} needs a value")]
    MissingValue(String),
    /// A boolean flag with a value that is neither true nor false.
    #[error("flag {0} is either true or false, not {1:?}")]
    NotBoolean(String, String),
    /// A name that could not be a file's name.
    #[error("{0} {1:?} is not a containerd identifier: 1 to 76 of [A-Za-z0-9._-], beginning with a letter or digit")]
    BadName(&'static str, String),
}

impl Flags {
    /// Reads the arguments behind the program's name.
    ///
    /// # Errors
    /// See [`FlagError`].
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                flags.action = arguments.next().unwrap_or_default();
                break;
            }
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                flags.action = argument;
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = match inline.as_deref() {
                    None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => true,
                    Some("false" | "0" | "f" | "F" | "FALSE" | "False") => false,
                    Some(other) => return Err(FlagError::NotBoolean(format!("-{name}"), other.to_owned())),
                };
            } else if let Some(text) = flags.text(name) {
                *text = inline.or_else(|| arguments.next()).ok_or(FlagError::MissingValue(argument))?;
            } else {
                return Err(FlagError::Unknown(argument));
            }
        }
        Ok(flags)
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn text(&mut self, name: &str) -> Option<&mut String> {
        match name {
            "namespace" => Some(&mut self.namespace),
            "id" => Some(&mut self.id),
            "address" => Some(&mut self.address),
            "publish-binary" => Some(&mut self.publish_binary),
            "bundle" => Some(&mut self.bundle),
            _ => None,
        }
    }

    /// Refuses names that could leave the state directory.
    ///
    /// # Errors
    /// [`FlagError::BadName`].
    pub fn check_names(&self) -> Result<(), FlagError> {
        for (what, name) in [("namespace", &self.namespace), ("id", &self.id)] {
            if !is_identifier(name) {
                return Err(FlagError::BadName(what, name.clone()));
            }
        }
        Ok(())
    }
}

/// Whether `name` is an identifier as containerd makes them: a file name without any meaning of its own.
pub use caisson_oci::identifier::is_valid as is_identifier;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagError> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_own_lines_are_understood() {
        let start = parse("-namespace ns -address /a.sock -publish-binary /c -id one -debug start").unwrap();
        assert_eq!((start.namespace.as_str(), start.id.as_str(), start.action.as_str()), ("ns", "one", "start"));
        assert!(start.debug);
        let delete = parse("-namespace ns -address=/a.sock -id one --bundle /b -debug=false delete").unwrap();
        assert_eq!((delete.bundle.as_str(), delete.action.as_str(), delete.debug), ("/b", "delete", false));
        assert!(parse("-v").unwrap().version && parse("-info").unwrap().info);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse("-nosuch x"), Err(FlagError::Unknown("-nosuch".into())));
        assert_eq!(parse("-id"), Err(FlagError::MissingValue("-id".into())));
        assert_eq!(parse("-debug=maybe"), Err(FlagError::NotBoolean("-debug".into(), "maybe".into())));
        let climbing = parse("-namespace ns -id ../x").unwrap();
        assert!(climbing.check_names().unwrap_err().to_string().contains("\"../x\""));
    }

    proptest! {
        #[test]
        fn any_arguments_parse_or_fail_without_panic(arguments in proptest::collection::vec(".{0,12}", 0..8)) {
            let _ = Flags::parse(arguments);
        }

        #[test]
        fn an_identifier_never_leaves_its_directory(name in ".{0,80}") {
            if is_identifier(&name) {
                prop_assert!(!name.contains('/') && name != ".." && name != "." && !name.contains('\0'));
            }
        }
    }
}

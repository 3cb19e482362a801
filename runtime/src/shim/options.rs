//! Runtime options: what containerd's clients can pass for one container. Caisson has none of its own; it takes the generic
//! `runtimeoptions.v1.Options`, whose `config_path` names a configuration file, and refuses everything else by
//! its type, because an option that is silently ignored is a surprise later.

use std::path::PathBuf;

use protobuf::{CodedInputStream, well_known_types::any::Any};

use crate::shim::errors::TaskError;

/// Field number of `config_path` in runtimeoptions.v1.Options.
const CONFIG_PATH: u32 = 2;

/// The types that carry nothing but a configuration's path: today's name and the older one.
const GENERIC: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// Reads options; None if they name no configuration file.
///
/// # Errors
/// INVALID_ARGUMENT names the type that is not known, or says that the message is malformed.
pub fn config_path(options: &Any) -> Result<Option<PathBuf>, TaskError> {
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if name.is_empty() && options.value.is_empty() {
        return Ok(None);
    }
    if !GENERIC.contains(&name) {
        let message =
            format!("unknown runtime option type {name:?}: io.containerd.caisson.v2 takes only {}", GENERIC[0]);
        return Err(TaskError::invalid_argument(message));
    }
    let path = read_path(&options.value)
        .map_err(|error| TaskError::invalid_argument(format!("malformed runtime options of type {name}: {error}")))?;
    match path {
        Some(path) if !path.starts_with('/') => {
            Err(TaskError::invalid_argument(format!("runtime option config_path {path:?} must be an absolute path")))
        }
        path => Ok(path.map(PathBuf::from)),
    }
}

/// Refuses options that [`config_path`] would refuse.
///
/// # Errors
/// The same.
pub fn check(options: &Any) -> Result<(), TaskError> {
    config_path(options).map(drop)
}

fn read_path(value: &[u8]) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(value);
    let mut path = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // A field's number stands above the three bits of its wire type; 2 is a string.
        if tag == CONFIG_PATH << 3 | 2 {
            path = Some(input.read_string()?).filter(|path| !path.is_empty());
        } else {
            protobuf::rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Any::default() }
    }

    #[test]
    fn only_the_generic_options_are_known() {
        assert_eq!(config_path(&Any::default()).unwrap(), None);
        let generic = options("runtimeoptions.v1.Options", b"\x0a\x01x\x12\x07/c.toml\x1a\x01y");
        assert_eq!(config_path(&generic).unwrap(), Some("/c.toml".into()));
        let refused = config_path(&options("containerd.runc.v1.Options", b"\x08\x01")).unwrap_err();
        assert_eq!(refused.code(), ttrpc::Code::INVALID_ARGUMENT);
        assert!(refused.to_string().contains("\"containerd.runc.v1.Options\""), "{refused}");
        assert!(config_path(&options("runtimeoptions.v1.Options", b"\x12\x01c")).is_err(), "not absolute");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = config_path(&options("runtimeoptions.v1.Options", &bytes));
        }
    }
}

//! What Task.Update carries: the OCI specification's `linux.resources` as JSON in an `Any`. It is read here once, so that what
//! is invalid is refused before the guest sees it; the agent gets the bytes as they came.

use oci_spec::runtime::LinuxResources;
use protobuf::well_known_types::any::Any;

use crate::{shim::errors::TaskError, spec::MAX_SIZE};

/// The last word of the type that containerd gives the JSON: types.containerd.io/opencontainers/runtime-spec/1/LinuxResources.
const TYPE: &str = "LinuxResources";

/// The JSON of an update.
///
/// # Errors
/// INVALID_ARGUMENT says what is missing, of another type, too large or malformed.
pub fn resources(resources: Option<&Any>) -> Result<&[u8], TaskError> {
    let Some(any) = resources.filter(|any| !any.value.is_empty()) else {
        return Err(TaskError::invalid_argument("the update names no resources"));
    };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if !name.is_empty() && name != TYPE {
        let message = format!("the update's resources are of type {:?}, it must be {TYPE}", any.type_url);
        return Err(TaskError::invalid_argument(message));
    }
    if any.value.len() as u64 > MAX_SIZE {
        return Err(TaskError::invalid_argument(format!("the update's resources are larger than {MAX_SIZE} bytes")));
    }
    serde_json::from_slice::<LinuxResources>(&any.value)
        .map_err(|error| TaskError::invalid_argument(format!("the update's resources are malformed: {error}")))?;
    Ok(&any.value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Any::default() }
    }

    #[test]
    fn resources_pass_as_they_are_and_everything_else_is_refused_by_what_it_is() {
        let json = br#"{"memory":{"limit":67108864,"swap":-1},"cpu":{"quota":50000,"period":100000},"pids":{"limit":9},
            "blockIO":{"weight":10},"unified":{"memory.high":"1"}}"#;
        for name in ["types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", ""] {
            assert_eq!(resources(Some(&packed(name, json))).unwrap(), json);
        }
        let refusals = [
            (None, "names no resources"),
            (Some(packed("x/LinuxResources", b"")), "names no resources"),
            (
                Some(packed("types.containerd.io/opencontainers/runtime-spec/1/WindowsResources", b"{}")),
                "WindowsResources",
            ),
            (Some(packed("", b"{\"memory\":7}")), "malformed: invalid type"),
            (Some(packed("", &vec![b' '; MAX_SIZE as usize + 1])), "larger than 1048576 bytes"),
        ];
        for (given, words) in refusals {
            let message = resources(given.as_ref()).unwrap_err();
            assert_eq!(message.code(), ttrpc::Code::INVALID_ARGUMENT);
            assert!(message.to_string().contains(words), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = resources(Some(&packed("", &bytes)));
        }
    }
}

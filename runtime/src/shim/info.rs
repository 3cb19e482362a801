//! What the shim says about itself: `-v` for people, `-info` for containerd 2.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name, as it is passed to `ctr --runtime`.
pub const RUNTIME: &str = "io.containerd.caisson.v2";

/// The answer to `-v`.
pub fn version() -> String {
    format!("containerd-shim-caisson-v2:\n  Version:  {}\n", env!("CARGO_PKG_VERSION"))
}

/// The answer to `-info`.
///
/// # Errors
/// Never, as far as the encoder is right.
pub fn runtime_info() -> protobuf::Result<Vec<u8>> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let info = RuntimeInfo { name: RUNTIME.into(), version: MessageField::some(version), ..RuntimeInfo::default() };
    info.write_to_bytes()
}

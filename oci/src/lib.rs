//! What the shim and the agent both read of an OCI specification, so that they read it alike.
//!
//! - [`resources`]: `linux.resources` as typed limits, and these as settings for files of cgroup v2;
//! - [`mod@write`]: writing settings to a cgroup, all or none;
//! - [`cpus`]: lists of processors; [`weights`]: weights of cgroup v1 as those of version 2;
//! - [`hooks`]: programs to run; [`identifier`]: names of containers and execs.
//!
//! The shim's adapter (`runtime/src/cgroup/limits.rs`) adds the pod's overhead to the limits before they become
//! settings; the agent's (`agent/src/spec/resources`) adds the device rules. Everything but [`mod@write`] is pure.

pub mod cpus;
pub mod hooks;
pub mod identifier;
pub mod resources;
pub mod weights;
pub mod write;

pub use resources::{CpuTime, Limit, Limits, Need, Setting};

/// A field whose value cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The specification's name of it.
    pub field: String,
    /// The value, and what is wrong with it.
    pub message: String,
}

impl FieldError {
    /// The error of one field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

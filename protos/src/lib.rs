//! The words between Caisson's parts. Whatever crosses a process boundary is defined here and nowhere else:
//!
//! - [`agent`]: the calls that the shim makes to the agent in the guest (ttrpc over vsock), generated from
//!   `proto/agent.proto`;
//! - [`monitor`]: the messages on caisson-vmm's control socket;
//! - [`guest`]: ports, tags and paths that the host side and the guest side must agree on;
//! - [`network`]: how large a pod's network may be;
//! - [`kvm`]: what of the host's KVM a machine needs.
//!
//! This crate holds types, constants and their encoding. It does no I/O.

pub mod guest;
pub mod kvm;
pub mod monitor;
pub mod network;

#[allow(missing_docs, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The agent's service: messages in [`agent`], client and server in [`agent_ttrpc`].
pub use generated::{agent, agent_ttrpc};

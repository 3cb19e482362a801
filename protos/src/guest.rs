//! What the host side and the guest side must agree on: vsock ports, the shared directory, the power port.
//!
//! ```text
//! shim                                   agent
//!   │ ◄──── stream to (2, READY_PORT) ───── │  one Ready message, then the agent closes
//!   │ ───── stream to (3, AGENT_PORT) ────► │  ttrpc, caisson.agent.v1.Agent
//!   │ ───── stream to (3, STDIO_PORT) ────► │  one stream for each standard descriptor, named by its host-side port
//!   │ ───── stream to (3, FORWARD_PORT) ──► │  one stream for each forwarded TCP connection (caisson-forward)
//! ```

use serde::{Deserialize, Serialize};

/// The guest's vsock context id. Every machine has the same: it is never seen outside its own monitor.
pub const GUEST_CID: u64 = 3;
/// Guest port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// Guest port on which the agent takes streams for standard descriptors. The agent must accept only from the host (CID
/// 2).
pub const STDIO_PORT: u32 = 1025;
/// Guest port on which the agent takes streams for TCP connections to servers on the guest's loopback interface (the crate
/// caisson-forward has the protocol). The agent must accept only from the host (CID 2).
pub const FORWARD_PORT: u32 = 1026;
/// Forwarded connections that a pod can have at once. Each takes two descriptors of the shim and of the agent, one of the monitor's
/// streams, and at most 64 KiB of buffers on each side.
pub const MAX_FORWARDS: usize = 256;
/// Host port to which the agent connects once, when everything above listens, to send [`Ready`].
pub const READY_PORT: u32 = 1024;

/// The virtio-fs tag of the pod's shared directory.
pub const SHARE_TAG: &str = "caisson";
/// Where the agent mounts the shared directory. A container's root lies at `<SHARE_MOUNT>/<CreateRequest.rootfs>`.
pub const SHARE_MOUNT: &str = "/run/caisson/shared";

/// The virtio-fs tag of the same directory once more, there if the pod has bind mounts: the guest trusts no cache for
/// what it reaches by this one, because the host's processes change it, too.
pub const HOST_SHARE_TAG: &str = "caisson-host";
/// Where the agent mounts that, below [`SHARE_MOUNT`]. No container's directory has this name.
pub const HOST_SHARE_DIRECTORY: &str = ".host";

/// The I/O port (x86) through which the agent ends its machine in order: one byte, [`POWER_OFF`].
///
/// A guest without ACPI has no standard way to power off; the kernel's own `reboot` reaches the monitor as a reset.
pub const POWER_PORT: u16 = 0x0510;
/// Written to [`POWER_PORT`] after the agent has written everything back.
pub const POWER_OFF: u8 = 0x01;

/// What the agent says once on the [`READY_PORT`] stream: postcard, at most 256 bytes, then end of stream.
///
/// The guest is hostile: a reader takes the times for display only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The guest kernel's release, as `uname -r`.
    pub kernel_release: String,
    /// When the agent's `main` began, CLOCK_BOOTTIME of the guest, nanoseconds.
    pub agent_started_ns: u64,
    /// When this message was sent, CLOCK_BOOTTIME of the guest, nanoseconds.
    pub ready_ns: u64,
}

//! Virtio: what every device shares, and the devices.
//!
//! ```text
//!   guest registers ──► transport (mmio) ──owns──► VirtQueue 0..n
//!                          │                          │ pop → Chain (checked) → complete
//!                          └──calls──► VirtioDevice ◄─┘
//! ```
//!
//! A device never sees a guest address: it sees [`Chain`]s whose every byte lies in guest memory, through the
//! [`Context`] that the transport lends it for one call.

pub mod block;
mod buffers;
mod device;
pub mod fs;
pub mod mmio;
pub mod net;
mod queue;
pub mod rate;
pub mod rng;
mod serve;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

pub use buffers::{BufferError, Buffers, Received};
pub use device::{Context, DeviceError, Poll, PollToken, VirtioDevice, read_config_bytes};
pub use queue::{Chain, QueueError, VirtQueue};
pub use serve::{Served, Turn, TurnEnd, serve};

/// All of a machine's RAM.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

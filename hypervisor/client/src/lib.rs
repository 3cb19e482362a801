//! The client side of caisson-vmm: starts the monitor's process, hands it a whole machine in one packet of its control
//! socket, and receives its answers until it ends.
//!
//! ```text
//! Machine (descriptors in place)      spawn_monitor ─── fork/exec ──► caisson-vmm, socket at descriptor 3
//!    │ into_packet                        │
//!    └── Configure + its descriptors ─────┤ configure_and_start: both packets leave before the first answer
//!                                         │
//!                 Control::call ◄── answers ── Driver::run ──► Ended (the exit notice, or that there was none)
//! ```
//!
//! - [`machine`]: what to build, with an owned descriptor wherever the wire has an index, so that no index can be wrong;
//! - [`process`]: starting and ending the process;
//! - [`control`]: calls, answers and the exit notice;
//! - [`streams`]: the streams that the guest opens;
//! - [`packet`]: one packet with its descriptors on a SOCK_SEQPACKET socket.

pub mod control;
mod fork;
pub mod machine;
pub mod packet;
pub mod process;
pub mod streams;

pub use control::{CallError, Control, Driver, Ended};
pub use machine::{Console, Disk, Machine, Memory, Network, Share, Vsock};
pub use process::{Child, SpawnError};
pub use streams::GuestStreams;

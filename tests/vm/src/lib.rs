//! What the VM tests need: a monitor process to command, kernels of a few bytes, and a Linux guest whose PID 1 is a
//! program of ours.
//!
//! ```text
//!   test ──control socket──► caisson-vmm ──► a flat program of a few instructions (guests)
//!     │                          │            or Linux with caisson-vm-guest as its init (linux)
//!     └──── console pipe ◄───────┘
//! ```
//!
//! Environment: `CAISSON_BIN_DIR` holds caisson-vmm, caisson-fsd and caisson-vm-guest, `CAISSON_IMAGE_DIR` vmlinux.
//! Every wait has a limit, long enough for an emulated processor, and says what it waited for.

pub mod environment;
pub mod guests;
pub mod hung;
pub mod kernel;
pub mod linux;
pub mod monitor;
pub mod streams;
pub mod tap;

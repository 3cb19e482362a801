//! The shim as containerd runs it: its command line, its two commands, the daemon that serves the task service, and the events
//! that it publishes.
//!
//! ```text
//! containerd ── start ──► start ── exec ──► daemon ── serves ──► service (Task v2, Task v3) ──► crate::pod
//!     │ ◄──────────── events (ttrpc) ───────────┘
//!     └── delete ──► delete (after every end), orphans (pods of which containerd never learned)
//! ```

pub mod daemon;
pub mod delete;
pub mod errors;
pub mod events;
pub mod flags;
pub mod info;
pub mod options;
pub mod orphans;
pub mod service;
pub mod start;

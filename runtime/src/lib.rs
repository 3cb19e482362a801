//! containerd's side of Caisson: the shim `containerd-shim-caisson-v2` and the command `caisson`.
//!
//! ```text
//! containerd ─start─► start ─exec─► daemon ──launch──► caisson-vmm, caisson-fsd
//!     │                               │ serves
//!     ├── ttrpc, Task v2/v3 ──► service ─► pod ─► tasks (who is there, in which state: lifecycle)
//!     │                                    ├──► machine (booting, ready, lost), dial (streams into the guest)
//!     │                                    ├──► share, mount (root file systems)
//!     │ ◄── events ────────────────────────┤
//!     │ ◄═══ FIFOs ═══ stdio ══════════════┘
//!     └─delete─► delete (after the end, whatever it was), orphans (pods that containerd forgot)
//! ```
//!
//! Pure, with property tests: [`flags`], [`lifecycle`], [`tasks`], [`mount`]'s plans, [`config`], [`spec`], [`options`],
//! [`metrics`], [`update`].
//! Not trusted: containerd's clients in what they ask for, images in their specs, the guest in everything it says.

pub mod allotment;
pub mod binds;
pub mod cgroup;
pub mod check;
pub mod config;
pub mod daemon;
pub mod delete;
pub mod dial;
pub mod errors;
pub mod events;
pub mod flags;
pub mod hooks;
pub mod host;
pub mod host_view;
pub mod info;
pub mod launch;
pub mod lifecycle;
pub mod machine;
pub mod metrics;
pub mod mount;
pub mod options;
pub mod orphans;
pub mod paths;
pub mod pod;
pub mod processes;
pub mod resources;
pub mod service;
pub mod share;
pub mod spec;
pub mod start;
pub mod stdio;
pub mod tasks;
pub mod timeline;
pub mod trial;
pub mod update;

#[cfg(test)]
#[path = "../tests/support/scratch.rs"]
mod scratch;

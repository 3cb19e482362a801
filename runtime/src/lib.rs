//! containerd's side of Caisson: the shim `containerd-shim-caisson-v2` and the command `caisson`.
//!
//! ```text
//! containerd ─start─► shim::start ─exec─► shim::daemon ──► vm::launch ──► caisson-vmm, caisson-fsd
//!     │                                        │ serves
//!     ├── ttrpc, Task v2/v3 ──► shim::service ─► pod (tasks: who is there; lifecycle: in which state)
//!     │                                          ├──► vm (supervisor: booting, ready, lost; dial: streams into the guest)
//!     │                                          ├──► network (the pod's network namespace; not yet used)
//!     │                                          ├──► rootfs (share, mount, binds)
//!     │ ◄── shim::events ────────────────────────┤
//!     │ ◄═══ FIFOs ═══ stdio ════════════════════┘
//!     └─delete─► shim::delete (after the end, whatever it was), shim::orphans (pods that containerd forgot)
//! ```
//!
//! Pure, with property tests: [`shim::flags`], [`shim::options`], [`pod::lifecycle`], [`pod::tasks`], [`pod::metrics`],
//! [`pod::update`], [`network::plan`], [`rootfs::mount`]'s plans, [`host::config`], [`spec`].
//! Not trusted: containerd's clients in what they ask for, images in their specs, the guest in everything it says.

pub mod cgroup;
pub mod host;
pub mod network;
pub mod pod;
pub mod resources;
pub mod rootfs;
pub mod shim;
pub mod spec;
pub mod stdio;
pub mod vm;

#[cfg(test)]
#[path = "../tests/support/scratch.rs"]
mod scratch;

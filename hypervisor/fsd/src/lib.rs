//! caisson-fsd: serves one pod's shared directories as FUSE messages over a socket, in a jail.
//!
//! ```text
//!   caisson-vmm ◄──── SOCK_SEQPACKET, one FUSE message a packet ────► caisson-fsd
//!   (virtio-fs device)                                               session ─► filesystem ─► tree, nodes
//!                                                                    jail: root directory = the shared directory
//! ```
//!
//! The guest on the other side is hostile. It may ask for anything on any file of the shared directory, as that is what it is
//! for; it must not reach anything else, nor stop this process, nor use more than the pod's share of the host: whatever is kept
//! open for it counts against one budget (`--max-files`, which the shim derives from the pod's overhead; see [`budget`]), requests are
//! bounded, and the process belongs to the pod's cgroup.
//!
//! Several threads serve each socket ([`session`]), so that one request that waits for a disk does not stop the others ([`slow`]).

pub mod attributes;
pub mod budget;
pub mod controls;
pub mod directory;
pub mod files;
pub mod filesystem;
pub mod handshake;
pub mod identity;
pub mod jail;
pub mod locks;
pub mod nodes;
pub mod ranges;
pub mod service;
pub mod session;
pub mod slow;
pub mod tree;
pub mod wire;

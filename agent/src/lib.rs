//! The agent: PID 1 of a pod's machine. It creates and watches the containers; the shim on the host tells it what to do
//! (`caisson_protos::agent_ttrpc::Agent`).
//!
//! ```text
//!   vsock 1024 ──► service ──► containers ──► launch ──► a stage, which becomes the program
//!   vsock 1025 ──► streams ──────┘  │  ▲                       │
//!                    stdio ◄────────┘  └── reaper ◄────────────┘ exit
//!   vsock 1026 ──► forward ──► servers on the loopback interface
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`boot`], [`power`], [`transport`] | what only a real guest has: mounts, vsock, power-off |
//! | [`service`] | the calls, and how errors become statuses |
//! | [`containers`] | containers and their processes, and what each call does to them |
//! | [`lifecycle`] | the states of one process (pure) |
//! | [`reaper`] | every child's end |
//! | [`streams`], [`stdio`] | standard streams: which one belongs to whom (pure), and the copying |
//! | [`spec`], [`plan`] | the OCI specification, checked and made into a plan (pure) |
//! | [`launch`], [`handshake`], [`stage`] | from a plan to a running program |
//! | [`seccomp`] | system call filters, compiled for the kernel (pure) |
//! | [`idmap`], [`rlimits`] | the ids of user namespaces (pure); resource limits |
//! | [`cgroup`] | cgroup v2 |
//! | [`network`] | the machine's interfaces, addresses and routes |
//! | [`forward`] | connections from the host to servers on the loopback interface |
//!
//! Everything runs on one thread: state changes between two awaits are atomic, and nothing may block it. What can
//! block (writing file systems back) goes to a thread of its own.

mod blocking;
pub mod boot;
pub mod cgroup;
pub mod containers;
pub mod forward;
pub mod handshake;
pub mod idmap;
pub mod launch;
pub mod lifecycle;
pub mod network;
pub mod plan;
pub mod power;
pub mod reaper;
pub mod rlimits;
pub mod seccomp;
pub mod service;
pub mod spec;
pub mod stage;
pub mod stdio;
pub mod streams;
mod sys;
pub mod transport;

//! The microVM that a pod runs in: KVM, memory, vCPUs, and virtio devices on the mmio transport.
//!
//! Nothing here knows of containers. The guest is hostile: whatever it writes to a register, a ring or a packet is
//! an input to be checked, and the worst it may reach is a fault of its own machine.
//!
//! ```text
//!   control socket ──► monitor ──builds──► machine ──┬── memory, boot     RAM with a kernel in it
//!   (control,            │ main thread:              ├── vcpu             one thread each
//!    descriptors)        │ commands, devices         ├── bus ── ports     console, reset, power
//!                        ▼                           │    └── slots       places for devices
//!                       end ◄────── any of them ─────┘         └─ virtio
//! ```
//!
//! One thread besides the vCPUs serves the control socket and all devices. So a command never meets a device in the middle
//! of what it does to guest memory, which is what pausing needs. It never blocks: each disk has a thread of its own for the system
//! calls on its file, which sees neither guest memory nor queues.

pub mod boot;
pub mod bus;
pub mod control;
pub mod descriptors;
pub mod end;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod output;
pub mod ports;
pub mod slots;
pub mod vcpu;
pub mod virtio;

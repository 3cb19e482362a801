//! The microVM that a pod runs in: KVM, memory, vCPUs, and virtio devices on the mmio transport.
//!
//! Nothing here knows of containers. The guest is hostile: whatever it writes to a register, a ring or a packet is
//! an input to be checked, and the worst it may reach is a fault of its own machine.

pub mod virtio;

//! The greatest numbers of everything in a `ConfigureNetworkRequest`. The shim refuses a network namespace that holds more, and the
//! agent a message.

/// Network interfaces, the loopback interface among them.
pub const MAX_INTERFACES: usize = 64;
/// Addresses of one interface.
pub const MAX_ADDRESSES: usize = 512;
/// Static neighbours of one interface.
pub const MAX_NEIGHBOURS: usize = 1024;
/// Routes of all interfaces.
pub const MAX_ROUTES: usize = 4096;
/// Next hops of one route.
pub const MAX_HOPS: usize = 64;

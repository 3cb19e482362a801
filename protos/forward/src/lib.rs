//! A TCP connection carried over a stream between host and guest: both ends of port forwarding.
//!
//! A client connects to loopback in the pod's network namespace on the host, and is to meet the server that listens there in the
//! guest. The shim holds the client's connection, the agent makes one to the server, and a vsock stream of their own joins the two:
//!
//! ```text
//!   client ──TCP──► shim ════════ stream to (3, FORWARD_PORT) ════════► agent ──TCP──► server
//!                      Target, once ──►
//!                      frames ──►                        ◄── frames
//!
//!   Target:  16 bytes of IPv6 address (an IPv4 address mapped), 2 bytes of port; network byte order
//!   frame:   2 bytes of length, little-endian, and so many bytes of what TCP delivered
//!            length 0: the sender of this direction has finished (FIN)
//! ```
//!
//! A stream cannot say the difference between a peer that has finished and one that was reset, or killed; TCP can, and a client must not
//! take half an answer for a whole one. Therefore the end of a direction is a frame. The stream itself is closed when both ends were
//! sent and received; if it closes before, the connection was reset (also: refused, or the machine has ended), and the other side
//! resets its TCP connection in turn. What came before a reset is delivered first, as far as its reader takes it.
//!
//! | module | holds |
//! |---|---|
//! | [`target`] | where to connect (pure) |
//! | [`frame`] | frames out of a stream of bytes (pure) |
//! | [`carry`](mod@carry) | the copying |

pub mod carry;
pub mod frame;
pub mod target;

pub use carry::{Broken, carry};
pub use target::Target;

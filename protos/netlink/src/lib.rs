//! rtnetlink(7), as the shim and the agent need it: what a network namespace holds, and the requests that change it.
//!
//! | module | holds |
//! |---|---|
//! | [`socket`] | requests with their acknowledgements, dumps, subscriptions |
//! | [`message`] | a request under construction, and the attributes of an answer |
//! | [`link`](mod@link), [`address`], [`route`], [`rule`], [`neighbour`] | the five tables: parsed entries and the requests that add and remove them |
//! | [`traffic`] | the redirect of everything that arrives on one interface to another |
//! | [`state`] | all five tables of a namespace at once |
//!
//! netlink-sys has the socket and netlink-packet-core the walk over attributes. The typed messages of netlink-packet-route are
//! not used: they add 0.7 MiB to the agent, most of it for kinds of links that no guest has, and one attribute that they cannot
//! parse fails the whole message.
//!
//! A socket belongs to the network namespace of the thread that opens it, for good: its holder needs no thread there.

pub mod address;
pub mod link;
pub mod message;
pub mod neighbour;
pub mod route;
pub mod rule;
pub mod socket;
pub mod state;
pub mod traffic;
mod uapi;

pub use socket::{Refused, Socket, Subscription};

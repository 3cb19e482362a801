//! The agent's library at work on this machine: real namespaces, real programs, Unix sockets instead of vsock.
//!
//! Needs root, a mounted cgroup2 and /bin/busybox (static). Each test has an agent of its own as PID 1 of its own pid
//! and mount namespace, so nothing outlives it.

mod control;
mod escapes;
mod hooks;
mod hostile;
mod lifecycle;
mod limits;
mod mounts;
mod namespaces;
mod process;
mod seccomp;
mod streams;
mod support;
mod view;

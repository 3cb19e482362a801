//! The host: its configuration and paths, its namespaces, processes and hooks, and whether it can run pods at all.

pub mod check;
pub mod config;
pub mod hooks;
pub mod kvm;
pub mod namespaces;
pub mod paths;
pub mod processes;
pub mod trial;

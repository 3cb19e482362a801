//! The end-to-end tests: pods on a real containerd. See the library of this crate for what they stand on.

mod bad_input;
mod calls;
mod check;
mod crash;
mod files;
mod images;
mod inputs;
mod isolation;
mod lifecycle;
mod many;
mod matrix;
mod network;
mod port_forward;
mod refusals;
mod resources;
mod spec;
mod storage;
mod streams;
mod verbs;
mod volumes;

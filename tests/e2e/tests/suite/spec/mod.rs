//! The OCI runtime specification, field by field: what a program inside finds is what was asked for.
//!
//! Each test gives both runtimes the same specification and holds the report of the program inside against it
//! (`caisson_e2e::spec::holds`), beside what the test itself expects. Where the two differ for good reason, the test
//! names both, and docs/differences.md says why.

mod devices;
mod hooks;
mod limits;
mod mapped_ids;
mod mounts;
mod namespaces;
mod process;
mod seccomp;
mod through_ctr;
mod users;

//! Putting the container's system call filter in force.
//!
//! Where that happens depends on no_new_privs, as with runc: with it at the very end ([`super::program`]), where the
//! profile need allow nothing but execve; without it the kernel wants CAP_SYS_ADMIN, so before capabilities are given
//! up ([`super::identity`]).

use crate::{
    plan::{Failure, FailureKind, ProcessPlan},
    sys,
};

pub(super) fn install(process: &ProcessPlan) -> Result<(), Failure> {
    let Some(filter) = &process.seccomp else { return Ok(()) };
    let mut program: Vec<libc::sock_filter> =
        filter.program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    sys::filter_system_calls(&mut program, filter.flags)
        .map_err(|error| Failure::new(FailureKind::Internal, format!("linux.seccomp: install the filter: {error}")))
}

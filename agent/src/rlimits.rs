//! Resource limits of a process: set by its stage, or, where that is in a user namespace and may not raise any, by the
//! agent.

use oci_spec::runtime::PosixRlimitType as Type;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::spec::SpecError;

/// Sets limits (resource, soft, hard; u64::MAX is none) of process `pid`, or of the calling one.
///
/// # Errors
/// The first that the kernel refuses.
pub fn set<'l>(pid: Option<i32>, limits: impl Iterator<Item = &'l (Type, u64, u64)>) -> Result<(), SpecError> {
    for (limit, soft, hard) in limits {
        let value = |n: u64| (n != u64::MAX).then_some(n);
        let new = Rlimit { current: value(*soft), maximum: value(*hard) };
        prlimit(pid.and_then(Pid::from_raw), resource(*limit), new)
            .map_err(|error| SpecError::new("process.rlimits", format!("{limit} soft {soft} hard {hard}: {error}")))?;
    }
    Ok(())
}

fn resource(typ: Type) -> Resource {
    match typ {
        Type::RlimitCpu => Resource::Cpu,
        Type::RlimitFsize => Resource::Fsize,
        Type::RlimitData => Resource::Data,
        Type::RlimitStack => Resource::Stack,
        Type::RlimitCore => Resource::Core,
        Type::RlimitRss => Resource::Rss,
        Type::RlimitNproc => Resource::Nproc,
        Type::RlimitNofile => Resource::Nofile,
        Type::RlimitMemlock => Resource::Memlock,
        Type::RlimitAs => Resource::As,
        Type::RlimitLocks => Resource::Locks,
        Type::RlimitSigpending => Resource::Sigpending,
        Type::RlimitMsgqueue => Resource::Msgqueue,
        Type::RlimitNice => Resource::Nice,
        Type::RlimitRtprio => Resource::Rtprio,
        Type::RlimitRttime => Resource::Rttime,
    }
}

//! How large a pod's machine is: as its container's limits say, or as the configuration says where there are none. The
//! machine keeps its size for life, so a later Update beyond it is an error.

use caisson_oci::{CpuTime, FieldError, Limit, Limits};

use crate::host::config::Config;

const MIB: u64 = 1 << 20;

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSize {
    /// Processors that are online.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
}

impl HostSize {
    /// This host's.
    pub fn read() -> Self {
        let memory = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
        let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
        let cpus = online.ok().flatten().and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(u32::MAX);
        Self { cpus, memory }
    }
}

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// 1 to 32.
    pub vcpus: u8,
    /// Bytes, whole MiB.
    pub memory: u64,
}

impl MachineSize {
    /// The size for a container that asks for `asked`. What it asks for beyond the configuration's bounds or the host's
    /// size it does not get: its own limits hold inside, as always.
    pub fn of(asked: &Limits, config: &Config, host: HostSize) -> Self {
        let vcpus = wanted_cpus(asked).map_or(config.vcpus, |wanted| {
            let most = u64::from(config.max_vcpus).min(host.cpus.into()).max(1);
            u8::try_from(wanted.clamp(1, most)).unwrap_or(config.max_vcpus)
        });
        let memory = match asked.memory {
            Some(Limit::To(limit)) => {
                let wanted = limit.div_ceil(MIB).saturating_add(config.guest_overhead_mib.into());
                let least = u64::from(config.min_memory_mib);
                let most = u64::from(config.max_memory_mib).min(host.memory / MIB).max(least);
                wanted.clamp(least, most)
            }
            Some(Limit::Unlimited) | None => config.memory_mib.into(),
        };
        Self { vcpus, memory: memory * MIB }
    }

    /// Checks that a machine of this size can give a container what a changed limit asks for; `time` is the processor
    /// time that the container has then, if that changes.
    ///
    /// # Errors
    /// [`FieldError`] names the field, its value and the machine's size.
    pub fn check(&self, asked: &Limits, time: Option<CpuTime>) -> Result<(), FieldError> {
        let fixed = "a pod's machine keeps the size that its container's first limits gave it";
        if let Some(Limit::To(limit)) = asked.memory
            && limit > self.memory
        {
            let has = self.memory / MIB;
            let message = format!("{limit} bytes is more than the pod's machine has ({has} MiB): {fixed}");
            return Err(FieldError::new("linux.resources.memory.limit", message));
        }
        if let Some(time) = time
            && let Limit::To(quota) = time.quota
            && quota.div_ceil(time.period) > self.vcpus.into()
        {
            let period = time.period;
            let message = format!(
                "{quota} in each period of {period} microseconds is more processors than the pod's machine has ({}): {fixed}",
                self.vcpus
            );
            return Err(FieldError::new("linux.resources.cpu.quota", message));
        }
        Ok(())
    }
}

/// As many processors as a container can use: as its time needs, and not more than it may run on.
fn wanted_cpus(asked: &Limits) -> Option<u64> {
    let by_time = asked.time_over(CpuTime::DEFAULT).and_then(|time| match time.quota {
        Limit::To(quota) => Some(quota.div_ceil(time.period)),
        Limit::Unlimited => None,
    });
    let by_set = asked.cpus.as_ref().map(|cpus| u64::from(cpus.count()));
    by_time.into_iter().chain(by_set).min()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::resources::tests::asked;

    const HOST: HostSize = HostSize { cpus: 8, memory: 16 << 30 };

    fn size(json: serde_json::Value) -> (u8, u64) {
        let size = MachineSize::of(&asked(json).unwrap(), &Config::default(), HOST);
        (size.vcpus, size.memory / MIB)
    }

    #[test]
    fn limits_make_the_machine_and_without_them_the_configuration_does() {
        assert_eq!(size(json!({})), (1, 256));
        assert_eq!(size(json!({ "cpu": { "shares": 4096 }, "memory": { "reservation": 1 } })), (1, 256));
        assert_eq!(size(json!({ "cpu": { "quota": -1 }, "memory": { "limit": -1 } })), (1, 256));
        assert_eq!(size(json!({ "cpu": { "quota": 150_000, "period": 100_000 } })), (2, 256));
        assert_eq!(size(json!({ "cpu": { "quota": 1 }, "memory": { "limit": 1 << 30 } })), (1, 1024 + 64));
        assert_eq!(size(json!({ "cpu": { "cpus": "4-6" } })), (3, 256));
        assert_eq!(size(json!({ "cpu": { "cpus": "4-6", "quota": 200_000 } })), (2, 256), "time for two is all it has");
        assert_eq!(size(json!({ "cpu": { "cpus": "5", "quota": 200_000 } })), (1, 256));
        assert_eq!(size(json!({ "unified": { "cpu.max": "400000 100000", "memory.max": "1073741824" } })), (4, 1088));
    }

    #[test]
    fn bounds_are_the_configurations_and_the_hosts() {
        assert_eq!(size(json!({ "cpu": { "quota": 6_400_000 }, "memory": { "limit": 4096 } })), (8, 128));
        assert_eq!(size(json!({ "memory": { "limit": 1u64 << 50 } })), (1, 16 << 10));
        let config = Config { max_vcpus: 3, max_memory_mib: 300, min_memory_mib: 200, ..Config::default() };
        let of = |json| MachineSize::of(&asked(json).unwrap(), &config, HOST);
        assert_eq!(of(json!({ "cpu": { "quota": 900_000 }, "memory": { "limit": 1 << 30 } })).vcpus, 3);
        assert_eq!(of(json!({ "memory": { "limit": 1 << 30 } })).memory, 300 * MIB);
        assert_eq!(of(json!({ "memory": { "limit": 1 } })).memory, 200 * MIB);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_by_field_value_and_size() {
        let size = MachineSize { vcpus: 2, memory: 256 * MIB };
        let check = |json| {
            let asked = asked(json).unwrap();
            size.check(&asked, asked.time_over(CpuTime::DEFAULT))
        };
        let refused = |json| check(json).unwrap_err().to_string();
        let memory = refused(json!({ "memory": { "limit": 300 << 20 } }));
        for word in ["linux.resources.memory.limit", "314572800", "256 MiB"] {
            assert!(memory.contains(word), "{word}: {memory}");
        }
        let cpu = refused(json!({ "cpu": { "quota": 200_001 } }));
        for word in ["linux.resources.cpu.quota", "200001", "(2)"] {
            assert!(cpu.contains(word), "{word}: {cpu}");
        }
        for fits in [
            json!({ "cpu": { "quota": 200_000 }, "memory": { "limit": 256 << 20 } }),
            json!({ "cpu": { "quota": -1 } }),
        ] {
            check(fits).unwrap();
        }
    }

    proptest! {
        #[test]
        fn every_size_is_one_that_the_monitor_takes(
            quota: i64, period: u64, limit: i64, cpus in "[0-9]{1,3}(-[0-9]{1,3})?", host_cpus in 0u32..100, host_memory: u64,
        ) {
            let json = json!({ "cpu": { "quota": quota, "period": period, "cpus": cpus }, "memory": { "limit": limit } });
            if let Ok(asked) = asked(json) {
                let host = HostSize { cpus: host_cpus, memory: host_memory };
                let size = MachineSize::of(&asked, &Config::default(), host);
                prop_assert!((1..=32).contains(&size.vcpus));
                prop_assert!((32..=1 << 20).contains(&(size.memory / MIB)) && size.memory.is_multiple_of(MIB));
            }
        }
    }
}

//! The specification's weights are cgroup v1's; host and guest give both cgroup v2's. Linear, as runc documents it in
//! docs/cgroup-v2.md.

/// `cpu.shares` (2 to 262144; what is beyond counts as the bound) as cpu.weight, 1 to 10000.
pub fn cpu(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// `blkio.weight` (10 to 1000, likewise) as io.weight, 1 to 10000.
pub fn io(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ends_meet() {
        assert_eq!([2, 1024, 262_144].map(cpu), [1, 39, 10_000]);
        assert_eq!([10, 500, 1000].map(io), [1, 4950, 10_000]);
    }

    proptest! {
        #[test]
        fn any_weight_is_one_that_the_kernel_takes(shares: u64, weight: u16) {
            prop_assert!((1..=10_000).contains(&cpu(shares)));
            prop_assert!((1..=10_000).contains(&io(weight)));
        }
    }
}

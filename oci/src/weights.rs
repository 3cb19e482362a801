//! Weights: the specification has those of cgroup v1, the files are those of cgroup v2. Linear, as runc documents it in
//! docs/cgroup-v2.md.

/// `cpu.shares` (2 to 262144; what is beyond counts as the bound) as cpu.weight, 1 to 10000.
pub fn cpu(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// `blockIO.weight` as io.weight, 1 to 10000; None outside 10 to 1000, which the specification allows.
pub fn io(weight: u16) -> Option<u64> {
    (10..=1000).contains(&weight).then(|| 1 + (u64::from(weight) - 10) * 9999 / 990)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ends_meet() {
        assert_eq!([2, 1024, 262_144].map(cpu), [1, 39, 10_000]);
        assert_eq!([0, 1, 2, u64::MAX].map(cpu), [1, 1, 1, 10_000]);
        assert_eq!([9, 10, 500, 1000, 1001].map(io), [None, Some(1), Some(4950), Some(10_000), None]);
    }

    proptest! {
        #[test]
        fn any_weight_is_one_that_the_kernel_takes(shares: u64, weight: u16) {
            prop_assert!((1..=10_000).contains(&cpu(shares)));
            prop_assert!(io(weight).is_none_or(|weight| (1..=10_000).contains(&weight)));
        }
    }
}

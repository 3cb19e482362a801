//! What the host's KVM must be able to do: the shim asks before it starts a machine, the monitor when it builds one.
//! One list, so that the first never promises what the second then lacks.

/// The API's version, the same since Linux 2.6.22 (KVM_API_VERSION in linux/kvm.h).
pub const API_VERSION: i32 = 12;

/// An extension that KVM_CHECK_EXTENSION answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name in linux/kvm.h, by which an operator finds it.
    pub name: &'static str,
    /// Its number there.
    pub number: u32,
}

/// What the monitor cannot do without.
pub const NEEDED: [Capability; 7] = [
    Capability { name: "KVM_CAP_IRQCHIP", number: 0 },
    Capability { name: "KVM_CAP_USER_MEMORY", number: 3 },
    Capability { name: "KVM_CAP_SET_TSS_ADDR", number: 4 },
    Capability { name: "KVM_CAP_EXT_CPUID", number: 7 },
    Capability { name: "KVM_CAP_IRQFD", number: 32 },
    Capability { name: "KVM_CAP_IOEVENTFD", number: 36 },
    Capability { name: "KVM_CAP_IMMEDIATE_EXIT", number: 136 },
];

/// The first of [`NEEDED`] that `check` (KVM_CHECK_EXTENSION, 0 or less for "no") denies.
pub fn missing(check: impl Fn(u32) -> i32) -> Option<&'static str> {
    NEEDED.iter().find(|needed| check(needed.number) <= 0).map(|needed| needed.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_is_denied_is_named() {
        assert_eq!(missing(|_| 1), None);
        assert_eq!(missing(|number| if number == 36 { 0 } else { 5 }), Some("KVM_CAP_IOEVENTFD"));
        assert_eq!(missing(|_| -1), Some("KVM_CAP_IRQCHIP"));
    }
}

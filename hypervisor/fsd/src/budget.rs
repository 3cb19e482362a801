//! How many descriptors a guest may have this process hold, all connections together.
//!
//! Each file that the guest knows costs the host some 2.5 KiB of kernel memory that nothing can reclaim (a file, a dentry
//! and an inode; on an overlay two of the latter), in the pod's cgroup. So every descriptor that is kept for the guest
//! holds a [`Claim`]: one for each file that it knows, for each further mount that a file was reached by, for each open
//! file and lock owner, several for an open directory. A claim ends with what it was made for.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// See the module's introduction.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

/// A part of a budget that is in use.
#[derive(Debug)]
pub struct Claim {
    budget: Arc<Budget>,
    units: usize,
}

impl Budget {
    /// A budget of `limit` units.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// Takes `units`, if so many are left.
    pub fn claim(self: &Arc<Self>, units: usize) -> Option<Claim> {
        let more = |used: usize| used.checked_add(units).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Claim { budget: self.clone(), units })
    }

    /// Units in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.units, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_is_in_use_and_what_is_given_back_can_be_had_again() {
        let budget = Budget::new(5);
        let (one, four) = (budget.claim(1).unwrap(), budget.claim(4).unwrap());
        assert!(budget.claim(1).is_none() && budget.claim(usize::MAX).is_none());
        drop(one);
        assert!(budget.claim(2).is_none());
        assert_eq!(budget.claim(1).map(|claim| claim.units), Some(1));
        drop(four);
        assert_eq!(budget.used(), 0);
    }
}

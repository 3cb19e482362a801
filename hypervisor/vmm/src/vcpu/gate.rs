//! Lets vCPU threads run or holds them all.
//!
//! ```text
//!   main thread: close ── kick every vCPU ── wait until all stand ─────────► paused
//!   vCPU thread: run ─► interrupted ─► pass: closed? count me, wait ─► open ─► run
//! ```
//!
//! [`Gate::pass`] costs one atomic load while the gate is open.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// The gate in front of the guest.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    standing: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// A vCPU thread comes by; returns when the gate is open, and says whether it had to wait.
    pub fn pass(&self) -> bool {
        if !self.closed.load(Ordering::Acquire) {
            return false;
        }
        let mut standing = self.lock();
        *standing += 1;
        self.changed.notify_all();
        while self.closed.load(Ordering::Acquire) {
            standing = self.changed.wait(standing).unwrap_or_else(PoisonError::into_inner);
        }
        *standing -= 1;
        true
    }

    /// A vCPU thread ends: it will never run again.
    pub fn leave(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }

    /// Closes the gate. The caller then has to get the vCPUs out of the guest.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Waits until `count` vCPUs stand before the closed gate or have left.
    pub fn wait_for(&self, count: usize) {
        let mut standing = self.lock();
        while *standing < count {
            standing = self.changed.wait(standing).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets everybody go on.
    pub fn open(&self) {
        let _standing = self.lock();
        self.closed.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicU32};

    use super::*;

    #[test]
    fn nobody_moves_while_it_is_closed() {
        let gate = Arc::new(Gate::default());
        let steps = Arc::new(AtomicU32::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (gate, steps, stop) = (gate.clone(), steps.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        gate.pass();
                        steps.fetch_add(1, Ordering::Relaxed);
                    }
                    gate.leave();
                })
            })
            .collect();
        for _ in 0..100 {
            gate.close();
            gate.wait_for(4);
            let before = steps.load(Ordering::Relaxed);
            std::thread::yield_now();
            assert_eq!(steps.load(Ordering::Relaxed), before);
            gate.open();
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
        gate.close();
        gate.wait_for(4);
    }
}

//! Lets vCPU threads run or holds them all.
//!
//! ```text
//!   main thread: close ── kick every vCPU ── wait until all have stopped ─────────► paused
//!   vCPU thread: run ─► interrupted ─► pass: closed? count me, wait ─► open ─► run
//! ```
//!
//! [`Gate::pass`] costs one atomic load while the gate is open.
//!
//! No kick is lost. The main thread closes the gate, sets the vCPU's `immediate_exit`, and sends the signal; a vCPU thread
//! that comes back with EINTR swaps `immediate_exit` to 0, and then looks at the gate. All four accesses are SeqCst, so they
//! have one order that both threads agree on:
//!
//! - If the thread finds the gate open, its look comes before `close`. Its swap comes before that, and the setting of
//!   `immediate_exit` after it: the 1 is not wiped out, and KVM_RUN returns at once or is interrupted by the signal, which comes later still.
//! - Otherwise it finds the gate closed.
//!
//! A plain store of 0 would not do: the processor may let it out after the look at the gate, and it then wipes the 1 out after a
//! signal that met the thread outside KVM_RUN. The test `every_order_of_a_kick_ends_at_the_gate` goes through all orders, of both.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// The gate in front of the guest.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    stopped: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// Returns when the gate is open; whether the vCPU thread had to wait.
    pub fn pass(&self) -> bool {
        if !self.closed.load(Ordering::SeqCst) {
            return false;
        }
        let mut stopped = self.lock();
        *stopped += 1;
        self.changed.notify_all();
        while self.closed.load(Ordering::SeqCst) {
            stopped = self.changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
        *stopped -= 1;
        true
    }

    /// A vCPU thread ends: it will never run again.
    pub fn leave(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }

    /// Closes the gate. The caller then has to get the vCPUs out of the guest.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Waits until `count` vCPU threads wait at the closed gate or have ended.
    pub fn wait_for(&self, count: usize) {
        let mut stopped = self.lock();
        while *stopped < count {
            stopped = self.changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets everybody go on.
    pub fn open(&self) {
        let _stopped = self.lock();
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicU32};

    use super::*;

    /// What the two threads of a kick have done so far.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Model {
        /// Steps of the main thread: gate closed, `immediate_exit` set, signal sent.
        main: u8,
        vcpu: At,
        closed: bool,
        immediate_exit: bool,
        /// A store of 0 to `immediate_exit` that other processors do not see yet.
        buffered: bool,
        signal: bool,
    }

    /// What the vCPU thread does next.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum At {
        ClearImmediateExit,
        LookAtGate,
        EnterKvm,
        InGuest,
        BeforeGate,
    }

    impl Model {
        /// All states that may come next.
        fn next(self, atomic: bool) -> Vec<Self> {
            let mut next = Vec::new();
            match self.main {
                0 => next.push(Self { main: 1, closed: true, ..self }),
                1 => next.push(Self { main: 2, immediate_exit: true, ..self }),
                2 => next.push(Self { main: 3, signal: true, ..self }),
                _ => {}
            }
            if self.buffered {
                next.push(Self { buffered: false, immediate_exit: false, ..self });
            }
            let user_mode = !matches!(self.vcpu, At::EnterKvm | At::InGuest);
            // In user mode the handler takes the signal, and that is all. A system call empties the store buffer.
            if self.signal && user_mode {
                next.push(Self { signal: false, ..self });
            }
            match self.vcpu {
                At::ClearImmediateExit if atomic => {
                    next.push(Self { vcpu: At::LookAtGate, immediate_exit: false, ..self });
                }
                At::ClearImmediateExit => next.push(Self { vcpu: At::LookAtGate, buffered: true, ..self }),
                At::LookAtGate if self.closed => next.push(Self { vcpu: At::BeforeGate, ..self }),
                // The signal may still come before the system call.
                At::LookAtGate => next.push(Self { vcpu: At::EnterKvm, ..self }),
                At::EnterKvm if self.signal && !self.buffered => {
                    next.push(Self { signal: false, ..self });
                    next.push(Self { signal: false, vcpu: At::ClearImmediateExit, ..self });
                }
                At::EnterKvm if self.buffered => {}
                At::EnterKvm if self.immediate_exit => next.push(Self { vcpu: At::ClearImmediateExit, ..self }),
                At::EnterKvm => next.push(Self { vcpu: At::InGuest, ..self }),
                At::InGuest if self.signal => {
                    next.push(Self { signal: false, vcpu: At::ClearImmediateExit, ..self });
                }
                At::InGuest | At::BeforeGate => {}
            }
            next
        }

        /// Where the vCPU thread may be when nothing more happens.
        fn ends(atomic: bool) -> std::collections::BTreeSet<At> {
            let begin = Self {
                main: 0,
                vcpu: At::ClearImmediateExit,
                closed: false,
                immediate_exit: false,
                buffered: false,
                signal: false,
            };
            let (mut seen, mut work) = (std::collections::BTreeSet::from([begin]), vec![begin]);
            let mut ends = std::collections::BTreeSet::new();
            while let Some(state) = work.pop() {
                let next = state.next(atomic);
                if next.is_empty() {
                    ends.insert(state.vcpu);
                }
                work.extend(next.into_iter().filter(|state| seen.insert(*state)));
            }
            ends
        }
    }

    #[test]
    fn every_order_of_a_kick_ends_at_the_gate() {
        assert_eq!(Model::ends(true), [At::BeforeGate].into());
        // And the model sees what a plain store would do.
        assert!(Model::ends(false).contains(&At::InGuest));
    }

    #[test]
    fn no_thread_runs_while_it_is_closed() {
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

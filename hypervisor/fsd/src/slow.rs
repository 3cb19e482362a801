//! Requests that may take long: they may use all threads but one.
//!
//! The threads of a connection take requests from its socket in turn. If each of them waited for a disk, a request
//! that needs none (GETATTR, FORGET) would wait as well. So a thread that receives a slow request while enough threads have
//! one puts it aside, and one of those carries it out next.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
};

/// Requests that may be put aside. The device's queue holds fewer.
const MAX_WAITING: usize = 4096;

/// See the module's introduction.
#[derive(Debug)]
pub struct Slow<T> {
    limit: usize,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    running: usize,
    waiting: VecDeque<T>,
}

impl<T> Slow<T> {
    /// For a connection with this many threads; with one thread, that one does everything.
    pub fn new(threads: usize) -> Self {
        let state = State { running: 0, waiting: VecDeque::new() };
        Self { limit: threads.saturating_sub(1).max(1), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Has `request` carried out by `serve`: by this thread, with what is put aside meanwhile, or later by another one.
    ///
    /// # Errors
    /// `serve`'s; the request, if too many wait.
    pub fn run<E>(&self, request: T, mut serve: impl FnMut(T) -> Result<(), E>) -> Result<Result<(), E>, T> {
        let mut state = self.state();
        if state.running >= self.limit {
            if state.waiting.len() >= MAX_WAITING {
                return Err(request);
            }
            state.waiting.push_back(request);
            return Ok(Ok(()));
        }
        state.running += 1;
        drop(state);
        let mut next = request;
        loop {
            let served = serve(next);
            let mut state = self.state();
            match state.waiting.pop_front() {
                Some(waiting) if served.is_ok() => next = waiting,
                _ => {
                    state.running -= 1;
                    return Ok(served);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_thread_stays_free_and_everything_is_carried_out_in_its_turn() {
        let slow = Slow::new(3);
        let (started, starts) = channel();
        let (done, ends) = channel();
        std::thread::scope(|scope| {
            let slow = &slow;
            let mut releases = Vec::new();
            for number in 0..2 {
                let (release, wait) = channel::<()>();
                releases.push(release);
                let (started, done) = (started.clone(), done.clone());
                scope.spawn(move || {
                    slow.run(number, |number| {
                        started.send(number).unwrap();
                        if number < 2 {
                            wait.recv().unwrap();
                        }
                        done.send(number).unwrap();
                        Ok::<(), ()>(())
                    })
                });
            }
            for _ in 0..2 {
                starts.recv().unwrap();
            }
            // The third thread is not kept.
            for number in 2..5 {
                assert_eq!(slow.run(number, |_| -> Result<(), ()> { panic!("by the wrong thread") }), Ok(Ok(())));
            }
            releases[0].send(()).unwrap();
            assert_eq!(ends.iter().take(4).collect::<Vec<_>>(), [0, 2, 3, 4]);
            releases[1].send(()).unwrap();
            assert_eq!(ends.recv().unwrap(), 1);
        });
        assert_eq!(slow.state().running, 0);
        assert_eq!(slow.run(9, |_| Err::<(), _>("error")), Ok(Err("error")));
        assert_eq!(slow.state().running, 0);
    }

    #[test]
    fn one_thread_alone_does_everything() {
        let slow = Slow::new(1);
        let mut served = Vec::new();
        slow.run(1, |number| {
            served.push(number);
            Ok::<(), ()>(())
        })
        .unwrap()
        .unwrap();
        assert_eq!(served, [1]);
    }
}

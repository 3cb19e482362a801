//! A disk's own thread: all that may block is done here, so that slow or hung storage stops its own disk and nothing else.
//!
//! ```text
//!   device thread                                     disk thread
//!     submit ──► jobs ─────────── take one ──────────► system calls on the file
//!     eventfd ◄── done ◄── generation as before? ◄──── result
//!     cancel: jobs and done are cleared, generation + 1
//! ```
//!
//! The thread has its own copy of all that it needs and never touches guest memory or queues: a result means nothing before
//! the device thread has taken it. So neither a reset of the device nor a pause of the machine waits for the file. After
//! a reset, the job that is running goes on, and what it did to the file stands, as with a real disk; its result is dropped.
//! Jobs are done one after the other, in order: what a driver asks for after a reset comes after what it asked for before.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    backing::{self, Backing},
    pieces::Piece,
    request::Segment,
};

/// The thread's stack, bytes.
const STACK: usize = 128 << 10;

/// What to do with the file. `sync`: and make it durable.
#[derive(Debug)]
pub enum Work {
    /// Fill `piece`.
    Read {
        /// Byte in the file.
        position: u64,
        /// Where to.
        piece: Piece,
    },
    /// Write `piece`.
    Write {
        /// Byte in the file.
        position: u64,
        /// What.
        piece: Piece,
        /// See above.
        sync: bool,
    },
    /// Give blocks back.
    Discard {
        /// The ranges.
        segments: Vec<Segment>,
        /// See above.
        sync: bool,
    },
    /// Make ranges read as zeros.
    WriteZeroes {
        /// The ranges.
        segments: Vec<Segment>,
        /// See above.
        sync: bool,
    },
    /// Make everything durable.
    Flush,
}

/// Work with the name of the request that it is for, before and after it is done.
#[derive(Debug)]
struct Job {
    head: u16,
    work: Work,
}

/// Work that is done.
#[derive(Debug)]
pub struct Done {
    /// The request.
    pub head: u16,
    /// The work, with the data that was read.
    pub work: Work,
    /// How it went.
    pub result: io::Result<()>,
}

/// The thread. Dropped, it ends after the job that is running.
#[derive(Debug)]
pub struct Engine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable when something is done.
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    generation: u64,
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    closed: bool,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub fn start(backing: impl Backing) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), event });
        let own = shared.clone();
        std::thread::Builder::new().name("disk".into()).stack_size(STACK).spawn(move || own.run(&backing))?;
        Ok(Self(shared))
    }

    /// Adds work for request `head`.
    pub fn submit(&self, head: u16, work: Work) {
        self.0.lock().jobs.push_back(Job { head, work });
        self.0.changed.notify_one();
    }

    /// Readable when [`Self::take_done`] has something to give.
    pub fn event(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }

    /// All that is done and was not taken yet.
    pub fn take_done(&self) -> Vec<Done> {
        // Before the list: what is added later signals again.
        let _ = self.0.event.read();
        std::mem::take(&mut self.0.lock().done)
    }

    /// Forgets all jobs; nothing that was submitted before will be taken as done.
    pub fn cancel(&self) {
        let mut state = self.0.lock();
        state.generation += 1;
        state.jobs.clear();
        state.done.clear();
        let _ = self.0.event.read();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Not joined: the file may never answer.
        self.0.lock().closed = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, backing: &impl Backing) {
        while let Some((generation, Job { head, mut work })) = self.next() {
            let result = perform(backing, &mut work);
            let mut state = self.lock();
            if state.generation == generation {
                // If there is one already, the device thread has the signal and will take both.
                if state.done.is_empty() {
                    // Fails only if the counter is full, and then it is readable anyway.
                    let _ = self.event.write(1);
                }
                state.done.push(Done { head, work, result });
            }
        }
    }

    /// Waits for a job; gives it with the generation that it belongs to. None: the device is gone.
    fn next(&self) -> Option<(u64, Job)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some((state.generation, job));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn perform(backing: &impl Backing, work: &mut Work) -> io::Result<()> {
    let sync = match work {
        Work::Read { position, piece } => {
            backing::read_all(backing, piece.bytes_mut(), *position)?;
            false
        }
        Work::Write { position, piece, sync } => {
            backing::write_all(backing, piece.bytes(), *position)?;
            *sync
        }
        Work::Discard { segments, sync } => {
            segments.iter().try_for_each(|segment| backing::discard(backing, *segment))?;
            *sync
        }
        Work::WriteZeroes { segments, sync } => {
            segments.iter().try_for_each(|segment| backing::write_zeroes(backing, *segment))?;
            *sync
        }
        Work::Flush => true,
    };
    if sync { backing.sync() } else { Ok(()) }
}

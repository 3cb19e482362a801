//! The states of one process, init or exec; pure.
//!
//! ```text
//!   init:  Creating ──prepared──► Created ──┐                 exited (from anywhere)
//!                                           ├─start─► Starting ──entered──► Running ──► Stopped
//!   exec:                         Added ────┘            └─────── refused ─────────────►
//! ```
//!
//! An exit may be reported at any moment, also before the caller of Start has learnt that the program was entered. The
//! first one counts and is never lost: a later question finds it.

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + the signal's number.
    pub status: u32,
    /// Wall clock, nanoseconds since 1970.
    pub at_ns: i64,
}

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// An init stage prepares its container.
    Creating,
    /// An init stage waits for Start.
    Created,
    /// An exec is known; no process exists yet.
    Added,
    /// Start is at work.
    Starting,
    /// The program runs.
    Running,
    /// It has ended, or never began.
    Stopped(Exit),
}

impl Phase {
    /// The word of messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created | Self::Added => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// The process is in a state in which that cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The wrong state.
    #[error("it is {}, not {wanted}", .is.as_str())]
    Wrong {
        /// Where it is.
        is: Phase,
        /// Where it would have to be.
        wanted: &'static str,
    },
    /// Its container is paused.
    #[error("it is paused")]
    Paused,
    /// Its container is not paused.
    #[error("it is not paused")]
    NotPaused,
    /// A signal for what has ended.
    #[error("process already finished")]
    Finished,
}

/// One process's state.
#[derive(Clone, Copy, Debug)]
pub struct Lifecycle {
    phase: Phase,
    pid: Option<i32>,
}

impl Lifecycle {
    /// An init process whose stage is about to be made.
    pub fn init() -> Self {
        Self { phase: Phase::Creating, pid: None }
    }

    /// An exec that waits for its Start.
    pub fn exec() -> Self {
        Self { phase: Phase::Added, pid: None }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The process's number, once there is a process, and also after its end.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// The process exists.
    pub fn spawned(&mut self, pid: i32) {
        self.pid = Some(pid);
    }

    /// The init stage is ready. False if it has ended meanwhile.
    pub fn prepared(&mut self) -> bool {
        if self.phase == Phase::Creating {
            self.phase = Phase::Created;
        }
        self.phase == Phase::Created
    }

    /// Start begins.
    ///
    /// # Errors
    /// Unless it is created and has not been started.
    pub fn start(&mut self) -> Result<(), StateError> {
        match self.phase {
            Phase::Created | Phase::Added => {
                self.phase = Phase::Starting;
                Ok(())
            }
            is => Err(StateError::Wrong { is, wanted: "created" }),
        }
    }

    /// The program was entered.
    pub fn entered(&mut self) {
        if self.phase == Phase::Starting {
            self.phase = Phase::Running;
        }
    }

    /// The process ended, or will never exist. True if this is news.
    pub fn exited(&mut self, exit: Exit) -> bool {
        let news = self.exit().is_none();
        if news {
            self.phase = Phase::Stopped(exit);
        }
        news
    }

    /// Whom a signal goes to.
    ///
    /// # Errors
    /// If there is no process yet, or no longer.
    pub fn target(&self) -> Result<i32, StateError> {
        match (self.phase, self.pid) {
            (Phase::Stopped(_), _) => Err(StateError::Finished),
            (_, Some(pid)) => Ok(pid),
            (is, None) => Err(StateError::Wrong { is, wanted: "running" }),
        }
    }

    /// The number of a process that others can be started beside: it is created, or has been started.
    ///
    /// # Errors
    /// If its container is not ready yet, or it has ended.
    pub fn created(&self) -> Result<i32, StateError> {
        match (self.phase, self.pid) {
            (Phase::Created | Phase::Starting | Phase::Running, Some(pid)) => Ok(pid),
            (is, _) => Err(StateError::Wrong { is, wanted: "created or running" }),
        }
    }

    /// The program runs.
    ///
    /// # Errors
    /// If it does not.
    pub fn running(&self) -> Result<i32, StateError> {
        match (self.phase, self.pid) {
            (Phase::Running, Some(pid)) => Ok(pid),
            (is, _) => Err(StateError::Wrong { is, wanted: "running" }),
        }
    }

    /// How it ended.
    ///
    /// # Errors
    /// If it has not.
    pub fn stopped(&self) -> Result<Exit, StateError> {
        self.exit().ok_or(StateError::Wrong { is: self.phase, wanted: "stopped" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Spawned,
        Prepared,
        Start,
        Entered,
        Exited(u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Spawned),
            Just(Event::Prepared),
            Just(Event::Start),
            Just(Event::Entered),
            (0u32..256).prop_map(Event::Exited)
        ]
    }

    proptest! {
        /// Whatever the order: the first exit stays, a stopped process is neither signalled nor started,
        /// and Start succeeds at most once.
        #[test]
        fn any_order_of_events_keeps_the_promises(init: bool, events in proptest::collection::vec(event(), 0..24)) {
            let mut life = if init { Lifecycle::init() } else { Lifecycle::exec() };
            let (mut first, mut starts) = (None, 0);
            for event in events {
                match event {
                    Event::Spawned => life.spawned(7),
                    Event::Prepared => {
                        let usable = life.prepared();
                        prop_assert!(!(usable && first.is_some()));
                    }
                    Event::Start => {
                        let started = life.start().is_ok();
                        prop_assert!(!(started && first.is_some()));
                        starts += u32::from(started);
                    }
                    Event::Entered => life.entered(),
                    Event::Exited(status) => {
                        let exit = Exit { status, at_ns: 1 };
                        prop_assert_eq!(life.exited(exit), first.is_none());
                        first = first.or(Some(exit));
                    }
                }
                prop_assert_eq!(life.exit(), first);
                prop_assert_eq!(life.stopped().is_ok(), first.is_some());
                prop_assert_eq!(life.target() == Err(StateError::Finished), first.is_some());
                prop_assert!(starts <= 1);
                prop_assert!(!(life.running().is_ok() && starts == 0));
            }
        }
    }
}

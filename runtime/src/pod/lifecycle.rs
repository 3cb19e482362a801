//! The life of one process of a task (the container's init process or one that Exec added), without any I/O. It decides
//! which requests are allowed when, with the words that containerd's own shim uses, and in which order the
//! events are published: the start always comes before the exit, and the exit exactly once, however the answers overtake each
//! other.
//!
//! ```text
//!              prepared             begin_start           started
//!  Preparing ───────────► Created ──────────────► Starting ─────────► Running
//!                            │                       │  │                │
//!                            │ exited   start_failed │  │ exited         │ exited
//!                            ▼                       ▼  ▼ (kept)         ▼
//!                         Stopped ◄──────────────── Stopped ◄─────── Stopped
//!                            │ begin_delete (also from Created: it is killed first)
//!                            ▼
//!                         Deleting ── delete_failed ──► Stopped
//!
//!          begin_pause          paused          begin_resume
//!  Running ──────────► Pausing ────────► Paused ────────────► Resuming ── resumed ──► Running      (init processes only,
//!     ▲                   │ pause_failed   ▲                      │ resume_failed                   `exited` from any)
//!     └───────────────────┘                └──────────────────────┘
//! ```

use std::time::SystemTime;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255: its exit code, or 128 + the signal's number.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// The exit of a process that went down with its machine: as if killed.
pub const KILLED: u32 = 128 + 9;

/// What containerd sees of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It can be started.
    Created,
    /// It runs.
    Running,
    /// Its container is being paused.
    Pausing,
    /// Its container is paused.
    Paused,
    /// It has ended.
    Stopped,
}

/// Where a container that runs is between running and paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freezer {
    Thawed,
    Pausing,
    Paused,
    Resuming,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Created,
    /// The agent was asked to start it; an exit that came before the answer waits here.
    Starting(Option<Exit>),
    Running(Freezer),
    Stopped(Exit),
    /// None: it was never started and never ran.
    Deleting(Option<Exit>),
}

/// A request that does not fit the process's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// FAILED_PRECONDITION.
    #[error("cannot {verb} a {state} process")]
    State {
        /// What was asked.
        verb: &'static str,
        /// What it is.
        state: &'static str,
    },
    /// FAILED_PRECONDITION.
    #[error("cannot {verb} a {state} container")]
    Container {
        /// What was asked.
        verb: &'static str,
        /// What it is.
        state: &'static str,
    },
    /// FAILED_PRECONDITION: it does not run yet.
    #[error("cannot {0} task in created state")]
    NotStarted(&'static str),
    /// FAILED_PRECONDITION: nothing can be added to a container without a living init process.
    #[error("cannot exec in a {0} state")]
    Exec(&'static str),
    /// NOT_FOUND: there is nothing to signal any more.
    #[error("process already finished")]
    Finished,
    /// FAILED_PRECONDITION: an exec that was not started.
    #[error("process not created")]
    NotCreated,
}

/// See the module's introduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    phase: Phase,
    is_init: bool,
}

impl Process {
    /// A process that is being prepared in the guest.
    pub fn new(is_init: bool) -> Self {
        Self { phase: Phase::Preparing, is_init }
    }

    fn state(&self) -> &'static str {
        match self.phase {
            Phase::Preparing => "not yet created",
            Phase::Created => "created",
            Phase::Starting(_) => "starting",
            Phase::Running(Freezer::Thawed) => "running",
            Phase::Running(_) => "paused",
            Phase::Stopped(_) => "stopped",
            Phase::Deleting(_) => "deleted",
        }
    }

    fn refuse(&self, verb: &'static str) -> Refusal {
        Refusal::State { verb, state: self.state() }
    }

    /// The agent has it ready.
    pub fn prepared(&mut self) {
        if self.phase == Phase::Preparing {
            self.phase = Phase::Created;
        }
    }

    /// May it be started? If so, ask the agent, and report the answer by [`started`](Self::started) or
    /// [`start_failed`](Self::start_failed).
    ///
    /// # Errors
    /// If it is not a created process.
    pub fn begin_start(&mut self) -> Result<(), Refusal> {
        if self.phase != Phase::Created {
            return Err(self.refuse("start"));
        }
        self.phase = Phase::Starting(None);
        Ok(())
    }

    /// It runs its program: publish the start, then the exit that this returns, if any.
    #[must_use]
    pub fn started(&mut self) -> Option<Exit> {
        let Phase::Starting(exit) = self.phase else { return None };
        self.phase = exit.map_or(Phase::Running(Freezer::Thawed), Phase::Stopped);
        exit
    }

    /// It could not run its program and has ended: publish the exit that this returns.
    #[must_use]
    pub fn start_failed(&mut self, exit: Exit) -> Option<Exit> {
        let Phase::Starting(_) = self.phase else { return None };
        self.phase = Phase::Stopped(exit);
        Some(exit)
    }

    /// The agent says that it has ended, or its machine has: publish the exit that this returns.
    #[must_use]
    pub fn exited(&mut self, exit: Exit) -> Option<Exit> {
        match &mut self.phase {
            Phase::Created if !self.is_init => None,
            Phase::Created | Phase::Running(_) => {
                self.phase = Phase::Stopped(exit);
                Some(exit)
            }
            Phase::Starting(early) => {
                early.get_or_insert(exit);
                None
            }
            Phase::Preparing | Phase::Stopped(_) | Phase::Deleting(_) => None,
        }
    }

    /// May it be signalled?
    ///
    /// # Errors
    /// If there is nothing to signal.
    pub fn check_kill(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Created if !self.is_init => Err(Refusal::NotCreated),
            Phase::Preparing => Err(Refusal::NotCreated),
            Phase::Created | Phase::Starting(_) | Phase::Running(_) => Ok(()),
            Phase::Stopped(_) | Phase::Deleting(_) => Err(Refusal::Finished),
        }
    }

    /// May processes be added to the container whose init process this is?
    ///
    /// # Errors
    /// If it has ended, is paused or is not there yet.
    pub fn check_exec(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Created | Phase::Starting(_) | Phase::Running(Freezer::Thawed) => Ok(()),
            _ => Err(Refusal::Exec(self.state())),
        }
    }

    /// May its terminal get another size?
    ///
    /// # Errors
    /// If it has ended.
    pub fn check_resize(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Stopped(_) => Err(Refusal::Container { verb: "resize", state: "stopped" }),
            Phase::Deleting(_) => Err(self.refuse("resize")),
            _ => Ok(()),
        }
    }

    /// May the container's limits be changed?
    ///
    /// # Errors
    /// If it has ended or is not there yet.
    pub fn check_update(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Created | Phase::Starting(_) | Phase::Running(_) => Ok(()),
            Phase::Preparing => Err(Refusal::NotCreated),
            Phase::Stopped(_) => Err(Refusal::Container { verb: "update", state: "stopped" }),
            Phase::Deleting(_) => Err(self.refuse("update")),
        }
    }

    /// May the container be paused? If so, ask the agent, and report the answer by [`paused`](Self::paused) or
    /// [`pause_failed`](Self::pause_failed).
    ///
    /// # Errors
    /// If it does not run.
    pub fn begin_pause(&mut self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Running(Freezer::Thawed) => {
                self.phase = Phase::Running(Freezer::Pausing);
                Ok(())
            }
            Phase::Running(_) | Phase::Stopped(_) => Err(Refusal::Container { verb: "pause", state: self.state() }),
            Phase::Deleting(_) => Err(self.refuse("pause")),
            Phase::Preparing | Phase::Created | Phase::Starting(_) => Err(Refusal::NotStarted("pause")),
        }
    }

    /// It stands still.
    ///
    /// # Errors
    /// If it ended on the way: then the pause is not published.
    pub fn paused(&mut self) -> Result<(), Refusal> {
        if self.phase != Phase::Running(Freezer::Pausing) {
            return Err(Refusal::Container { verb: "pause", state: self.state() });
        }
        self.phase = Phase::Running(Freezer::Paused);
        Ok(())
    }

    /// It could not be paused and goes on.
    pub fn pause_failed(&mut self) {
        if self.phase == Phase::Running(Freezer::Pausing) {
            self.phase = Phase::Running(Freezer::Thawed);
        }
    }

    /// May the container be resumed? If so, ask the agent, and report the answer by [`resumed`](Self::resumed) or
    /// [`resume_failed`](Self::resume_failed).
    ///
    /// # Errors
    /// If it is not paused.
    pub fn begin_resume(&mut self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Running(Freezer::Paused) => {
                self.phase = Phase::Running(Freezer::Resuming);
                Ok(())
            }
            Phase::Running(Freezer::Thawed) | Phase::Deleting(_) => Err(self.refuse("resume")),
            Phase::Running(Freezer::Pausing) => Err(Refusal::Container { verb: "resume", state: "pausing" }),
            Phase::Running(Freezer::Resuming) => Err(Refusal::Container { verb: "resume", state: "resuming" }),
            Phase::Stopped(_) => Err(Refusal::Container { verb: "resume", state: "stopped" }),
            Phase::Preparing | Phase::Created | Phase::Starting(_) => Err(Refusal::NotStarted("resume")),
        }
    }

    /// It goes on.
    ///
    /// # Errors
    /// If it ended on the way: then the resume is not published.
    pub fn resumed(&mut self) -> Result<(), Refusal> {
        if self.phase != Phase::Running(Freezer::Resuming) {
            return Err(Refusal::Container { verb: "resume", state: self.state() });
        }
        self.phase = Phase::Running(Freezer::Thawed);
        Ok(())
    }

    /// It could not be resumed and stands still.
    pub fn resume_failed(&mut self) {
        if self.phase == Phase::Running(Freezer::Resuming) {
            self.phase = Phase::Running(Freezer::Paused);
        }
    }

    /// May it be deleted? True: it was created and never started, so end it first.
    ///
    /// # Errors
    /// If it runs, or another Delete is under way.
    pub fn begin_delete(&mut self) -> Result<bool, Refusal> {
        match self.phase {
            Phase::Created => {
                self.phase = Phase::Deleting(None);
                Ok(true)
            }
            Phase::Stopped(exit) => {
                self.phase = Phase::Deleting(Some(exit));
                Ok(false)
            }
            _ => Err(self.refuse("delete")),
        }
    }

    /// The Delete did not succeed; it may be tried again.
    pub fn delete_failed(&mut self, killed_at: SystemTime) {
        if let Phase::Deleting(exit) = self.phase {
            self.phase = Phase::Stopped(exit.unwrap_or(Exit { status: KILLED, at: killed_at }));
        }
    }

    /// What containerd gets.
    pub fn status(&self) -> Status {
        match self.phase {
            Phase::Preparing | Phase::Created => Status::Created,
            Phase::Starting(_) | Phase::Running(Freezer::Thawed) => Status::Running,
            Phase::Running(Freezer::Pausing) => Status::Pausing,
            Phase::Running(Freezer::Paused | Freezer::Resuming) => Status::Paused,
            Phase::Stopped(_) | Phase::Deleting(_) => Status::Stopped,
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Stopped(exit) => Some(exit),
            Phase::Deleting(exit) => exit,
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;

//! One process as the calls see it: its state, its streams, and everyone who waits for its end.

use std::{io, sync::Mutex, time::Duration};

use tokio::sync::watch;

use super::lock;
use crate::{
    handshake::AgentEnd,
    lifecycle::{Exit, Lifecycle, Phase, StateError},
    plan::{ProcessPlan, TerminalSize},
    stdio::{self, HostStreams},
};

/// What Start of a process needs.
pub(super) enum Pending {
    /// An init stage waits behind this socket; entering the program may take this long.
    Init(AgentEnd, Duration),
    /// Nothing exists yet.
    Exec(Box<ProcessPlan>, HostStreams),
}

struct State {
    life: Lifecycle,
    pending: Option<Pending>,
    stdio: Option<stdio::Handle>,
    deleting: bool,
}

/// An init process or an exec.
pub(super) struct Process {
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(super) fn new(life: Lifecycle, pending: Option<Pending>) -> Self {
        let state = State { life, pending, stdio: None, deleting: false };
        Self { state: Mutex::new(state), exit: watch::Sender::new(None) }
    }

    pub(super) fn spawned(&self, pid: i32) {
        lock(&self.state).life.spawned(pid);
    }

    pub(super) fn exited(&self, exit: Exit) {
        let mut state = lock(&self.state);
        if let Some(handle) = &mut state.stdio {
            handle.ended();
        }
        if state.life.exited(exit) {
            self.exit.send_replace(Some(exit));
        }
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`, so only a value can end the wait.
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(Exit { status: 255, at_ns: 0 })
    }

    pub(super) fn pid(&self) -> Option<i32> {
        lock(&self.state).life.pid()
    }

    pub(super) fn phase(&self) -> Phase {
        lock(&self.state).life.phase()
    }

    pub(super) fn wrong_state(&self, wanted: &'static str) -> StateError {
        StateError::Wrong { is: self.phase(), wanted }
    }

    pub(super) fn target(&self) -> Result<i32, StateError> {
        lock(&self.state).life.target()
    }

    pub(super) fn running(&self) -> Result<i32, StateError> {
        lock(&self.state).life.running()
    }

    pub(super) fn created(&self) -> Result<i32, StateError> {
        lock(&self.state).life.created()
    }

    pub(super) fn stopped(&self) -> Result<Exit, StateError> {
        lock(&self.state).life.stopped()
    }

    /// The init stage is ready. False if it has ended meanwhile.
    pub(super) fn prepared(&self, stage: AgentEnd, limit: Duration) -> bool {
        let mut state = lock(&self.state);
        state.pending = Some(Pending::Init(stage, limit));
        state.life.prepared()
    }

    /// Start begins; no second one will.
    pub(super) fn start(&self) -> Result<Pending, StateError> {
        let mut state = lock(&self.state);
        state.life.start()?;
        state.pending.take().ok_or(StateError::Wrong { is: state.life.phase(), wanted: "created" })
    }

    pub(super) fn entered(&self) {
        lock(&self.state).life.entered();
    }

    pub(super) fn set_stdio(&self, handle: stdio::Handle) {
        let mut state = lock(&self.state);
        state.stdio = Some(handle);
        if state.life.stopped().is_ok() {
            // It has ended before it was ready.
            state.stdio.iter_mut().for_each(stdio::Handle::ended);
        }
    }

    /// False if it has no terminal. The size of one that does not exist yet is kept for it.
    pub(super) fn resize(&self, width: u16, height: u16) -> io::Result<bool> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        match (&state.stdio, &mut state.pending) {
            (Some(handle), _) => handle.resize(width, height),
            (None, Some(Pending::Exec(plan, _))) if plan.terminal.is_some() => {
                plan.terminal = Some(TerminalSize { width, height });
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// False if another call has begun to delete it.
    pub(super) fn begin_delete(&self) -> bool {
        !std::mem::replace(&mut lock(&self.state).deleting, true)
    }
}

//! The life of one monitor: commands in, answers out, devices served in between, one exit notice at the end.
//!
//! ```text
//!                Configure           Start              Pause
//!  Unconfigured ───────────► Ready ─────────► Running ─────────► Paused
//!        ▲ refused │           │                ▲ └──── Resume ────┘ │
//!        └─────────┘           └────────────────┴───► ended ◄────────┘  the guest, Shutdown, or the parent has gone
//! ```
//!
//! One loop serves the control socket and all devices. While the machine is paused it listens to the
//! control socket alone, so devices stand still between two requests; what comes for them meanwhile waits in their descriptors.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    rc::Rc,
    sync::Arc,
};

use caisson_protos::monitor::{Command, Event, ExitNotice, ExitReason, Reply, Request};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::Kvm;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use slog::Logger;

use crate::{
    control::{Control, ControlError, Received},
    descriptors::Descriptors,
    end::End,
    kvm::KvmError,
    machine::{Machine, MachineError},
    virtio::mmio::DeviceEvents,
};

/// Events fetched from the kernel at a time.
const BATCH: usize = 32;

/// What ends a monitor without a machine's end.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The event loop.
    #[error("event loop: {0}")]
    Events(#[from] event_manager::Error),
    /// A descriptor or a wait of our own.
    #[error("event loop: {0}")]
    System(#[from] io::Error),
}

/// A command that cannot be obeyed; the parent reads it as a sentence.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the machine is {0}: {1}")]
    State(&'static str, &'static str),
    #[error("only Configure takes descriptors, {0}")]
    Descriptors(#[from] crate::descriptors::DescriptorError),
    #[error(transparent)]
    Kvm(Arc<KvmError>),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// One monitor.
pub struct Monitor {
    control: Control,
    kvm: Result<Kvm, Arc<KvmError>>,
    log: Logger,
    end: Arc<End>,
    events: EventManager<Subscriber>,
    control_ready: Rc<Cell<bool>>,
    machine: Option<Machine>,
    paused: bool,
}

impl Monitor {
    /// A monitor without a machine. If KVM is unusable, Configure will be told why.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(control: Control, kvm: Result<Kvm, KvmError>, log: Logger) -> Result<Self, MonitorError> {
        let end = Arc::new(End::new()?);
        let control_ready = Rc::new(Cell::new(false));
        let mut events = EventManager::new_with_capacity(BATCH)?;
        for (fd, flag) in [
            (control.as_fd().as_raw_fd(), control_ready.clone()),
            // Its readiness ends the wait, and that is all.
            (end.event().as_raw_fd(), Rc::default()),
        ] {
            events.add_subscriber(Subscriber::Flag { fd, flag });
        }
        let kvm = kvm.map_err(Arc::new);
        Ok(Self { control, kvm, log, end, events, control_ready, machine: None, paused: false })
    }

    /// Serves until the machine has ended, tells the parent, and gives the notice. The machine stays in memory, since
    /// vCPUs may still run in it: the process is to exit, which ends them together with it.
    ///
    /// # Errors
    /// See [`MonitorError`]; the parent was told if that was possible.
    pub fn run(&mut self) -> Result<ExitNotice, MonitorError> {
        let served = self.serve();
        if let Err(error) = &served {
            self.end.declare(ExitReason::MonitorError, error.to_string());
        }
        // `serve` comes back without an error only after the end was declared.
        let notice = self.end.notice().unwrap_or_else(|| ExitNotice {
            reason: ExitReason::MonitorError,
            detail: "the machine ended without a reason".into(),
        });
        if let Some(machine) = &self.machine {
            machine.bus().ports.flush();
            let stats = machine.stats();
            slog::info!(self.log, "machine ended"; "reason" => notice.reason.as_str(), "detail" => &notice.detail,
                "vcpu_exits" => stats.vcpu_exits, "queue_notifications" => stats.queue_notifications,
                "interrupts" => stats.interrupts, "guest_faults" => stats.guest_faults);
        }
        self.control.send(&Event::Exited(notice.clone()))?;
        served.map(|()| notice)
    }

    fn serve(&mut self) -> Result<(), MonitorError> {
        loop {
            if self.end.notice().is_some() {
                return Ok(());
            }
            if self.paused {
                self.wait_paused()?;
            } else {
                self.events.run()?;
            }
            if self.control_ready.take() {
                self.command()?;
            }
        }
    }

    /// Waits for a command or the end, and for nothing else.
    fn wait_paused(&self) -> Result<(), MonitorError> {
        let mut fds =
            [PollFd::new(&self.control, PollFlags::IN), PollFd::from_borrowed_fd(self.end.event(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {
                let [control, _] = fds;
                self.control_ready.set(!control.revents().is_empty());
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn command(&mut self) -> Result<(), MonitorError> {
        let (Command { id, request }, descriptors) = match self.control.receive()? {
            Received::Command(command, descriptors) => (command, descriptors),
            Received::Closed => {
                self.end.declare(ExitReason::Requested, "the parent closed the control socket");
                return Ok(());
            }
            Received::Malformed(reason) => {
                // There is no id to answer, so its sender would wait for ever: the exit notice says why.
                self.end.declare(ExitReason::MonitorError, reason.to_string());
                return Ok(());
            }
        };
        let result = self.obey(request, descriptors);
        if let Err(error) = &result {
            slog::warn!(self.log, "command refused"; "error" => %error);
        }
        self.control.send(&Event::Answer { id, result: result.map_err(|error| error.to_string()) })?;
        Ok(())
    }

    fn obey(&mut self, request: Request, descriptors: Descriptors) -> Result<Reply, Refused> {
        if let Request::Configure(config) = request {
            if self.machine.is_some() {
                return Err(Refused::State("configured already", "start another monitor for another machine"));
            }
            let kvm = self.kvm.as_ref().map_err(|error| Refused::Kvm(error.clone()))?;
            let machine = Machine::build(kvm, &config, descriptors, &self.log)?;
            for device in &machine.bus().devices {
                self.events.add_subscriber(Subscriber::Device(DeviceEvents::new(device.clone())));
            }
            slog::info!(self.log, "machine configured"; "vcpus" => config.vcpus, "memory_mib" => config.memory.size >> 20,
                "devices" => machine.bus().devices.len());
            self.machine = Some(machine);
            return Ok(Reply::Done);
        }
        descriptors.finish()?;
        if matches!(request, Request::Shutdown) {
            self.end.declare(ExitReason::Requested, "the parent asked for it");
            return Ok(Reply::Done);
        }
        let Some(machine) = &mut self.machine else {
            return Err(Refused::State("not configured", "send Configure first"));
        };
        match request {
            Request::Start if machine.is_started() => return Err(Refused::State("started already", "start it once")),
            Request::Start => machine.start(&self.end)?,
            Request::Stats => return Ok(Reply::Stats(machine.stats())),
            Request::Pause | Request::Resume if !machine.is_started() => {
                return Err(Refused::State("not started", "send Start first"));
            }
            Request::Pause if self.paused => return Err(Refused::State("paused already", "send Resume first")),
            Request::Pause => {
                machine.pause();
                self.paused = true;
            }
            Request::Resume if !self.paused => return Err(Refused::State("not paused", "send Pause first")),
            Request::Resume => {
                machine.resume();
                self.paused = false;
            }
            // Handled above.
            Request::Configure(_) | Request::Shutdown => {}
        }
        Ok(Reply::Done)
    }
}

/// What the event loop calls.
enum Subscriber {
    /// Remembers that a descriptor is ready; the main loop does the rest, because it owns what that needs.
    Flag {
        fd: RawFd,
        flag: Rc<Cell<bool>>,
    },
    Device(DeviceEvents),
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Self::Flag { flag, .. } => flag.set(true),
            Self::Device(device) => device.process(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Self::Flag { fd, .. } => {
                // A new epoll and an open descriptor: fails only without memory, and then the first wait does too.
                let _ = ops.add(Events::new_raw(*fd, EventSet::IN));
            }
            Self::Device(device) => device.init(ops),
        }
    }
}

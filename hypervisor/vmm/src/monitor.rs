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
//! control socket alone, so no device does anything; what comes for them meanwhile waits in their descriptors.

use std::{
    cell::Cell,
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use caisson_protos::{
    guest::Slot,
    monitor::{Command, Event, ExitNotice, ExitReason, NetworkConfig, Reply, Request},
};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
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
    virtio::mmio::{DeviceEvents, MmioDevice},
};

/// Events fetched from the kernel at a time.
const BATCH: usize = 32;
/// Turns of the loop after the guest has ended its machine in order, for what it had queued before.
const LAST_TURNS: usize = 8;
/// How long the readers of the guest's output may then take.
const DRAIN: Duration = Duration::from_secs(5);

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

/// A command that cannot be executed; the parent gets it as a sentence.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("the machine is {0}: {1}")]
    State(&'static str, &'static str),
    #[error("only Configure and AttachNetwork take descriptors, {0}")]
    Descriptors(#[from] crate::descriptors::DescriptorError),
    #[error(transparent)]
    Kvm(Arc<KvmError>),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("cannot watch the descriptors of device {0:?}: {1}: raise fs.epoll.max_user_watches")]
    Watch(&'static str, event_manager::Error),
}

const NOT_CONFIGURED: CommandError = CommandError::State("not configured", "send Configure first");

/// One monitor.
pub struct Monitor {
    control: Control,
    kvm: Result<Kvm, Arc<KvmError>>,
    log: Logger,
    end: Arc<End>,
    events: EventManager<Subscriber>,
    control_ready: Rc<Cell<bool>>,
    /// Of the end's event, which stays readable.
    end_watch: SubscriberId,
    machine: Option<Machine>,
    devices: Watched,
    paused: bool,
}

impl Monitor {
    /// A monitor without a machine. If KVM is unusable, the answer to Configure says why.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(control: Control, kvm: Result<Kvm, KvmError>, log: Logger) -> Result<Self, MonitorError> {
        let end = Arc::new(End::new()?);
        let control_ready = Rc::new(Cell::new(false));
        let mut events = EventManager::new_with_capacity(BATCH)?;
        watch(&mut events, Subscriber::flag(control.as_fd().as_raw_fd(), control_ready.clone()))?;
        // Its readiness ends the wait, and that is all.
        let end_watch = watch(&mut events, Subscriber::flag(end.event().as_raw_fd(), Rc::default()))?;
        let kvm = kvm.map_err(Arc::new);
        Ok(Self {
            control,
            kvm,
            log,
            end,
            events,
            control_ready,
            end_watch,
            machine: None,
            devices: Watched::default(),
            paused: false,
        })
    }

    /// Serves until the machine has ended, sends the exit notice to the parent, and returns it. The machine stays in memory, since
    /// vCPUs may still run in it: the process is to exit, which ends them together with it.
    ///
    /// # Errors
    /// See [`MonitorError`]; the exit notice was sent if that was possible.
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
            if let Some(notice) = self.end.notice() {
                return if matches!(notice.reason, ExitReason::PoweredOff | ExitReason::Reset) {
                    self.drain()
                } else {
                    Ok(())
                };
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

    /// The guest has ended its machine in order. What it had queued before is served, and what it wrote into its streams
    /// reaches their readers, who may take a while; a command of the parent ends that.
    fn drain(&mut self) -> Result<(), MonitorError> {
        self.events.remove_subscriber(self.end_watch)?;
        for _ in 0..LAST_TURNS {
            if self.events.run_with_timeout(0)? == 0 {
                break;
            }
        }
        let deadline = Instant::now() + DRAIN;
        while self.machine.as_ref().is_some_and(Machine::has_undelivered) && !self.control_ready.get() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                slog::warn!(self.log, "the guest's last output was not read in time"; "seconds" => DRAIN.as_secs());
                break;
            }
            // Well below i32::MAX; at least one, so that it waits.
            self.events.run_with_timeout(left.as_millis().max(1) as i32)?;
        }
        Ok(())
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
        let result = self.execute(request, descriptors);
        if let Err(error) = &result {
            slog::warn!(self.log, "command refused"; "error" => %error);
        }
        self.control.send(&Event::Answer { id, result: result.map_err(|error| error.to_string()) })?;
        Ok(())
    }

    fn execute(&mut self, request: Request, descriptors: Descriptors) -> Result<Reply, CommandError> {
        if let Request::Configure(config) = request {
            if self.machine.is_some() {
                return Err(CommandError::State("configured already", "start another monitor for another machine"));
            }
            let kvm = self.kvm.as_ref().map_err(|error| CommandError::Kvm(error.clone()))?;
            let machine = Machine::build(kvm, &config, descriptors, &self.log)?;
            self.watch_devices(&machine)?;
            slog::info!(self.log, "machine configured"; "vcpus" => config.vcpus, "memory_mib" => config.memory.size >> 20,
                "slots" => machine.bus().slots.count());
            self.machine = Some(machine);
            return Ok(Reply::Done);
        }
        if let Request::AttachNetwork(config) = request {
            return self.attach_network(&config, descriptors).map(|slot| Reply::Attached { slot });
        }
        descriptors.finish()?;
        if matches!(request, Request::Shutdown) {
            self.end.declare(ExitReason::Requested, "the parent asked for it");
            return Ok(Reply::Done);
        }
        let machine = self.machine.as_mut().ok_or(NOT_CONFIGURED)?;
        match request {
            Request::Start if machine.is_started() => {
                return Err(CommandError::State("started already", "start it once"));
            }
            Request::Start => {
                if let Err(error) = machine.start(&self.end) {
                    // Some of its vCPUs may run, and it is of no use.
                    self.end.declare(ExitReason::MonitorError, error.to_string());
                    return Err(error.into());
                }
            }
            Request::Stats => return Ok(Reply::Stats(machine.stats())),
            Request::Pause | Request::Resume if !machine.is_started() => {
                return Err(CommandError::State("not started", "send Start first"));
            }
            Request::Pause if self.paused => return Err(CommandError::State("paused already", "send Resume first")),
            Request::Pause => {
                machine.pause();
                self.paused = true;
            }
            Request::Resume if !self.paused => return Err(CommandError::State("not paused", "send Pause first")),
            Request::Resume => {
                machine.resume();
                self.paused = false;
            }
            Request::SetLink { slot, up } => machine.set_link(slot, up)?,
            Request::DetachNetwork { slot } => {
                let in_use = machine.detach_network(slot, &self.log)?;
                // The last of it: its tap is closed.
                self.devices.remove(&mut self.events, slot);
                slog::info!(self.log, "network detached"; "slot" => slot.0, "in_use" => in_use);
            }
            // Handled above.
            Request::Configure(_) | Request::AttachNetwork(_) | Request::Shutdown => {}
        }
        Ok(Reply::Done)
    }
}

impl Monitor {
    /// Puts all devices of a machine on the event loop, or none.
    fn watch_devices(&mut self, machine: &Machine) -> Result<(), CommandError> {
        for (slot, device) in machine.bus().slots.devices() {
            if let Err(error) = self.devices.add(&mut self.events, slot, device) {
                self.devices.remove_all(&mut self.events);
                return Err(error);
            }
        }
        Ok(())
    }

    fn attach_network(&mut self, config: &NetworkConfig, descriptors: Descriptors) -> Result<Slot, CommandError> {
        let machine = self.machine.as_mut().ok_or(NOT_CONFIGURED)?;
        let (slot, device) = machine.prepare_network(config, descriptors, &self.log)?;
        // Before the guest can use it.
        self.devices.add(&mut self.events, slot, device.clone())?;
        if let Err(error) = machine.attach_network(slot, device) {
            self.devices.remove(&mut self.events, slot);
            return Err(error.into());
        }
        slog::info!(self.log, "network attached"; "slot" => slot.0, "queues" => config.taps.len(), "mtu" => config.mtu);
        Ok(slot)
    }
}

/// The devices on the event loop, by their slots.
#[derive(Default)]
struct Watched(BTreeMap<Slot, SubscriberId>);

impl Watched {
    fn add(
        &mut self,
        events: &mut EventManager<Subscriber>,
        slot: Slot,
        device: Arc<MmioDevice>,
    ) -> Result<(), CommandError> {
        let name = device.name();
        let id = watch(events, Subscriber::Device(DeviceEvents::new(device)));
        self.0.insert(slot, id.map_err(|error| CommandError::Watch(name, error))?);
        Ok(())
    }

    /// Nothing of the device is called any more.
    fn remove(&mut self, events: &mut EventManager<Subscriber>, slot: Slot) {
        if let Some(id) = self.0.remove(&slot) {
            // It was added.
            let _ = events.remove_subscriber(id);
        }
    }

    fn remove_all(&mut self, events: &mut EventManager<Subscriber>) {
        while let Some((slot, _)) = self.0.first_key_value() {
            self.remove(events, *slot);
        }
    }
}

/// Puts something on the event loop, for which all of its descriptors must be watched.
fn watch(events: &mut EventManager<Subscriber>, subscriber: Subscriber) -> Result<SubscriberId, event_manager::Error> {
    let id = events.add_subscriber(subscriber);
    match events.subscriber_mut(id)?.take_failure() {
        None => Ok(id),
        Some(error) => {
            events.remove_subscriber(id)?;
            Err(error)
        }
    }
}

/// What the event loop calls.
enum Subscriber {
    /// Remembers that a descriptor is ready; the main loop does the rest, because it owns what that needs.
    Flag {
        fd: RawFd,
        flag: Rc<Cell<bool>>,
        failure: Option<event_manager::Error>,
    },
    Device(DeviceEvents),
}

impl Subscriber {
    fn flag(fd: RawFd, flag: Rc<Cell<bool>>) -> Self {
        Self::Flag { fd, flag, failure: None }
    }

    /// Why it is not watched, if so.
    fn take_failure(&mut self) -> Option<event_manager::Error> {
        match self {
            Self::Flag { failure, .. } => failure.take(),
            Self::Device(device) => device.take_failure(),
        }
    }
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
            Self::Flag { fd, failure, .. } => *failure = ops.add(Events::new_raw(*fd, EventSet::IN)).err(),
            Self::Device(device) => device.init(ops),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_watched_is_not_on_the_loop() {
        let event = rustix::event::eventfd(1, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let mut events = EventManager::<Subscriber>::new().unwrap();
        let (first, second) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
        watch(&mut events, Subscriber::flag(event.as_raw_fd(), first.clone())).unwrap();
        assert!(watch(&mut events, Subscriber::flag(-1, second.clone())).is_err());
        assert_eq!(events.run_with_timeout(0).unwrap(), 1);
        assert!(first.get() && !second.get());
    }
}

//! Calls to a monitor and what comes back. Commands may be sent one behind the other without waiting; the monitor
//! answers in order and each answer finds its caller by the command's id. [`Driver::run`] is the only reader of the
//! socket: run it as a task of its own; it ends when the machine does and says how.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_protos::{
    guest::Slot,
    monitor::{CodecError, Command, Event, ExitNotice, Reply, Request, decode, encode},
};
use tokio::sync::oneshot;

use crate::{
    machine::{Machine, Network, TooManyDescriptors},
    packet::{self, PacketSocket},
};

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The monitor refuses; its sentence for the operator.
    #[error("{0}")]
    Refused(String),
    /// The monitor ended before it answered; its log or exit notice says why.
    #[error("caisson-vmm ended before it answered")]
    Ended,
    /// The command could not be sent.
    #[error("cannot send to caisson-vmm: {0}")]
    Send(#[source] io::Error),
    /// An answer to another question.
    #[error("caisson-vmm answers {0:?} to {1}: install the parts of one Caisson release together")]
    Unexpected(Reply, &'static str),
    /// The command cannot be written down.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The machine has too many parts.
    #[error(transparent)]
    TooManyDescriptors(#[from] TooManyDescriptors),
}

/// How the monitor's side of the conversation ended.
#[derive(Debug)]
pub enum Ended {
    /// It said why.
    Notice(ExitNotice),
    /// It closed its end without a notice: it was killed or it failed very early.
    Closed,
    /// It broke the protocol; end its process.
    Broken(String),
}

#[derive(Debug, Default)]
struct Pending {
    next_id: u32,
    /// None once the conversation has ended: nothing will be answered any more.
    callers: Option<HashMap<u32, oneshot::Sender<Result<Reply, String>>>>,
}

/// Sends commands. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    socket: Arc<PacketSocket>,
    pending: Arc<Mutex<Pending>>,
}

/// Receives everything that the monitor sends.
#[derive(Debug)]
pub struct Driver(Control);

/// A command that was not sent: dropped, nobody expects its answer any more.
struct Unsent<'a> {
    control: &'a Control,
    id: u32,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        if let Some(callers) = &mut self.control.pending().callers {
            callers.remove(&self.id);
        }
    }
}

/// An answer that is still to come.
#[derive(Debug)]
pub struct Answer(oneshot::Receiver<Result<Reply, String>>);

impl Answer {
    /// Waits for it. The driver must run.
    ///
    /// # Errors
    /// [`CallError::Refused`] or [`CallError::Ended`].
    pub async fn wait(self) -> Result<Reply, CallError> {
        self.0.await.map_err(|_| CallError::Ended)?.map_err(CallError::Refused)
    }
}

/// The two packets that make a machine and run it, sent before a runtime exists.
///
/// # Errors
/// If the machine cannot be written down or the packets cannot be sent.
pub fn configure_and_start(socket: &OwnedFd, machine: Machine) -> Result<(), CallError> {
    let (config, descriptors) = machine.into_packet()?;
    let configure = encode(&Command { id: CONFIGURE, request: Request::Configure(Box::new(config)) })?;
    let start = encode(&Command { id: START, request: Request::Start })?;
    packet::send(socket, &configure, &descriptors).map_err(CallError::Send)?;
    packet::send(socket, &start, &[]).map_err(CallError::Send)
}

const CONFIGURE: u32 = 1;
const START: u32 = 2;
const FIRST_FREE: u32 = 3;

/// Takes over a socket on which [`configure_and_start`] was called: the control, its driver, and the two answers.
///
/// # Errors
/// The error of epoll.
pub fn attach(socket: OwnedFd) -> io::Result<(Control, Driver, Answer, Answer)> {
    let (control, driver) = Control::new(socket)?;
    let (configured, started) = (control.expect(CONFIGURE), control.expect(START));
    Ok((control, driver, configured, started))
}

impl Control {
    /// A conversation on `socket`, and the driver that must run for it.
    ///
    /// # Errors
    /// The error of epoll.
    pub fn new(socket: OwnedFd) -> io::Result<(Self, Driver)> {
        let pending = Pending { next_id: FIRST_FREE, callers: Some(HashMap::new()) };
        let control = Self { socket: Arc::new(PacketSocket::new(socket)?), pending: Arc::new(Mutex::new(pending)) };
        Ok((control.clone(), Driver(control)))
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, id: u32) -> Answer {
        let (sender, receiver) = oneshot::channel();
        if let Some(callers) = &mut self.pending().callers {
            callers.insert(id, sender);
        }
        Answer(receiver)
    }

    /// Sends one command, with descriptors if its request mentions any, and gives the answer to wait for. Dropped before it
    /// is ready, it has sent nothing.
    ///
    /// # Errors
    /// If it cannot be sent.
    pub async fn send(&self, request: Request, descriptors: &[OwnedFd]) -> Result<Answer, CallError> {
        let id = {
            let mut pending = self.pending();
            let id = pending.next_id;
            pending.next_id = id.wrapping_add(1).max(FIRST_FREE);
            id
        };
        let packet = encode(&Command { id, request })?;
        let answer = self.expect(id);
        let unsent = Unsent { control: self, id };
        self.socket.send(&packet, descriptors).await.map_err(CallError::Send)?;
        std::mem::forget(unsent);
        Ok(answer)
    }

    /// Puts a network device into an empty slot of the machine, and gives the slot, whose driver is then to be bound in the guest.
    ///
    /// # Errors
    /// See [`CallError`]; refused if the machine has no empty slot.
    pub async fn attach_network(&self, network: Network) -> Result<Slot, CallError> {
        let (config, descriptors) = network.into_packet()?;
        match self.send(Request::AttachNetwork(Box::new(config)), &descriptors).await?.wait().await? {
            Reply::Attached { slot } => Ok(slot),
            reply => Err(CallError::Unexpected(reply, "AttachNetwork")),
        }
    }

    /// Takes a network device out of its slot, whose driver should have been unbound in the guest before.
    ///
    /// # Errors
    /// See [`CallError`]; refused if there is none.
    pub async fn detach_network(&self, slot: Slot) -> Result<(), CallError> {
        self.call(Request::DetachNetwork { slot }).await.map(drop)
    }

    /// Reports to the guest whether a network device has a link.
    ///
    /// # Errors
    /// See [`CallError`]; refused if there is no network device in the slot.
    pub async fn set_link(&self, slot: Slot, up: bool) -> Result<(), CallError> {
        self.call(Request::SetLink { slot, up }).await.map(drop)
    }

    /// Sends one command without descriptors and waits for its answer.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, request: Request) -> Result<Reply, CallError> {
        self.send(request, &[]).await?.wait().await
    }
}

impl Driver {
    /// Gives answers to their callers until the monitor ends.
    pub async fn run(self) -> Ended {
        let ended = self.read().await;
        self.0.pending().callers = None;
        ended
    }

    async fn read(&self) -> Ended {
        let mut buffer = Vec::new();
        loop {
            let event = match self.0.socket.receive(&mut buffer).await {
                Ok(Some((bytes, _))) => decode::<Event>(bytes).map_err(|error| error.to_string()),
                Ok(None) => return Ended::Closed,
                Err(error) => Err(error.to_string()),
            };
            match event {
                Ok(Event::Answer { id, result }) => {
                    let caller = self.0.pending().callers.as_mut().and_then(|callers| callers.remove(&id));
                    match caller {
                        // A caller that went away does not want its answer.
                        Some(caller) => drop(caller.send(result)),
                        None => return Ended::Broken(format!("answer to command {id}, which was never sent")),
                    }
                }
                Ok(Event::Exited(notice)) => return Ended::Notice(notice),
                Err(error) => return Ended::Broken(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use caisson_protos::monitor::{ExitReason, MachineStats};
    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn say(socket: &OwnedFd, event: &Event) {
        packet::send(socket, &encode(event).unwrap(), &[]).unwrap();
    }

    async fn hear(socket: &PacketSocket) -> Command {
        let mut buffer = Vec::new();
        let (bytes, _) = socket.receive(&mut buffer).await.unwrap().expect("a command");
        decode(bytes).unwrap()
    }

    #[tokio::test]
    async fn answers_find_their_callers_and_the_notice_ends_the_conversation() {
        let (ours, theirs) = packet::pair().unwrap();
        let (control, driver) = Control::new(ours).unwrap();
        let driver = tokio::spawn(driver.run());
        let monitor = PacketSocket::new(theirs.try_clone().unwrap()).unwrap();
        let stats = control.send(Request::Stats, &[]).await.unwrap();
        let pause = control.send(Request::Pause, &[]).await.unwrap();
        let (first, second) = (hear(&monitor).await, hear(&monitor).await);
        assert_eq!((first.request, second.request), (Request::Stats, Request::Pause));
        say(&theirs, &Event::Answer { id: second.id, result: Err("not configured".into()) });
        say(&theirs, &Event::Answer { id: first.id, result: Ok(Reply::Stats(MachineStats::default())) });
        let notice = ExitNotice { reason: ExitReason::TripleFault, detail: "vCPU 0".into() };
        say(&theirs, &Event::Exited(notice.clone()));
        assert!(matches!(timeout(LIMIT, stats.wait()).await.unwrap(), Ok(Reply::Stats(_))));
        assert!(
            matches!(timeout(LIMIT, pause.wait()).await.unwrap(), Err(CallError::Refused(why)) if why == "not configured")
        );
        assert!(matches!(timeout(LIMIT, driver).await.unwrap().unwrap(), Ended::Notice(it) if it == notice));
        let late = control.send(Request::Stats, &[]).await.unwrap();
        assert!(matches!(timeout(LIMIT, late.wait()).await.unwrap(), Err(CallError::Ended)));
    }

    #[tokio::test]
    async fn a_monitor_that_dies_fails_the_waiting_calls() {
        let (ours, theirs) = packet::pair().unwrap();
        let (control, driver) = Control::new(ours).unwrap();
        let driver = tokio::spawn(driver.run());
        let answer = control.send(Request::Stats, &[]).await.unwrap();
        drop(theirs);
        assert!(matches!(timeout(LIMIT, answer.wait()).await.unwrap(), Err(CallError::Ended)));
        assert!(matches!(timeout(LIMIT, driver).await.unwrap().unwrap(), Ended::Closed));
    }

    #[tokio::test]
    async fn nobody_waits_for_the_answer_to_a_command_that_was_not_sent() {
        let (ours, theirs) = packet::pair().unwrap();
        let (control, driver) = Control::new(ours).unwrap();
        let expected = || control.pending().callers.as_ref().unwrap().len();
        // The monitor reads nothing, so one of them finds no room; then its caller gives up.
        while let Ok(sent) = timeout(Duration::from_millis(50), control.send(Request::Stats, &[])).await {
            drop(sent.unwrap());
            assert!(expected() < 100_000, "the socket never fills");
        }
        let sent = expected();
        let monitor = PacketSocket::new(theirs.try_clone().unwrap()).unwrap();
        for n in 0..sent {
            assert_eq!(hear(&monitor).await.id as usize, FIRST_FREE as usize + n, "each was sent");
        }
        drop((monitor, theirs));
        assert!(matches!(control.send(Request::Stats, &[]).await, Err(CallError::Send(_))));
        assert_eq!(expected(), sent);
        assert!(matches!(timeout(LIMIT, driver.run()).await.unwrap(), Ended::Closed));
    }

    #[tokio::test]
    async fn garbage_and_unasked_answers_break_the_conversation() {
        for bytes in [vec![1, 0xff, 0xff], encode(&Event::Answer { id: 99, result: Ok(Reply::Done) }).unwrap()] {
            let (ours, theirs) = packet::pair().unwrap();
            let (_control, driver) = Control::new(ours).unwrap();
            packet::send(&theirs, &bytes, &[]).unwrap();
            assert!(matches!(timeout(LIMIT, driver.run()).await.unwrap(), Ended::Broken(_)));
        }
    }
}

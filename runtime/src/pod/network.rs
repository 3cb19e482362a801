//! The pod's network from its first message to the guest to its end.
//!
//! ```text
//!   Joined ── before the first container: ConfigureNetwork ──► Followed ── the machine's end ──► Ended
//!   the taps are there, the machine has its cards              each change goes to the guest      the namespace is as it was
//! ```

use std::{collections::BTreeMap, sync::Arc};

use caisson_protos::{
    agent::{BindDevicesRequest, ConfigureNetworkRequest, NetworkInterface},
    guest::Slot,
};
use caisson_vmm_client::{CallError, Network};
use slog::error;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use super::{Pod, no_deadline};
use crate::{
    host::namespaces::on_own_thread,
    network::{Change, Namespace, Policy, Watch},
    shim::errors::TaskError,
    vm::{launch::device, supervisor::Machine},
};

/// Where the machine has each network card, by its hardware address.
pub type CardSlots = BTreeMap<[u8; 6], Slot>;

/// A network namespace whose interfaces are joined.
#[derive(Debug)]
pub struct Joined {
    /// The namespace.
    pub namespace: Namespace,
    /// What the guest is to know of it.
    pub message: ConfigureNetworkRequest,
    /// What changes in it.
    pub watch: Watch,
    /// What its cards may send and receive.
    pub policy: Policy,
}

/// See the module.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Namespace,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Joined {
        message: ConfigureNetworkRequest,
        follower: Box<Follower>,
    },
    Followed {
        task: JoinHandle<()>,
        /// For whoever waits until the guest knows what has changed up to now.
        waiting: mpsc::Sender<oneshot::Sender<()>>,
    },
    Ended,
}

/// What is needed to follow the namespace.
#[derive(Debug)]
struct Follower {
    watch: Watch,
    policy: Policy,
    slots: CardSlots,
    /// Cards that the machine could not have: hardware address and name.
    missing: BTreeMap<[u8; 6], String>,
}

impl PodNetwork {
    /// The machine has the network's cards in `slots`.
    pub fn new(joined: Joined, slots: CardSlots) -> Self {
        let Joined { namespace, message, watch, policy } = joined;
        let follower = Box::new(Follower { watch, policy, slots, missing: BTreeMap::new() });
        Self { namespace, state: Mutex::new(State::Joined { message, follower }) }
    }

    /// The network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

impl Pod {
    /// Tells the guest its network, once; from then on every change of it.
    ///
    /// # Errors
    /// What the guest cannot have, or why the message did not reach it.
    pub(super) async fn configure_network(self: &Arc<Self>, machine: &Arc<Machine>) -> Result<(), TaskError> {
        let Some(network) = &self.network else { return Ok(()) };
        let mut state = network.state.lock().await;
        let State::Joined { message, follower } = &mut *state else { return Ok(()) };
        // What hooks have put there, and who else was quick.
        match follower.watch.now().await {
            Ok(Some(change)) => {
                *message = change.message.clone();
                self.change_network(machine, follower, change).await?;
            }
            Ok(None) if is_every_guests(message) => {}
            Ok(None) => self.tell(machine, message).await?,
            Err(error) => return Err(TaskError::failed_precondition(error.to_string())),
        }
        if let State::Joined { follower, .. } = std::mem::replace(&mut *state, State::Ended) {
            let (waiting, asked) = mpsc::channel(1);
            let followed = Arc::clone(self).follow_network(*follower, Arc::clone(machine), asked);
            *state = State::Followed { task: tokio::spawn(followed), waiting };
        }
        Ok(())
    }

    /// Waits until the guest knows what has changed up to now: what was done to the namespace between Create and Start is there
    /// when the program begins, as with `ctr run --cni`.
    pub(super) async fn settle_network(&self) {
        let Some(network) = &self.network else { return };
        let waiting = match &*network.state.lock().await {
            State::Followed { waiting, .. } => waiting.clone(),
            State::Joined { .. } | State::Ended => return,
        };
        let (ask, answer) = oneshot::channel();
        // If the machine ends nobody answers; what failed was logged.
        if waiting.send(ask).await.is_ok() && timeout(self.limits.call, answer).await.is_err() {
            error!(self.log, "the guest does not take the changes of its network"; "limit" => ?self.limits.call);
        }
    }

    /// Tells the guest what changes, until the machine ends. Then the namespace is as it was.
    async fn follow_network(
        self: Arc<Self>,
        mut follower: Follower,
        machine: Arc<Machine>,
        mut asked: mpsc::Receiver<oneshot::Sender<()>>,
    ) {
        loop {
            let (change, ask) = tokio::select! {
                biased;
                _ = self.machine.lost() => break,
                Some(ask) = asked.recv() => (follower.watch.now().await, Some(ask)),
                change = follower.watch.changed() => (change.map(Some), None),
            };
            let done = match change {
                Ok(Some(change)) => {
                    let changed = self.change_network(&machine, &mut follower, change).await;
                    changed.map_err(|error| error.to_string())
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
            if let Some(ask) = ask {
                let _ = ask.send(());
            }
            if let Err(error) = done
                && !self.machine.is_lost()
            {
                error!(self.log, "the guest's network is not as its network namespace has it"; "error" => error);
            }
        }
        self.end_watch(follower.watch).await;
    }

    async fn tell(&self, machine: &Machine, message: &ConfigureNetworkRequest) -> Result<(), TaskError> {
        let configured = machine.agent.configure_network(no_deadline(), message);
        self.agent_call("ConfigureNetwork", configured).await.map(drop).map_err(|error| error.context("network"))
    }

    /// Removes cards from the machine, adds others, and sends the guest the message. All of it is done whatever fails; the error is the first one.
    async fn change_network(
        &self,
        machine: &Machine,
        follower: &mut Follower,
        change: Change,
    ) -> Result<(), TaskError> {
        let Change { appeared, gone, mut message } = change;
        let mut done = Ok(());
        // First: one that comes may have the name or the address of one that has gone, and needs a slot.
        for mac in gone {
            done = done.and(self.detach_card(machine, follower, mac).await);
        }
        for card in appeared {
            let (name, mac) = (card.name.clone(), card.mac);
            let interface = message.interfaces.iter().find(|interface| interface.mac == mac);
            match self.attach_card(machine, device(card, &follower.policy, interface)).await {
                Ok(slot) => drop(follower.slots.insert(mac, slot)),
                Err(error) => {
                    error!(self.log, "the machine cannot have a network card"; "interface" => &name, "error" => %error);
                    follower.missing.insert(mac, name);
                }
            }
        }
        done = done.and(self.set_sources(machine, follower, &message).await);
        for (mac, name) in &follower.missing {
            let renamed = message.interfaces.iter().find(|interface| interface.mac == *mac);
            let name = renamed.map_or_else(|| name.clone(), |interface| interface.name.clone());
            leave_out(&mut message, &name, *mac);
        }
        done.and(self.tell(machine, &message).await)
    }

    /// Gives the running machine a card.
    async fn attach_card(&self, machine: &Machine, card: Network) -> Result<Slot, TaskError> {
        let slot = self.command("AttachNetwork", machine.control.attach_network(card)).await?;
        let bind = BindDevicesRequest { bind: vec![slot.0.into()], ..BindDevicesRequest::default() };
        let bound = self.agent_call("BindDevices", machine.agent.bind_devices(no_deadline(), &bind)).await;
        if let Err(error) = bound {
            // For the next one.
            let _ = self.command("DetachNetwork", machine.control.detach_network(slot)).await;
            return Err(error);
        }
        Ok(slot)
    }

    /// Tells the monitor from which addresses the guest may send, where that is of interest.
    async fn set_sources(
        &self,
        machine: &Machine,
        follower: &Follower,
        message: &ConfigureNetworkRequest,
    ) -> Result<(), TaskError> {
        for interface in &message.interfaces {
            let mac = <[u8; 6]>::try_from(interface.mac.as_slice()).ok();
            let slot = mac.and_then(|mac| follower.slots.get(&mac).copied());
            if let (Some(slot), Some(sources)) = (slot, follower.policy.sources(Some(interface))) {
                self.command("SetSources", machine.control.set_sources(slot, sources)).await?;
            }
        }
        Ok(())
    }

    /// Takes a card from the running machine. The guest does not use it any more.
    async fn detach_card(&self, machine: &Machine, follower: &mut Follower, mac: [u8; 6]) -> Result<(), TaskError> {
        follower.missing.remove(&mac);
        let Some(slot) = follower.slots.remove(&mac) else { return Ok(()) };
        let unbind = BindDevicesRequest { unbind: vec![slot.0.into()], ..BindDevicesRequest::default() };
        let unbound = self.agent_call("BindDevices", machine.agent.bind_devices(no_deadline(), &unbind)).await;
        // Whether the guest lets go of it or not: its tap is gone.
        self.command("DetachNetwork", machine.control.detach_network(slot)).await?;
        unbound.map(drop)
    }

    /// The monitor's answer.
    async fn command<T>(
        &self,
        name: &'static str,
        answer: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, TaskError> {
        match timeout(self.limits.call, answer).await {
            Ok(answer) => answer.map_err(|error| TaskError::failed_precondition(error.to_string())),
            Err(_) => Err(TaskError::unavailable(format!("caisson-vmm does not answer {name}"))),
        }
    }

    /// Lets the network go, which the machine does not use any more.
    pub(super) async fn end_network(&self) {
        let Some(network) = &self.network else { return };
        match std::mem::replace(&mut *network.state.lock().await, State::Ended) {
            State::Joined { follower, .. } => self.end_watch(follower.watch).await,
            State::Followed { task, .. } => drop(task.await),
            State::Ended => {}
        }
    }

    async fn end_watch(&self, watch: Watch) {
        if let Err(error) = on_own_thread("network", move || drop(watch)).await {
            error!(self.log, "cannot start a thread to leave the network namespace"; "error" => %error);
        }
    }
}

/// What Linux gives the loopback interface.
const LOOPBACK_MTU: u32 = 65536;

/// Whether a guest has all of this from its start: a loopback interface with its usual addresses.
fn is_every_guests(message: &ConfigureNetworkRequest) -> bool {
    let usual = |interface: &NetworkInterface| {
        let ips = interface.addresses.iter().map(|address| address.ip.as_slice());
        let usual_size = interface.mtu == LOOPBACK_MTU;
        interface.mac.is_empty() && usual_size && interface.neighbours.is_empty() && ips.into_iter().all(is_loopback)
    };
    message.routes.is_empty() && message.interfaces.iter().all(usual)
}

fn is_loopback(ip: &[u8]) -> bool {
    ip == [127, 0, 0, 1] || ip == std::net::Ipv6Addr::LOCALHOST.octets()
}

/// Takes an interface out of a message, and the routes over it.
fn leave_out(message: &mut ConfigureNetworkRequest, name: &str, mac: [u8; 6]) {
    message.interfaces.retain(|interface| interface.mac != mac);
    message.routes.retain(|route| route.hops.iter().all(|hop| hop.interface != name));
}

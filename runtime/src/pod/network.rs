//! The pod's network from its first message to the guest to its end.
//!
//! ```text
//!   Joined ── before the first container: ConfigureNetwork ──► Followed ── the machine's end ──► Ended
//!   the taps are there, the machine has its cards              each change goes to the guest      the namespace is as it was
//! ```

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex as SyncMutex},
};

use caisson_protos::{
    agent::{BindDevicesRequest, ConfigureNetworkRequest, NetworkInterface},
    guest::Slot,
};
use caisson_vmm_client::CallError;
use slog::error;
use tokio::{sync::Mutex, task::JoinHandle};

use super::{Pod, lock, no_deadline};
use crate::{
    host::namespaces::on_own_thread,
    network::{Card, Change, Namespace, Policy, Watch},
    shim::errors::TaskError,
    vm::{launch::device, supervisor::Machine},
};

/// See the module.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Namespace,
    policy: Policy,
    state: Mutex<State>,
    /// Where the machine has the cards with these hardware addresses.
    slots: SyncMutex<BTreeMap<[u8; 6], Slot>>,
}

#[derive(Debug)]
enum State {
    Joined { message: ConfigureNetworkRequest, watch: Box<Watch> },
    Followed(JoinHandle<()>),
    Ended,
}

impl PodNetwork {
    /// A network namespace whose interfaces are joined, and what the guest is to know of it.
    pub fn new(namespace: Namespace, policy: Policy, message: ConfigureNetworkRequest, watch: Watch) -> Self {
        let state = Mutex::new(State::Joined { message, watch: Box::new(watch) });
        Self { namespace, policy, state, slots: SyncMutex::default() }
    }

    /// The machine has a card with this hardware address.
    pub fn has_card(&self, mac: [u8; 6], slot: Slot) {
        lock(&self.slots).insert(mac, slot);
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
    /// What the guest cannot have, or why it was not told.
    pub(super) async fn configure_network(self: &Arc<Self>, machine: &Arc<Machine>) -> Result<(), TaskError> {
        let Some(network) = &self.network else { return Ok(()) };
        let mut state = network.state.lock().await;
        let State::Joined { message, watch } = &mut *state else { return Ok(()) };
        // What hooks have put there, and who else was quick.
        match watch.now().await {
            Ok(Some(change)) => *message = self.attach(machine, change.appeared, change.message).await,
            Ok(None) => {}
            Err(error) => return Err(TaskError::failed_precondition(error.to_string())),
        }
        if !is_every_guests(message) {
            let configure = machine.agent.configure_network(no_deadline(), message);
            self.agent_call("ConfigureNetwork", configure).await.map_err(|error| error.context("network"))?;
        }
        if let State::Joined { watch, .. } = std::mem::replace(&mut *state, State::Ended) {
            let followed = Arc::clone(self).follow_network(*watch, Arc::clone(machine));
            *state = State::Followed(tokio::spawn(followed));
        }
        Ok(())
    }

    /// Tells the guest what changes, until the machine ends. Then the namespace is as it was.
    async fn follow_network(self: Arc<Self>, mut watch: Watch, machine: Arc<Machine>) {
        loop {
            let change = tokio::select! {
                biased;
                _ = self.machine.lost() => break,
                change = watch.changed() => change,
            };
            let done = match change {
                Ok(change) => self.change_network(&machine, change).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = done
                && !self.machine.is_lost()
            {
                error!(self.log, "the guest's network is not as its network namespace has it"; "error" => error);
            }
        }
        self.end_watch(watch).await;
    }

    async fn change_network(&self, machine: &Machine, change: Change) -> Result<(), TaskError> {
        self.set_sources(machine, &change.message).await?;
        let message = self.attach(machine, change.appeared, change.message).await;
        let configure = machine.agent.configure_network(no_deadline(), &message);
        self.agent_call("ConfigureNetwork", configure).await?;
        for mac in change.gone {
            self.detach_card(machine, mac).await?;
        }
        Ok(())
    }

    /// Adds cards to the machine; the message without those that it cannot have.
    async fn attach(
        &self,
        machine: &Machine,
        cards: Vec<Card>,
        mut message: ConfigureNetworkRequest,
    ) -> ConfigureNetworkRequest {
        for card in cards {
            let (name, mac) = (card.name.clone(), card.mac);
            let interface = message.interfaces.iter().find(|interface| interface.mac == mac);
            if let Err(error) = self.attach_card(machine, card, interface).await {
                error!(self.log, "the machine cannot have a network card"; "interface" => &name, "error" => %error);
                leave_out(&mut message, &name, mac);
            }
        }
        message
    }

    /// Gives the running machine a card, and waits until the guest has it.
    async fn attach_card(
        &self,
        machine: &Machine,
        card: Card,
        interface: Option<&NetworkInterface>,
    ) -> Result<(), TaskError> {
        let Some(network) = &self.network else { return Ok(()) };
        let mac = card.mac;
        let monitor = machine.monitor().map_err(from_monitor)?;
        let slot = monitor.attach_network(device(card, &network.policy, interface)).await.map_err(from_monitor)?;
        network.has_card(mac, slot);
        let bind = BindDevicesRequest { bind: vec![slot.0.into()], ..BindDevicesRequest::default() };
        let bound = self.agent_call("BindDevices", machine.agent.bind_devices(no_deadline(), &bind)).await;
        if bound.is_err() {
            self.detach_card(machine, mac).await?;
        }
        bound.map(drop)
    }

    /// The addresses from which the cards of the machine may send, where that is of interest.
    async fn set_sources(&self, machine: &Machine, message: &ConfigureNetworkRequest) -> Result<(), TaskError> {
        let Some(network) = &self.network else { return Ok(()) };
        for interface in &message.interfaces {
            let slot = <[u8; 6]>::try_from(interface.mac.as_slice()).ok();
            let slot = slot.and_then(|mac| lock(&network.slots).get(&mac).copied());
            if let (Some(slot), Some(sources)) = (slot, network.policy.sources(Some(interface))) {
                machine.monitor().map_err(from_monitor)?.set_sources(slot, sources).await.map_err(from_monitor)?;
            }
        }
        Ok(())
    }

    /// Takes a card from the running machine, whose guest has lost its addresses.
    async fn detach_card(&self, machine: &Machine, mac: [u8; 6]) -> Result<(), TaskError> {
        let slot = self.network.as_ref().and_then(|network| lock(&network.slots).remove(&mac));
        let Some(slot) = slot else { return Ok(()) };
        let unbind = BindDevicesRequest { unbind: vec![slot.0.into()], ..BindDevicesRequest::default() };
        let unbound = self.agent_call("BindDevices", machine.agent.bind_devices(no_deadline(), &unbind)).await;
        // The card goes even if the guest wants to keep it.
        machine.monitor().map_err(from_monitor)?.detach_network(slot).await.map_err(from_monitor)?;
        unbound.map(drop)
    }

    /// Lets the network go, which the machine does not use any more.
    pub(super) async fn end_network(&self) {
        let Some(network) = &self.network else { return };
        match std::mem::replace(&mut *network.state.lock().await, State::Ended) {
            State::Joined { watch, .. } => self.end_watch(*watch).await,
            State::Followed(followed) => drop(followed.await),
            State::Ended => {}
        }
    }

    async fn end_watch(&self, watch: Watch) {
        if let Err(error) = on_own_thread("network", move || drop(watch)).await {
            error!(self.log, "cannot start a thread to leave the network namespace"; "error" => %error);
        }
    }
}

fn from_monitor(error: CallError) -> TaskError {
    TaskError::failed_precondition(error.to_string())
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

//! The pod's network from its first message to the guest to its end.
//!
//! ```text
//!   Joined ── before the first container: ConfigureNetwork ──► Followed ── the machine's end ──► Ended
//!   the taps are there, the machine has its cards              each change goes to the guest      the namespace is as it was
//! ```

use std::sync::Arc;

use caisson_protos::agent::{ConfigureNetworkRequest, NetworkInterface};
use slog::error;
use tokio::{sync::Mutex, task::JoinHandle};

use super::{Pod, no_deadline};
use crate::{
    host::namespaces::on_own_thread,
    network::{Card, Change, Namespace, Watch},
    shim::errors::TaskError,
    vm::supervisor::Machine,
};

/// See the module.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Namespace,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Joined { message: ConfigureNetworkRequest, watch: Box<Watch> },
    Followed(JoinHandle<()>),
    Ended,
}

impl PodNetwork {
    /// A network namespace whose interfaces are joined, and what the guest is to know of it.
    pub fn new(namespace: Namespace, message: ConfigureNetworkRequest, watch: Watch) -> Self {
        Self { namespace, state: Mutex::new(State::Joined { message, watch: Box::new(watch) }) }
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
        let message = self.attach(machine, change.appeared, change.message).await;
        let configure = machine.agent.configure_network(no_deadline(), &message);
        self.agent_call("ConfigureNetwork", configure).await?;
        for mac in change.gone {
            self.detach_card(mac)?;
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
            if let Err(error) = self.attach_card(machine, card).await {
                error!(self.log, "the machine cannot have a network card"; "interface" => &name, "error" => %error);
                leave_out(&mut message, &name, mac);
            }
        }
        message
    }

    /// Gives the running machine a card.
    async fn attach_card(&self, _machine: &Machine, _card: Card) -> Result<(), TaskError> {
        Err(TaskError::unimplemented("a network interface that comes after the machine's start"))
    }

    /// Takes a card from the running machine. The guest does not use it any more.
    fn detach_card(&self, _mac: [u8; 6]) -> Result<(), TaskError> {
        Ok(())
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

//! The monitor's end of the control socket, played: network devices come and go, and the descriptors of those that are there stay open.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use caisson_protos::{
    guest::Slot,
    monitor::{Command, Event, Reply, Request, decode, encode},
};
use caisson_vmm_client::{Control, packet};

/// A card that is there: its address and the queues of its tap.
pub type Card = ([u8; 6], Vec<OwnedFd>);

/// Its network devices by their slots, of which it has two.
#[derive(Default)]
pub struct Monitor {
    /// See the type.
    pub cards: Mutex<BTreeMap<Slot, Card>>,
}

/// The first of its network slots.
pub const FIRST: u8 = 4;

/// A monitor, and what the shim has of it.
pub fn serve() -> (Arc<Monitor>, Control) {
    let (ours, theirs) = packet::pair().unwrap();
    let (control, driver) = Control::new(ours).unwrap();
    tokio::spawn(driver.run());
    let monitor = Arc::new(Monitor::default());
    let socket = packet::PacketSocket::new(theirs).unwrap();
    tokio::spawn({
        let monitor = Arc::clone(&monitor);
        async move {
            let mut buffer = Vec::new();
            while let Ok(Some((bytes, descriptors))) = socket.receive(&mut buffer).await {
                let Command { id, request } = decode(bytes).unwrap();
                let answer = Event::Answer { id, result: monitor.answer(request, descriptors) };
                socket.send(&encode(&answer).unwrap(), &[]).await.unwrap();
            }
        }
    });
    (monitor, control)
}

impl Monitor {
    fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Reply, String> {
        let mut cards = self.cards.lock().unwrap();
        match request {
            Request::AttachNetwork(config) => {
                let mut slots = (FIRST..FIRST + 2).map(Slot);
                let slot = slots.find(|slot| !cards.contains_key(slot)).ok_or("all network slots are in use")?;
                cards.insert(slot, (config.mac, descriptors));
                Ok(Reply::Attached { slot })
            }
            Request::DetachNetwork { slot } => cards.remove(&slot).map(|_| Reply::Done).ok_or("it is empty".into()),
            other => panic!("{other:?}"),
        }
    }
}

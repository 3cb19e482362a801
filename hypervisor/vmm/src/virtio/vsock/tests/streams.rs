//! The table of streams against a model of it.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use crate::virtio::vsock::{
    packet::{Header, Op},
    streams::{FIRST_HOST_PORT, Ports, StreamId, Streams},
};

#[derive(Clone, Debug)]
enum Step {
    FromHost(u32),
    FromGuest(Ports),
    Remove(usize),
    Forget(usize),
    Enqueue(usize),
    Turn,
    Refuse,
}

fn step() -> impl Strategy<Value = Step> {
    let ports = (prop_oneof![0..3u32, FIRST_HOST_PORT..FIRST_HOST_PORT + 20], 0..3u32);
    prop_oneof![
        (0..3u32).prop_map(Step::FromHost),
        ports.prop_map(|(host, guest)| Step::FromGuest(Ports { host, guest })),
        (0..20usize).prop_map(Step::Remove),
        (0..20usize).prop_map(Step::Forget),
        (0..20usize).prop_map(Step::Enqueue),
        Just(Step::Turn),
        Just(Step::Refuse),
    ]
}

#[test]
fn turns_go_round() {
    let mut streams = Streams::new(8, 8, 0);
    let ids: Vec<_> = (0..3).map(|host| streams.open_from_host(1, host).unwrap()).collect();
    ids.iter().for_each(|id| streams.enqueue(*id));
    ids.iter().for_each(|id| streams.enqueue(*id));
    for round in 0..9 {
        let id = streams.next_turn().unwrap();
        assert_eq!(id, ids[round % 3]);
        streams.enqueue(id);
    }
}

#[test]
fn windows_shrink_when_many_streams_share_the_memory() {
    let mut streams = Streams::new(1024, 768, 0);
    let mut promised = 0;
    for number in 0..1024 {
        let id = streams.open_from_host(number, ()).unwrap();
        promised += u64::from(streams.get_mut(id).unwrap().connection.next_control().unwrap().buf_alloc);
    }
    assert!(promised <= 64 << 20, "{promised} bytes promised");
    assert_eq!(streams.open_from_host(1, ()), Err(()));
    let ids = streams.ids();
    ids.into_iter().for_each(|id| assert_eq!(streams.remove(id), Some(())));
    let id = streams.open_from_host(1, ()).unwrap();
    assert_eq!(streams.get_mut(id).unwrap().connection.next_control().unwrap().buf_alloc, 256 * 1024);
}

#[test]
fn refusals_are_bounded() {
    let mut streams = Streams::<()>::new(1, 1, 0);
    let packet = Header { src_cid: 3, dst_cid: 2, src_port: 5, dst_port: 6, kind: 2, op: 1, ..Header::default() };
    (0..1000).for_each(|_| streams.refuse(&packet));
    assert!(!streams.has_room_for_refusal());
    let refusal = streams.next_refusal().unwrap();
    assert_eq!((refusal.src_cid, refusal.dst_cid, refusal.src_port, refusal.dst_port), (2, 3, 6, 5));
    assert_eq!((refusal.kind, refusal.op), (2, Op::Reset as u16));
    assert_eq!(std::iter::from_fn(|| streams.next_refusal()).count(), 255);
    assert!(!streams.has_turns());
}

proptest! {
    #[test]
    fn the_table_agrees_with_its_model(steps in proptest::collection::vec(step(), 0..200)) {
        const LIMIT: usize = 12;
        const GUEST_LIMIT: usize = 8;
        let mut from_guest: HashSet<StreamId> = HashSet::new();
        let mut streams = Streams::new(LIMIT, GUEST_LIMIT, FIRST_HOST_PORT);
        let mut live: Vec<(StreamId, Ports, usize)> = Vec::new();
        let mut known: HashMap<Ports, StreamId> = HashMap::new();
        let mut waiting: Vec<StreamId> = Vec::new();
        let mut ever: HashSet<StreamId> = HashSet::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::FromHost(guest) => match streams.open_from_host(guest, number) {
                    Ok(id) => {
                        let ports = streams.get_mut(id).unwrap().ports;
                        prop_assert!(ports.guest == guest && ports.host >= FIRST_HOST_PORT);
                        prop_assert!(live.iter().all(|(_, other, _)| other.host != ports.host), "a port in use");
                        prop_assert!(ever.insert(id));
                        known.insert(ports, id);
                        live.push((id, ports, number));
                    }
                    Err(host) => prop_assert!(host == number && live.len() == LIMIT),
                },
                Step::FromGuest(ports) => match streams.open_from_guest(ports, &Header::default(), number) {
                    Ok(id) => {
                        prop_assert!(!known.contains_key(&ports) && ever.insert(id));
                        prop_assert!(from_guest.insert(id) && from_guest.len() <= GUEST_LIMIT);
                        known.insert(ports, id);
                        live.push((id, ports, number));
                    }
                    Err(_) => prop_assert!(
                        live.len() == LIMIT || from_guest.len() == GUEST_LIMIT || known.contains_key(&ports)
                    ),
                },
                Step::Remove(index) if !live.is_empty() => {
                    let (id, ports, host) = live.swap_remove(index % live.len());
                    prop_assert_eq!(streams.remove(id), Some(host));
                    from_guest.remove(&id);
                    prop_assert_eq!(streams.remove(id), None);
                    prop_assert!(streams.get_mut(id).is_none());
                    waiting.retain(|other| *other != id);
                    if known.get(&ports) == Some(&id) {
                        known.remove(&ports);
                    }
                }
                Step::Forget(index) if !live.is_empty() => {
                    let (id, ports, _) = live[index % live.len()];
                    streams.forget_ports(id);
                    if known.get(&ports) == Some(&id) {
                        known.remove(&ports);
                    }
                }
                Step::Enqueue(index) if !live.is_empty() => {
                    let (id, ..) = live[index % live.len()];
                    streams.enqueue(id);
                    if !waiting.contains(&id) {
                        waiting.push(id);
                    }
                }
                Step::Turn => {
                    let next = if waiting.is_empty() { None } else { Some(waiting.remove(0)) };
                    prop_assert_eq!(streams.next_turn(), next);
                }
                Step::Refuse => {
                    streams.refuse(&Header::default());
                    prop_assert!(streams.has_turns());
                    prop_assert!(streams.next_refusal().is_some());
                }
                _ => {}
            }
            prop_assert_eq!(streams.len(), live.len());
            prop_assert_eq!(streams.has_turns(), !waiting.is_empty());
            for (id, ports, host) in &live {
                prop_assert_eq!(streams.get_mut(*id).map(|stream| (stream.ports, stream.host)), Some((*ports, *host)));
            }
            for (ports, id) in &known {
                prop_assert_eq!(streams.find(*ports), Some(*id));
            }
        }
    }
}

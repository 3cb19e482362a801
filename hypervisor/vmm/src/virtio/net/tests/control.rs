//! The control queue, several queue pairs, resets and saved states.

use virtio_bindings::virtio_net::*;

use super::driver::*;
use crate::virtio::VirtioDevice;

const OK: u8 = 0;
const ERR: u8 = 1;
const ALL: u32 = 0x6f;

#[test]
fn the_driver_s_offloads_are_the_tap_s() {
    use libc::{TUN_F_CSUM as CSUM, TUN_F_TSO4 as TSO4};
    let offloads = |features: u64| {
        let mut driver = Driver::quiet(1, settings(), features);
        driver.activate();
        match driver.asked()[..] {
            [Asked::Offloads(offloads)] => offloads,
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!(offloads(u64::MAX), ALL);
    assert_eq!(offloads(0), 0);
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM), CSUM);
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4), CSUM | TSO4);
    assert_eq!(offloads(!(1 << VIRTIO_NET_F_GUEST_CSUM)), 0, "no segments without checksums");
    assert_eq!(offloads(!(1 << VIRTIO_NET_F_GUEST_USO4)), 0xf, "both kinds of USO or none");
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN), CSUM);

    let mut driver = Driver::new(1, settings());
    driver.asked();
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    assert_eq!(driver.command(&set(1 << VIRTIO_NET_F_GUEST_CSUM)), OK);
    assert_eq!(driver.asked(), [Asked::Offloads(CSUM)]);
    assert_eq!(driver.command(&set(1 << 60)), ERR, "not negotiated");
    assert!(driver.asked().is_empty());
}

#[test]
fn a_driver_uses_as_many_pairs_as_it_says() {
    let mut driver = Driver::quiet(3, settings(), u64::MAX);
    assert_eq!(driver.asked(), [Asked::Attach(1, false), Asked::Attach(2, false)], "one at first");
    driver.activate();
    driver.asked();
    let pairs = |count: u16| [&[4, 0][..], &count.to_le_bytes()].concat();
    for count in [0, 4, u16::MAX] {
        assert_eq!(driver.command(&pairs(count)), ERR);
    }
    assert_eq!(driver.command(&pairs(3)), OK);
    assert_eq!(driver.asked(), [Asked::Attach(1, true), Asked::Attach(2, true)]);
    for pair in 0..3 {
        driver.post(pair * 2, 2, 1536);
        driver.deliver(pair, &packet(MAC, 100 + pair)).unwrap();
    }
    driver.settle();
    for pair in 0..3 {
        assert_eq!(driver.received(pair * 2).unwrap().len(), 112 + pair);
        driver.send(pair * 2 + 1, &[0; 12], &frame(PEER, 200 + pair));
        assert_eq!(driver.sent(pair).unwrap().len(), 212 + pair);
    }
    assert_eq!(driver.command(&pairs(1)), OK);
    assert_eq!(driver.asked(), [Asked::Attach(1, false), Asked::Attach(2, false)]);
    assert_eq!((driver.is_watching(0), driver.is_watching(1)), (Some(true), None));
    driver.send(3, &[0; 12], &frame(PEER, 100));
    assert_eq!((driver.sent(1), driver.faults), (None, 4), "three commands and a frame in a queue that is not in use");
    assert_eq!(driver.command(&pairs(2)), OK);
    driver.reset();
    assert_eq!(driver.asked(), [Asked::Attach(1, true), Asked::Attach(1, false)]);
}

#[test]
fn without_mq_the_control_queue_is_the_third() {
    let mut driver = Driver::quiet(2, settings(), !(1 << VIRTIO_NET_F_MQ));
    driver.activate();
    driver.offer(2, &[&[0, 0, 0]], &[1]);
    driver.notify(2).unwrap();
    assert_eq!(driver.completed(2), Some(vec![OK]));
    assert!(!driver.net.state.filter.promiscuous);
    driver.offer(2, &[&[4, 0, 2, 0]], &[1]);
    driver.notify(2).unwrap();
    assert_eq!(driver.completed(2), Some(vec![ERR]));
}

#[test]
fn queues_that_the_driver_leaves_out_are_no_queues() {
    let mut driver = Driver::quiet(2, settings(), u64::MAX);
    for queue in [2, 3, 4] {
        driver.queues[queue] = crate::virtio::VirtQueue::new(64).unwrap();
    }
    driver.activate();
    for queue in 0..5 {
        driver.notify(queue).unwrap();
    }
    driver.post(0, 2, 1536);
    driver.deliver(0, &packet(MAC, 100)).unwrap();
    driver.settle();
    assert!(driver.received(0).is_some());
    // A restored machine may say that a pair is in use whose receive queue is none.
    let mut state = driver.net.state().clone();
    state.active_pairs = 2;
    driver.reset();
    driver.net.restore(state);
    driver.activate();
    driver.deliver(1, &packet(MAC, 100)).unwrap();
    driver.settle();
    assert_eq!(driver.is_watching(1), Some(false));
}

#[test]
fn addresses_are_set_and_bounded() {
    let mut driver = Driver::new(1, settings());
    let table = |macs: &[u8]| [&(macs.len() as u32 / 6).to_le_bytes()[..], macs].concat();
    let both = |unicast: &[u8], multicast: &[u8]| [&[1, 0][..], &table(unicast), &table(multicast)].concat();
    assert_eq!(driver.command(&both(&[2; 6], &[3; 12])), OK);
    assert_eq!(driver.net.state.filter.unicast, Some(vec![[2; 6]]));
    assert_eq!(driver.net.state.filter.multicast, Some(vec![[3; 6]; 2]));
    assert_eq!(driver.command(&both(&[2; 6 * 65], &[3; 6 * 64])), OK);
    assert_eq!(driver.net.state.filter.unicast, None, "too many are all");
    assert_eq!(driver.net.state.filter.multicast.as_ref().map(Vec::len), Some(64));
    for wrong in [&[1, 0][..], &[1, 0, 0xff, 0xff, 0xff, 0xff], &[1, 0, 1, 0, 0, 0, 2, 2], &[1, 0, 0, 0, 0, 0]] {
        assert_eq!(driver.command(wrong), ERR, "{wrong:?}");
    }
    assert_eq!(driver.command(&[1, 1, 2, 0, 0, 0, 0, 5]), OK);
    assert_eq!(driver.net.config[..6], [2, 0, 0, 0, 0, 5]);
    assert_eq!(driver.command(&[1, 1, 3, 0, 0, 0, 0, 5]), ERR, "a multicast address");
    assert_eq!(driver.command(&[1, 1, 0, 0, 0, 0, 0, 0]), ERR);
    for unknown in [&[0, 9, 1][..], &[2, 0, 1, 0], &[3, 0], &[200, 200], &[0], &[4, 1, 1, 0]] {
        assert_eq!(driver.command(unknown), ERR, "{unknown:?}");
    }
    driver.reset();
    assert_eq!(driver.net.config[..6], MAC, "the next driver finds it as at first");
    assert!(driver.net.state.filter.promiscuous);
}

#[test]
fn the_configuration_space_says_what_there_is() {
    let driver = Driver::new(3, settings());
    assert_eq!(driver.net.config, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0xdc, 5]);
    assert_ne!(driver.features & 1 << VIRTIO_NET_F_MQ, 0);
    assert_eq!(Driver::new(1, settings()).features & 1 << VIRTIO_NET_F_MQ, 0);
}

#[test]
fn the_link_is_as_the_parent_says() {
    let mut driver = Driver::new(1, settings());
    let status = |driver: &Driver| driver.net.config[6..8].to_vec();
    assert!(!driver.net.take_config_change(), "as the driver found it");
    assert!(driver.net.set_link(true) && !driver.net.take_config_change());
    assert!(driver.net.set_link(false) && driver.net.take_config_change());
    assert!(!driver.net.take_config_change(), "once");
    assert_eq!(status(&driver), [0, 0]);
    // Not the driver's to change.
    driver.reset();
    assert_eq!((status(&driver), driver.net.take_config_change()), (vec![0, 0], false));
    driver.activate();
    assert!(driver.net.set_link(true) && driver.net.take_config_change());
    assert_eq!(status(&driver), [1, 0]);
    assert_eq!(driver.command(&[1, 1, 2, 0, 0, 0, 0, 5]), OK);
    assert!(driver.net.take_config_change(), "the address is there as well");
}

#[test]
fn a_saved_state_goes_on_in_another_process() {
    let mut driver = Driver::new(2, settings());
    driver.net.set_link(false);
    assert_eq!(driver.command(&[0, 0, 0]), OK);
    assert_eq!(driver.command(&[4, 0, 2, 0]), OK);
    let saved = caisson_protos::monitor::encode(driver.net.state()).unwrap();
    let mut other = Driver::quiet(2, settings(), u64::MAX);
    other.asked();
    other.net.restore(caisson_protos::monitor::decode(&saved).unwrap());
    assert_eq!(other.net.state(), driver.net.state());
    assert_eq!(other.net.config, driver.net.config);
    other.activate();
    assert_eq!(other.asked(), [Asked::Offloads(ALL), Asked::Attach(1, true)]);
    other.post(2, 1, 1536);
    other.deliver(1, &packet(MAC, 100)).unwrap();
    other.deliver(0, &packet(PEER, 100)).unwrap();
    other.settle();
    assert!(other.received(2).is_some());
    assert_eq!(other.net.stats.receive_filtered, 0, "without buffers nothing is read");
}

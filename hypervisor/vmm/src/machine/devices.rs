//! The devices of a machine, in the order in which the guest finds them: entropy first, which the kernel wants early,
//! then vsock, disks (vda first), shares, network devices ([`MachineConfig::network_slots`] counts on that).

use std::{collections::BTreeSet, io};

use caisson_protos::monitor::{DiskConfig, MAX_NETWORKS, MachineConfig, NetworkConfig};
use slog::Logger;

use super::{MAX_DISKS, MAX_SHARES, MachineError};
use crate::{
    descriptors::{Access, Descriptors},
    layout::VIRTIO_IRQS,
    virtio::{
        VirtioDevice,
        block::Block,
        fs::FsDevice,
        net::{self, Backend, Net, Tap},
        rng::Rng,
        vsock::Vsock,
    },
};

/// Bytes of a serial number.
const MAX_SERIAL: usize = 20;

/// Context ids that a guest may have: 0 to 2 mean others, the last one means any.
const GUEST_CIDS: std::ops::Range<u64> = 3..u32::MAX as u64;

/// Makes them.
///
/// # Errors
/// See [`MachineError`].
pub fn build(
    config: &MachineConfig,
    fds: &mut Descriptors,
    log: &Logger,
) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    check_count("disks", config.disks.len(), MAX_DISKS)?;
    check_count("shares", config.shares.len(), MAX_SHARES)?;
    check_count("networks", config.networks.len(), MAX_NETWORKS.into())?;
    let network_slots = config.networks.len() + usize::from(config.empty_network_slots);
    check_count("network slots", network_slots, MAX_NETWORKS.into())?;
    check_unique("disks", config.disks.iter().map(|disk| &disk.serial))?;
    check_unique("shares", config.shares.iter().map(|share| &share.tag))?;

    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng)];
    if let Some(vsock) = &config.vsock {
        if !GUEST_CIDS.contains(&vsock.guest_cid) {
            return Err(MachineError::GuestCid(vsock.guest_cid));
        }
        let listener = fds.listener(vsock.listener, "vsock listener")?;
        let guest_streams = fds.packet_socket(vsock.guest_streams, "vsock guest streams")?;
        let device = Vsock::new(vsock.guest_cid, listener, guest_streams, log.clone());
        devices.push(Box::new(device.map_err(|source| MachineError::System { what: "vsock", source })?));
    }
    for (index, disk) in config.disks.iter().enumerate() {
        devices.push(Box::new(block(index, disk, fds, log)?));
    }
    for share in &config.shares {
        let what = format!("file server of share {:?}", share.tag);
        let server = fds.packet_socket(share.server, &what)?;
        let device = FsDevice::new(&share.tag, server, log.clone());
        devices.push(Box::new(device.map_err(|error| MachineError::Device { what, source: error.into() })?));
    }
    for (index, network) in config.networks.iter().enumerate() {
        devices.push(Box::new(net(&format!("network {index}"), network, fds, log)?));
    }
    // Each has an interrupt of its own.
    let slots = devices.len() + usize::from(config.empty_network_slots);
    check_count("devices and empty slots", slots, VIRTIO_IRQS.len())?;
    Ok(devices)
}

fn block(index: usize, config: &DiskConfig, fds: &mut Descriptors, log: &Logger) -> Result<Block, MachineError> {
    let serial = config.serial.as_str();
    if serial.len() > MAX_SERIAL || !serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(MachineError::Serial(serial.to_owned()));
    }
    let access = if config.read_only { Access::Read } else { Access::ReadWrite };
    let what = format!("disk {index}");
    let (file, size) = fds.disk(config.file, &what, access)?;
    let log = log.new(slog::o!("disk" => index));
    Block::new(file, size, serial, config.read_only, log)
        .map_err(|source| MachineError::Device { what, source: source.into() })
}

/// A network device, which `what` names in errors.
///
/// # Errors
/// See [`MachineError`].
pub fn net(what: &str, config: &NetworkConfig, fds: &mut Descriptors, log: &Logger) -> Result<Net, MachineError> {
    let refuse = |problem: String| MachineError::Network { what: what.to_owned(), problem };
    if config.mac == [0; 6] || net::is_multicast(config.mac) {
        return Err(refuse(format!("MAC {:02x?}: use the address of one device", config.mac)));
    }
    if !net::MTU.contains(&config.mtu) {
        return Err(refuse(format!("MTU {}: use {} to {}", config.mtu, net::MTU.start(), net::MTU.end())));
    }
    let buckets = [&config.send_limit, &config.receive_limit].map(|limit| [limit.bytes, limit.operations]);
    if buckets.iter().flatten().flatten().any(|bucket| bucket.rate == 0 || bucket.burst == 0) {
        return Err(refuse("a limit with a rate or burst of 0 lets nothing pass: use 1 or more, or no limit".into()));
    }
    if !(1..=net::MAX_PAIRS).contains(&config.taps.len()) {
        return Err(refuse(format!("{} queues of a tap: use 1 to {}", config.taps.len(), net::MAX_PAIRS)));
    }
    let taps = config.taps.iter().map(|tap| fds.tap(*tap, what)).collect::<Result<Vec<_>, _>>()?;
    let mut infos = taps.iter().map(|(_, info)| info);
    if let Some(first) = infos.next() {
        if let Some(other) = infos.find(|info| info.name != first.name) {
            let names = format!("{:?} and {:?}", first.name, other.name);
            return Err(refuse(format!("queues of two taps, {names}: use those of one")));
        }
        if taps.len() > 1 && !first.multi_queue {
            return Err(refuse(format!("tap {:?} has one queue only: set IFF_MULTI_QUEUE on it", first.name)));
        }
    }
    let failed = |source: io::Error| MachineError::Device { what: what.to_owned(), source: source.into() };
    let taps = taps.into_iter().map(|(fd, _)| Tap::new(fd)).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let settings = net::Settings {
        mac: config.mac,
        mtu: config.mtu,
        send_limit: config.send_limit,
        receive_limit: config.receive_limit,
        sources: config.sources.clone(),
        uso: taps.first().is_some_and(Tap::has_uso),
    };
    let backends = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect();
    Net::new(backends, settings, log.new(slog::o!("network" => what.to_owned()))).map_err(failed)
}

fn check_count(what: &'static str, count: usize, max: usize) -> Result<(), MachineError> {
    if count > max { Err(MachineError::TooMany { what, count, max }) } else { Ok(()) }
}

/// The guest tells disks and shares apart by these names; several disks may have none.
fn check_unique<'a>(what: &'static str, names: impl Iterator<Item = &'a String>) -> Result<(), MachineError> {
    let mut seen = BTreeSet::new();
    match names.filter(|name| !name.is_empty()).find(|name| !seen.insert(*name)) {
        Some(name) => Err(MachineError::DuplicateName { what, name: name.clone() }),
        None => Ok(()),
    }
}

//! The devices of a machine, in the order in which the guest finds them: entropy first, which the kernel wants early,
//! then vsock, disks (vda first), shares.

use std::collections::BTreeSet;

use caisson_protos::monitor::{DiskConfig, MachineConfig};
use slog::Logger;

use super::{MAX_DISKS, MAX_SHARES, MachineError};
use crate::{
    descriptors::{Access, Descriptors},
    virtio::{VirtioDevice, block::Block, fs::FsDevice, rng::Rng, vsock::Vsock},
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
    at_most("disks", config.disks.len(), MAX_DISKS)?;
    at_most("shares", config.shares.len(), MAX_SHARES)?;
    different("disks", config.disks.iter().map(|disk| &disk.serial))?;
    different("shares", config.shares.iter().map(|share| &share.tag))?;

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

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), MachineError> {
    if count > max { Err(MachineError::TooMany { what, count, max }) } else { Ok(()) }
}

/// The guest tells disks and shares apart by these names; several disks may have none.
fn different<'a>(what: &'static str, names: impl Iterator<Item = &'a String>) -> Result<(), MachineError> {
    let mut seen = BTreeSet::new();
    match names.filter(|name| !name.is_empty()).find(|name| !seen.insert(*name)) {
        Some(name) => Err(MachineError::Twice { what, name: name.clone() }),
        None => Ok(()),
    }
}

//! A tap as the monitor uses it: one descriptor for each queue pair. The parent has made it, in the pod's network namespace, and
//! has configured it; no path is opened here, and none of these calls needs a privilege.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use super::header::HEADER;

/// What a tap must be: Ethernet frames, each with a virtio header before it. That there is nothing else (IFF_NO_PI) cannot be seen:
/// TUNGETIFF shows the same bit for a tap without a filter (IFF_NOFILTER).
const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_VNET_HDR;
/// What a queue must not be.
const OTHERS: libc::c_int = libc::IFF_TUN | libc::IFF_DETACH_QUEUE;
/// The device number of /dev/net/tun (Documentation/admin-guide/devices.txt).
const DEVICE: (u32, u32) = (10, 200);
/// All that can be asked of a kernel that has USO.
const WITH_USO: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// The host's end of a queue pair.
pub trait Backend: Send {
    /// Packets are read and written here, one in each call, without waiting.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What the host may leave to the guest in packets for it (TUN_F_*), for all queues.
    ///
    /// # Errors
    /// The system call's.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;

    /// Whether the host spreads packets to this queue.
    ///
    /// # Errors
    /// The system call's.
    fn attach(&self, attached: bool) -> io::Result<()>;
}

/// A tap's queue.
#[derive(Debug)]
pub struct Tap(OwnedFd);

/// What TUNGETIFF tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapInfo {
    /// The interface's name.
    pub name: String,
    /// Whether it may have more than one queue.
    pub multi_queue: bool,
}

/// Looks at a descriptor; None if it is not an attached queue of a tap with virtio headers.
pub fn describe(fd: &OwnedFd) -> Option<TapInfo> {
    let device = rustix::fs::fstat(fd).ok()?.st_rdev;
    if (rustix::fs::major(device), rustix::fs::minor(device)) != DEVICE {
        return None;
    }
    // SAFETY: a zeroed ifreq is valid: numbers and an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes an ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) };
    // SAFETY: TUNGETIFF fills the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if result < 0 || flags & (KIND | OTHERS) != KIND {
        return None;
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte as u8)).collect();
    Some(TapInfo { name, multi_queue: flags & libc::IFF_MULTI_QUEUE != 0 })
}

impl Tap {
    /// Takes a queue for which [`describe`] gave something.
    ///
    /// # Errors
    /// The system call's.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let tap = Self(fd);
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { libc::ioctl(tap.0.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) })?;
        Ok(tap)
    }

    /// Whether the kernel can cut and join UDP datagrams (Linux 6.2).
    pub fn has_uso(&self) -> bool {
        let has_uso = self.set_offloads(WITH_USO).is_ok();
        // Until there is a driver, nothing is left to it.
        has_uso && self.set_offloads(0).is_ok()
    }
}

impl Backend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    fn attach(&self, attached: bool) -> io::Result<()> {
        // SAFETY: a zeroed ifreq is valid: numbers and an empty name.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETQUEUE reads an ifreq.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETQUEUE, &request) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

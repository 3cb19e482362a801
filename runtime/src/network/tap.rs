//! Taps.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::libc::{c_int, c_short};

/// `struct virtio_net_hdr_v1`, which is before each packet.
const HEADER: c_int = 12;

nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, c_int);

/// The queues of a tap. It goes with the last of them.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<OwnedFd>,
}

impl Tap {
    /// Makes a tap with `queues` queues in the calling thread's network namespace.
    ///
    /// # Errors
    /// The system call's: EBUSY if the name is taken.
    pub fn create(name: &str, queues: u16) -> io::Result<Self> {
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
        let mut opened = Vec::new();
        for number in 0..queues {
            // Only the first makes it; the others belong to it.
            let new = if number == 0 { libc::IFF_TUN_EXCL } else { 0 };
            opened.push(open(name, flags | new)?);
        }
        Ok(Self { queues: opened })
    }

    /// Its queues.
    pub fn into_queues(self) -> Vec<OwnedFd> {
        self.queues
    }
}

fn open(name: &str, flags: c_int) -> io::Result<OwnedFd> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/dev/net/tun")?;
    // SAFETY: a structure of numbers and bytes may be all zeros.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len().saturating_sub(1);
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // IFF_TUN_EXCL is the sign bit.
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the kernel reads and writes one ifreq, which `request` is.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }?;
    let header = HEADER;
    // SAFETY: the kernel reads one int.
    unsafe { set_header_size(file.as_raw_fd(), &raw const header) }?;
    Ok(file.into())
}

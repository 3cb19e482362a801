//! Taps in network namespaces of the tests' own.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// This thread, and those that it starts, are in a new network namespace from now on.
pub fn enter_namespace() {
    // SAFETY: changes what this thread sees of the network, and no memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "these tests run as root: {}", io::Error::last_os_error());
}

/// A tap of this name with so many queues, up, with `host` in a network of 256 addresses.
pub fn create(name: &str, queues: usize, mtu: u16, host: Ipv4Addr) -> Vec<OwnedFd> {
    let multi_queue = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
    let taps = (0..queues).map(|_| {
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.expect("/dev/net/tun");
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = kind as libc::c_short;
        call(&file, libc::TUNSETIFF, &mut request);
        file.into()
    });
    let taps = taps.collect();
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let address = |address: Ipv4Addr| {
        let mut bytes = [0; 14];
        bytes[2..6].copy_from_slice(&address.octets().map(|byte| byte as libc::c_char));
        libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: bytes }
    };
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = mtu.into();
    call(&socket, libc::SIOCSIFMTU, &mut request);
    request.ifr_ifru.ifru_addr = address(host);
    call(&socket, libc::SIOCSIFADDR, &mut request);
    request.ifr_ifru.ifru_netmask = address(Ipv4Addr::new(255, 255, 255, 0));
    call(&socket, libc::SIOCSIFNETMASK, &mut request);
    call(&socket, libc::SIOCGIFFLAGS, &mut request);
    // SAFETY: SIOCGIFFLAGS has filled the flags.
    request.ifr_ifru.ifru_flags = unsafe { request.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
    call(&socket, libc::SIOCSIFFLAGS, &mut request);
    taps
}

/// Whether this thread's network namespace has such an interface.
pub fn exists(name: &str) -> bool {
    let name = std::ffi::CString::new(name).expect("no zero in it");
    // SAFETY: a C string that outlives the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn call(fd: &impl AsRawFd, call: libc::Ioctl, request: &mut libc::ifreq) {
    // SAFETY: all calls here read and write an ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), call, request) };
    assert_eq!(result, 0, "ioctl {call:#x}: {}", io::Error::last_os_error());
}

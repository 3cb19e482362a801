//! The listener in the pod's network namespace, and the redirection of loopback to it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, bind, listen, socket_with,
        sockopt::{set_ip_freebind, set_ipv6_freebind},
    },
};

use super::{bpf, program};
use crate::network::Namespace;

/// Connections that may wait to be accepted. That takes a moment, unless the machine is still booting.
const BACKLOG: i32 = 128;

/// Why there is no port forwarding.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// That would take the host's own loopback.
    #[error("the network namespace is the host's own, whose loopback is not the pod's")]
    Host,
    /// The namespace.
    #[error("the pod's network namespace cannot be entered: {0}")]
    Namespace(io::Error),
    /// A socket.
    #[error("cannot listen on {0} in the pod's network namespace: {1}")]
    Listen(IpAddr, io::Error),
    /// BPF.
    #[error(
        "the kernel refuses to {0}: {1}: Linux 5.9 or later with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER is needed, \
        and CAP_BPF and CAP_NET_ADMIN"
    )]
    Bpf(&'static str, io::Error),
}

/// Takes every connection to loopback in a network namespace. When it is dropped, or its process dies, all is as without it.
#[derive(Debug)]
pub struct Listener {
    pub(super) ipv4: OwnedFd,
    /// None where the kernel has no IPv6.
    pub(super) ipv6: Option<OwnedFd>,
    /// Keeps the program attached.
    pub(super) redirection: OwnedFd,
}

impl Listener {
    /// Begins to listen. Waits for the kernel and for a thread, a few milliseconds at most.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn open(namespace: &Namespace) -> Result<Self, ListenError> {
        if namespace.is_the_hosts().map_err(ListenError::Namespace)? {
            return Err(ListenError::Host);
        }
        let sockets = namespace.run(|| (listen_on(Ipv4Addr::LOCALHOST.into()), listen_on(Ipv6Addr::LOCALHOST.into())));
        let (ipv4, ipv6) = sockets.map_err(ListenError::Namespace)?;
        let ipv6 = match ipv6 {
            Err(ListenError::Listen(_, error)) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            other => Some(other?),
        };
        let ipv4 = ipv4?;
        let refused = |what| move |error| ListenError::Bpf(what, error);
        let map = bpf::Sockets::new().map_err(refused("make a map of sockets"))?;
        for (place, socket) in [(program::IPV4, Some(&ipv4)), (program::IPV6, ipv6.as_ref())] {
            if let Some(socket) = socket {
                map.set(place, socket).map_err(refused("put a socket into a map"))?;
            }
        }
        let program = map.load_program().map_err(refused("load a program of type sk_lookup"))?;
        // Program and map live as long as this does.
        let redirection =
            bpf::attach(&program, namespace).map_err(refused("attach a program to a network namespace"))?;
        Ok(Self { ipv4, ipv6, redirection })
    }
}

/// Listens at a port that the kernel chooses. It is bound to loopback, so that nobody comes from elsewhere whatever the program does.
fn listen_on(address: IpAddr) -> Result<OwnedFd, ListenError> {
    let listening = || {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        // While the loopback interface is down it has no address; it may come up later.
        match address {
            IpAddr::V4(_) => set_ip_freebind(&socket, true)?,
            IpAddr::V6(_) => set_ipv6_freebind(&socket, true)?,
        }
        bind(&socket, &SocketAddr::new(address, 0))?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    listening().map_err(|error: Errno| ListenError::Listen(address, error.into()))
}

//! An interface and its tap, joined in both directions.

use caisson_netlink::{
    Refused, Socket, link,
    traffic::{Filter, add_clsact, add_redirect, list_filters, remove_clsact, remove_redirect},
};

use super::{NetworkError, plan::Interface, system};

/// What was done to the interface. The tap's own part goes with the tap.
#[derive(Debug)]
pub struct Redirect {
    /// There was no place for filters.
    made_clsact: bool,
}

impl Redirect {
    /// Sets up the tap and joins both. On an error the interface is as it was.
    pub fn join(socket: &mut Socket, interface: &Interface, tap: u32) -> Result<Self, NetworkError> {
        let name = &interface.name;
        // The host has no business on the tap: no address of its own, and with that no packets of its own.
        let _ = socket.request(&link::without_link_local(tap));
        let set = socket.request(&link::set_mtu(tap, interface.mtu));
        set.map_err(system(format!("set the MTU of the tap of {name} to {}", interface.mtu)))?;
        clsact(socket, tap).map_err(system(format!("prepare the tap of {name} for a redirect")))?;
        redirect(socket, tap, interface.index).map_err(system(format!("redirect the tap of {name} to it")))?;
        let up = link::set_flags(tap, libc::IFF_UP, libc::IFF_UP);
        socket.request(&up).map_err(system(format!("set the tap of {name} up")))?;
        let made_clsact = clsact(socket, interface.index).map_err(system(format!("prepare {name} for a redirect")))?;
        if interface.queue_length == 0 {
            // With a place for filters Linux has set it to 1000 (qdisc_create): a virtual device lets no packet wait.
            let _ = socket.request(&link::set_queue_length(interface.index, 0));
        }
        let redirect = redirect(socket, interface.index, tap);
        let joined = Self { made_clsact };
        match redirect {
            Ok(()) => Ok(joined),
            Err(error) => {
                joined.undo(socket, interface.index);
                Err(system(format!("redirect {name} to its tap"))(error))
            }
        }
    }

    /// Undoes what was done to `interface`, if it is still there.
    pub fn undo(self, socket: &mut Socket, interface: u32) {
        let message = if self.made_clsact { remove_clsact(interface) } else { remove_redirect(interface) };
        let _ = socket.request(&message);
    }
}

/// Removes a redirect that a shim has left on `interface`, if it has one, and the place for filters if no other is in it.
pub fn remove_left(socket: &mut Socket, interface: u32) {
    if socket.request(&remove_redirect(interface)).is_ok() {
        let mut lists = list_filters(interface).into_iter().map(|list| socket.dump(&list));
        if lists.all(|filters| filters.is_ok_and(|filters| filters.is_empty())) {
            let _ = socket.request(&remove_clsact(interface));
        }
    }
}

/// Whether it had to be made.
fn clsact(socket: &mut Socket, interface: u32) -> Result<bool, Refused> {
    match socket.request(&add_clsact(interface)) {
        Ok(()) => Ok(true),
        // Or an `ingress`, which serves as well.
        Err(error) if error.is(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

fn redirect(socket: &mut Socket, from: u32, to: u32) -> Result<(), Refused> {
    // Of a shim that was killed.
    let _ = socket.request(&remove_redirect(from));
    match socket.request(&add_redirect(from, to, Filter::MatchAll)) {
        // The kernel has no such filter.
        Err(error) if error.is(libc::ENOENT) => socket.request(&add_redirect(from, to, Filter::U32)),
        result => result,
    }
}

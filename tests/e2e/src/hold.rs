//! A pod stopped in the middle of something: its file server gets no processor, so whatever needs a file waits, and a
//! request that waits in the server's socket shows that it has come to that.

use std::{fs, os::fd::OwnedFd};

use rustix::{
    io::ioctl_fionread,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open},
};

use crate::{
    process::{Process, signal},
    until,
    wait::STEP,
};

/// The descriptor of caisson-fsd's socket to the monitor.
const SOCKET: i32 = 3;

/// A stopped file server. Dropped, it goes on.
pub struct Hold {
    pid: i32,
    socket: OwnedFd,
}

impl Hold {
    /// Stops the file server.
    pub fn of(server: &Process) -> Self {
        let pid = Pid::from_raw(server.pid).expect("a process has a pid");
        let handle = pidfd_open(pid, PidfdFlags::empty()).expect("the file server runs");
        let socket = pidfd_getfd(&handle, SOCKET, PidfdGetfdFlags::empty()).expect("the file server has a socket");
        signal(server.pid, Signal::STOP);
        until("the file server to stop", STEP, || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid)).ok()?;
            stat.rsplit_once(") ")?.1.starts_with('T').then_some(())
        });
        Self { pid: server.pid, socket }
    }

    /// Waits until the guest waits for the file server.
    pub fn wait(&self, what: &str) {
        until(&format!("{what} to need a file"), STEP, || {
            (ioctl_fionread(&self.socket).expect("it is a socket") > 0).then_some(())
        });
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        signal(self.pid, Signal::CONT);
    }
}

//! A terminal for `ctr run -t`: a pseudo-terminal of which this process is the user, with a size to change.

use std::{
    fs::File,
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::process::{Capture, Running};

/// A program on a terminal.
pub struct Terminal {
    /// The program; its standard output is what the screen shows, its standard error is on the screen too.
    pub running: Running,
    user: File,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// Starts `command` as the leader of a session with a terminal of this size.
    pub fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let user: OwnedFd =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a free terminal");
        grantpt(&user).expect("the terminal is ours");
        unlockpt(&user).expect("the terminal is ours");
        let name = ptsname(&user, Vec::new()).expect("the terminal has a name").into_string().expect("a name in ASCII");
        tcsetwinsize(&user, size(columns, rows)).expect("a terminal has a size");
        let open = || File::options().read(true).write(true).open(&name).expect("the terminal opens");
        // setsid gives it the terminal as its controlling one, so that a change of size reaches it as SIGWINCH.
        let call = format!("{command:?}").replace('"', "");
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::from(open()))
            .stdout(Stdio::from(open()))
            .stderr(Stdio::from(open()))
            .spawn()
            .expect("setsid is installed");
        let user = File::from(user);
        let screen = Capture::of(user.try_clone().expect("a descriptor can be duplicated"));
        let nothing = Capture::of(std::io::empty());
        Self { running: Running::supervise(call, child, None, screen, nothing), user }
    }

    /// Types `text`.
    pub fn type_in(&mut self, text: &str) {
        use std::io::Write as _;
        self.user.write_all(text.as_bytes()).expect("the terminal takes input");
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        tcsetwinsize(&self.user, size(columns, rows)).expect("a terminal has a size");
    }

    /// What the screen has shown so far.
    pub fn screen(&self) -> &Capture {
        &self.running.stdout
    }
}

//! A stop between a shim's start and its Create: a program of the shim's name stands before the real one in
//! containerd's search path. While the gate is closed it starts the real shim, but keeps its address from containerd.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use crate::{Host, Runtime, environment, until, wait::STEP};

/// See the module.
pub struct Gate {
    closed: PathBuf,
    reached: PathBuf,
}

impl Gate {
    /// Puts the program there, the gate open. Before the first container, because containerd looks for a shim once.
    pub fn build(host: &Host) -> Self {
        let directory = host.containerd.programs();
        fs::create_dir_all(&directory).expect("the test's directory takes directories");
        let gate =
            Self { closed: host.directory().join("gate.closed"), reached: host.directory().join("gate.reached") };
        let (name, real) = match host.runtime {
            Runtime::Caisson => {
                let name = "containerd-shim-caisson-v2";
                (name, environment::bin_dir().join(name).display().to_string())
            }
            Runtime::Runc => ("containerd-shim-runc-v2", installed("containerd-shim-runc-v2")),
        };
        let script = format!(
            "#!/bin/sh\nfor last; do :; done\n\
             if [ \"$last\" != start ] || ! [ -e {closed} ]; then exec {real} \"$@\"; fi\n\
             address=$({real} \"$@\") || exit\n: > {reached}\n\
             while [ -e {closed} ]; do sleep 0.05; done\nprintf %s \"$address\"\n",
            closed = gate.closed.display(),
            reached = gate.reached.display(),
        );
        let program = directory.join(name);
        fs::write(&program, script).expect("the test's directory takes files");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("the file is ours");
        gate
    }

    /// From now on a shim that starts stops here.
    pub fn close(&self) {
        let _ = fs::remove_file(&self.reached);
        fs::write(&self.closed, "").expect("the test's directory takes files");
    }

    /// Waits until a shim has stopped here.
    pub fn wait(&self) {
        until("a shim to have started", STEP, || self.reached.exists().then_some(()));
    }

    /// Lets it pass.
    pub fn open(&self) {
        let _ = fs::remove_file(&self.closed);
    }
}

/// The program `name` of the search path.
fn installed(name: &str) -> String {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&search).map(|directory| directory.join(name));
    let found = places.find(|program| program.exists()).unwrap_or_else(|| panic!("{name} is not installed"));
    found.display().to_string()
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

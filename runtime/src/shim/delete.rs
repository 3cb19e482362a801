//! The `delete` command: containerd runs it whenever a shim's connection has closed, after an orderly end as well as
//! after a crash, and reads what became of the task from its output. It ends what is left of the pod and removes
//! its places; after an orderly end there is nothing to find.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::{
    cgroup,
    host::{
        config::Config,
        hooks,
        paths::{PodPaths, allow_missing},
        processes::{self, Member},
    },
    network::{self, NetworkError, Record},
    pod::lifecycle::KILLED,
    shim::{events::timestamp, flags::Flags, orphans},
};

/// How long killed processes may take to be gone.
const LIMIT: Duration = Duration::from_secs(5);

/// Cleans up after a pod; what to print.
///
/// # Errors
/// If something of the pod could not be removed.
pub fn delete(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    flags.check_names()?;
    let bundle = if flags.bundle.is_empty() { PathBuf::from(".") } else { PathBuf::from(&flags.bundle) };
    let state_dir = state_dir(&bundle);
    let paths = PodPaths::new(&state_dir, &flags.namespace, &flags.id);
    let members = clear(&paths, &paths.socket(&flags.address, &flags.namespace, &flags.id))?;
    for failed in hooks::run_pending(&fs::canonicalize(&bundle).unwrap_or(bundle)) {
        // containerd logs what this command says.
        eprintln!("a hook failed: {failed}");
    }
    for orphan in orphans::find(&state_dir) {
        let pod = orphan.paths.pod().display();
        match clear(&orphan.paths, &orphan.socket) {
            Ok(_) => eprintln!("removed what an earlier shim left in {pod}"),
            Err(error) => eprintln!("cannot remove what an earlier shim left in {pod}: {error:#}"),
        }
    }
    let response = DeleteResponse {
        pid: members.iter().find(|member| member.role == processes::TASK).map_or(0, |member| member.pid),
        exit_status: KILLED,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Ends what is left of a pod and removes its places; who belonged to it.
fn clear(paths: &PodPaths, socket: &Path) -> anyhow::Result<Vec<Member>> {
    let members = processes::recorded(&paths.processes());
    let left = processes::end(&members, LIMIT);
    let cgroup = cgroup::recorded(&paths.cgroup()).map_or(Ok(()), |path| cgroup::remove(&path));
    let network = clean_network(paths);
    allow_missing(fs::remove_file(socket))?;
    remove(paths)?;
    if !left.is_empty() {
        anyhow::bail!("processes of {} outlived SIGKILL for {LIMIT:?}: {left:?}", paths.pod().display());
    }
    cgroup?;
    network?;
    Ok(members)
}

/// Takes the pod's taps and filters out of a network namespace that outlives it, unless another pod has it by now.
fn clean_network(paths: &PodPaths) -> Result<(), NetworkError> {
    let Some(record) = Record::read(&paths.network()) else { return Ok(()) };
    let mut others = paths.others().filter_map(|other| Record::read(&other.network()));
    if others.any(|other| other.identity == record.identity) {
        return Ok(());
    }
    record.namespace().map_or(Ok(()), |namespace| network::clean(&namespace))
}

/// The kernel takes a mount namespace down a moment after its last process has ended; until then its mount points are busy.
fn remove(paths: &PodPaths) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match paths.remove() {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < 100 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Where this pod's state lies: `start` wrote the socket's address into the bundle, and that socket lies in
/// `<state_dir>/s`. Without that file, where the configuration says.
fn state_dir(bundle: &Path) -> PathBuf {
    let address = fs::read_to_string(bundle.join("address")).unwrap_or_default();
    let socket = address.trim().strip_prefix("unix://").map(PathBuf::from);
    let recorded = socket.and_then(|socket| Some(socket.parent()?.parent()?.to_owned()));
    recorded.filter(|directory| directory.is_absolute()).unwrap_or_else(|| Config::load().unwrap_or_default().state_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crashed_pod_leaves_nothing_and_is_reported_as_killed() {
        let state = tempfile::tempdir().unwrap();
        let bundle = tempfile::tempdir().unwrap();
        let flags = Flags {
            id: "one".into(),
            namespace: "ns".into(),
            address: "/c.sock".into(),
            bundle: bundle.path().display().to_string(),
            ..Flags::default()
        };
        let paths = PodPaths::new(state.path(), "ns", "one");
        let socket = paths.socket("/c.sock", "ns", "one");
        fs::create_dir_all(paths.sockets()).unwrap();
        fs::write(&socket, "").unwrap();
        fs::write(bundle.path().join("address"), format!("unix://{}", socket.display())).unwrap();
        paths.create(bundle.path(), &socket).unwrap();
        // A shim that was killed before containerd had connected to it.
        let orphan = PodPaths::new(state.path(), "ns", "two");
        let its_socket = orphan.socket("/c.sock", "ns", "two");
        fs::write(&its_socket, "").unwrap();
        orphan.create(Path::new("/no/such/bundle"), &its_socket).unwrap();
        let mut vmm = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let member = processes::Member::of("vmm", vmm.id()).unwrap();
        let task = Member { role: processes::TASK.into(), pid: 4711, started: 0 };
        processes::record(&paths.processes(), &[member, task]).unwrap();
        let reaper = std::thread::spawn(move || vmm.wait().unwrap());
        for pid in [4711, 0] {
            let response = DeleteResponse::parse_from_bytes(&delete(&flags).unwrap()).unwrap();
            assert_eq!((response.pid, response.exit_status), (pid, 137));
        }
        assert!(!reaper.join().unwrap().success());
        assert!(!socket.exists() && !paths.pod().exists());
        assert!(!its_socket.exists() && !orphan.pod().exists(), "the orphan went with it");
    }

    #[test]
    fn the_network_namespace_of_a_crashed_pod_is_as_it_was_unless_another_pod_has_it() {
        let state = tempfile::tempdir().unwrap();
        let namespace = network::Namespace::new().expect("these tests run as root");
        let thread = namespace.task_thread().unwrap();
        let path = PathBuf::from(format!("/proc/{}/ns/net", thread.pid()));
        let ip = |words: &str| {
            let run = || std::process::Command::new("ip").args(words.split(' ')).output().unwrap();
            let output = namespace.run(run).unwrap();
            assert!(output.status.success(), "{words}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        ip("link add eth0 type bridge");
        let settings = network::Settings { queues: 1, cards: 8, descriptors: 8 };
        // What a killed shim does not drop; the cards are its monitor's, which lives a little longer.
        std::mem::forget(network::join(namespace.clone(), settings).unwrap());
        let record = Record { identity: namespace.identity().unwrap(), path };
        let [one, two] = ["one", "two"].map(|id| PodPaths::new(state.path(), "ns", id));
        for pod in [&one, &two] {
            pod.create(Path::new("/bundle"), Path::new("/socket")).unwrap();
            record.write(&pod.network()).unwrap();
        }
        clear(&one, Path::new("/no/such/socket")).unwrap();
        assert!(ip("-br link").contains("ctap"), "it is the other pod's by now");
        clear(&two, Path::new("/no/such/socket")).unwrap();
        let left = ip("-br link");
        assert!(left.contains("eth0") && !left.contains("ctap"), "{left}");
    }
}

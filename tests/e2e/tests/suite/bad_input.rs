//! What cannot work: each is refused with a sentence that names the cause, and nothing is left behind.

use std::{fs, path::Path, process::Command};

use caisson_e2e::{
    Finished, Host, Runtime, Setup,
    bundle::{self, Bundle, bind},
    containerd::Kvm,
    environment::image_dir,
    process,
    wait::STEP,
};
use containerd_shim_protos::api;
use protobuf::well_known_types::any::Any;

caisson_e2e::caisson_only!(
    no_kvm in Setup::default().kvm(Kvm::Absent),
    a_kvm_that_is_none in Setup::default().kvm(Kvm::Foreign),
    kernels_and_initramfs,
    configurations,
    an_unknown_runtime_option,
    no_space_for_state,
);
caisson_e2e::for_each_runtime!(
    specifications,
    a_root_that_cannot_be_mounted,
    streams_that_are_not_there,
    a_client_that_vanishes,
    no_space_for_files in Setup::default().disk(24),
);

/// The pod is refused, each of `words` is in the message, nothing stays, and the next pod is none the worse.
#[track_caller]
fn refused(host: &Host, name: &str, words: &[&str]) {
    let finished = host.container(name).run(&["echo", "never"]);
    explained(name, &finished, words);
    host.expect_nothing_left();
}

#[track_caller]
fn explained(name: &str, finished: &Finished, words: &[&str]) {
    assert!(finished.code != Some(0) && finished.stdout.is_empty(), "{name} was accepted: {finished:?}");
    for word in words {
        assert!(finished.err().contains(word), "{name}: no {word:?} in {finished:?}");
    }
}

fn no_kvm(host: &Host) {
    refused(host, "no-kvm", &["/dev/kvm"]);
}

fn a_kvm_that_is_none(host: &Host) {
    refused(host, "foreign-kvm", &["/dev/kvm"]);
}

/// The first `kib` KiB of `file`, as a new file.
fn cut(file: &Path, kib: usize, to: &Path) -> String {
    let bytes = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    fs::write(to, &bytes[..kib * 1024]).expect("the test's directory takes files");
    format!("{to:?}")
}

fn kernels_and_initramfs(host: &Host) {
    let directory = host.directory();
    let (kernel, initramfs) = (image_dir().join("vmlinux"), image_dir().join("initramfs"));
    for (key, file) in [("kernel", &kernel), ("initramfs", &initramfs)] {
        let missing = format!("/no/such/{key}");
        host.configure(&host.configuration().set(key, format!("{missing:?}")).to_text());
        refused(host, &format!("missing-{key}"), &[&missing, "No such file"]);

        let short = cut(file, 100, &directory.join(format!("short-{key}")));
        host.configure(&host.configuration().set(key, short).to_text());
        refused(host, &format!("short-{key}"), &[&format!("short-{key}")]);
    }
    let empty = directory.join("empty-kernel");
    fs::write(&empty, b"").expect("the test's directory takes files");
    host.configure(&host.configuration().set("kernel", format!("{empty:?}")).to_text());
    refused(host, "empty-kernel", &["empty-kernel"]);

    host.configure(&host.configuration().to_text());
    assert_eq!(host.container("good").run(&["echo", "good"]).succeeded(), "good\n");
}

fn configurations(host: &Host) {
    let good = host.configuration();
    host.configure(&good.clone().set("memory_mib", "8").to_text());
    refused(host, "little-memory", &["memory_mib", "8"]);
    host.configure(&good.clone().set("vcpus", "0").to_text());
    refused(host, "no-vcpu", &["vcpus", "0"]);
    let text = good.to_text() + "colour = \"grey\"\n";
    host.configure(&text);
    let line = format!("line {}", text.lines().count());
    refused(host, "unknown-key", &["colour", &line, "caisson.toml"]);
    host.configure("kernel = \n");
    refused(host, "not-toml", &["caisson.toml"]);
    host.configure(&good.set("monitor", "\"/no/such/monitor\"").to_text());
    refused(host, "no-monitor", &["/no/such/monitor"]);
}

fn an_unknown_runtime_option(host: &Host) {
    // containerd passes this on as options that the runtime does not know.
    let container = host.container("option").flag("--runtime-config-path").flag("/no/such/options");
    explained("option", &container.run(&["echo", "never"]), &["option"]);
    host.expect_nothing_left();

    let bundle = Bundle::new(host, "unknown-option", &bundle::specification(&["true"]).to_string());
    let shim = bundle.start().expect("the bundle is good");
    let options = Any { type_url: "example.com/of.nobody".to_owned(), value: vec![8, 1], ..Default::default() };
    let mut request = bundle.create_request(Vec::new());
    request.options = Some(options).into();
    let status = shim.call::<api::CreateTaskResponse>("Create", &request).expect_err("nobody knows the option");
    assert!(status.message().contains("of.nobody"), "{status:?}");
    assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT, "{status:?}");
    bundle.discard(Some(shim));
}

fn specifications(host: &Host) {
    let good = bundle::specification(&["true"]);
    let mut relative = good.clone();
    relative["process"]["cwd"] = "not/absolute".into();
    let mut without_program = good.clone();
    without_program["process"]["args"] = serde_json::json!([]);
    let cases = [
        ("not-json", "{ \"ociVersion\": ".to_owned(), "config.json"),
        ("wrong-type", good.to_string().replace("\"cwd\":\"/\"", "\"cwd\":7"), "config.json"),
        ("relative-cwd", relative.to_string(), "cwd"),
        ("no-arguments", without_program.to_string(), "args"),
    ];
    for (name, config, word) in cases {
        let bundle = Bundle::new(host, name, &config);
        let (message, shim) = match bundle.start() {
            Err(finished) => (finished.err(), None),
            Ok(shim) => {
                let rootfs = vec![bind(&bundle.directory)];
                let status = shim.call::<api::CreateTaskResponse>("Create", &bundle.create_request(rootfs));
                (status.expect_err(name).message().to_owned(), Some(shim))
            }
        };
        // runc has its own words for each of these.
        if host.runtime == Runtime::Caisson {
            assert!(message.contains(word), "{name}: no {word:?} in {message:?}");
        }
        assert!(!message.is_empty(), "{name}: refused without a word");
        bundle.discard(shim);
    }
}

fn a_root_that_cannot_be_mounted(host: &Host) {
    let unknown = api::Mount { type_: "nosuchfs".to_owned(), source: "none".to_owned(), ..Default::default() };
    let mounts = [("nowhere", bind(Path::new("/no/such/root"))), ("unknown", unknown)];
    for (name, mount) in mounts {
        let bundle = Bundle::new(host, name, &bundle::specification(&["true"]).to_string());
        let shim = bundle.start().expect("the bundle is good");
        let words = [mount.source.clone(), mount.type_.clone()];
        let status = shim.call::<api::CreateTaskResponse>("Create", &bundle.create_request(vec![mount]));
        let message = status.expect_err(name).message().to_owned();
        assert!(words.iter().any(|word| message.contains(word)) || message.contains("mount"), "{name}: {message:?}");
        bundle.discard(Some(shim));
    }
}

fn streams_that_are_not_there(host: &Host) {
    let bundle = Bundle::new(host, "no-fifo", &bundle::specification(&["true"]).to_string());
    let shim = bundle.start().expect("the bundle is good");
    let mut request = bundle.create_request(vec![bind(&bundle.directory)]);
    // A directory where the FIFO was: neither is there, nor can it be made.
    request.stdout = bundle.directory.join("gone/stdout").to_string_lossy().into_owned();
    let status = shim.call::<api::CreateTaskResponse>("Create", &request).expect_err("there is no such FIFO");
    if host.runtime == Runtime::Caisson {
        assert!(status.message().contains("gone/stdout"), "{status:?}");
    }
    bundle.discard(Some(shim));
}

fn a_client_that_vanishes(host: &Host) {
    // It never stops writing, so that its streams are full when the reader has gone.
    let pod = host.container("abandoned").start_ready("echo ready; while :; do echo more; done");
    let id = pod.id.clone();
    process::signal(pod.running.pid, rustix::process::Signal::KILL);
    drop(pod);
    host.ctr_output(["task", "kill", "--signal", "SIGKILL", &id]).succeeded();
    caisson_e2e::until("the abandoned task to be reported as stopped", STEP, || {
        let tasks = host.ctr_output(["task", "list"]).succeeded();
        tasks.lines().any(|line| line.contains(&id) && line.contains("STOPPED")).then_some(())
    });
    let deleted = host.ctr_output(["task", "delete", &id]);
    assert!(deleted.code == Some(0) && deleted.err().contains("exit code 137"), "{deleted:?}");
    host.ctr_output(["container", "delete", &id]).succeeded();
    host.expect_nothing_left();
}

fn no_space_for_files(host: &Host) {
    let finished = host
        .container("full")
        .sh("dd if=/dev/zero of=/big bs=1M count=100; echo dd ended with $?; rm /big; echo x > /small && cat /small");
    assert_eq!(finished.succeeded(), "dd ended with 1\nx\n");
    assert!(finished.err().contains("No space left on device"), "{finished:?}");
}

fn no_space_for_state(host: &Host) {
    let state = host.state_dir();
    let mount = |arguments: &[&str]| {
        let status = Command::new("mount").args(arguments).arg(&state).status().expect("mount is installed");
        assert!(status.success(), "mount {arguments:?}: {status}");
    };
    // One page, and that is taken.
    mount(&["-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs"]);
    fs::write(state.join("filler"), [0; 4096]).expect("it takes one page");
    let finished = host.container("full-state").run(&["echo", "never"]);
    let unmounted = Command::new("umount").arg(&state).status().expect("umount is installed");
    assert!(unmounted.success(), "something keeps {} busy", state.display());
    explained("full-state", &finished, &["No space left on device", &state.to_string_lossy()]);
    host.expect_nothing_left();
}

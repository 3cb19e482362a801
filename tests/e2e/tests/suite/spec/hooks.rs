//! Hooks: when they run, where, and what they are told.

use std::fs;

use caisson_e2e::{Host, Runtime, environment::bin_dir, spec::Given};
use serde_json::{Value, json};

caisson_e2e::for_each_runtime!(hooks);

fn hooks(host: &Host) {
    let given = Given::new(host, "hooks");
    let file = host.directory().join("hooks");
    let file_text = file.to_string_lossy();
    let program = bin_dir().join("caisson-e2e-probe");
    // Arguments begin with the program's own name, which is not its path's to say.
    let on_host = |name: &str| -> Value {
        let (args, env) = (["hook", "hook", &*file_text, name], [format!("NAME={name}")]);
        json!([{ "path": program, "args": args, "env": env, "timeout": 60 }])
    };
    let inside = json!([{ "path": "/bin/probe", "args": ["probe", "hook", "/hooks", "startContainer"] }]);
    let root = given.root.clone();
    let given = given
        .set("/annotations", json!({ "test.caisson/colour": "grey" }))
        .set("/hooks/prestart", on_host("prestart"))
        .set("/hooks/createRuntime", on_host("createRuntime"))
        .set("/hooks/startContainer", inside)
        .set("/hooks/poststart", on_host("poststart"))
        .set("/hooks/poststop", on_host("poststop"))
        .set("/process/args", json!(["/bin/probe", "lines", "1"]));
    let ended = given.run().expect("it is a good specification");
    assert_eq!((ended.status, &*ended.out), (0, "out 0\n"), "{ended:?}");
    let read = |path: &std::path::Path| -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.lines().map(|line| serde_json::from_str(line).expect("a hook's note is JSON")).collect()
    };
    let notes = read(&file);
    let names: Vec<&str> = notes.iter().filter_map(|note| note["name"].as_str()).collect();
    assert_eq!(names, ["prestart", "createRuntime", "poststart", "poststop"]);
    // runc 1.1 calls the container created until the program has run for a while.
    let started = match host.runtime {
        Runtime::Caisson => "running",
        Runtime::Runc => "created",
    };
    for (note, status) in notes.iter().zip(["creating", "creating", started, "stopped"]) {
        let state = &note["state"];
        assert_eq!(state["status"], status, "{note}");
        assert!(state["id"].as_str().is_some_and(|id| id.ends_with("-hooks")), "{note}");
        assert!(state["bundle"].as_str().is_some_and(|bundle| bundle.ends_with("-hooks")), "{note}");
        assert_eq!(state["annotations"]["test.caisson/colour"], "grey", "{note}");
        assert!(state["ociVersion"].is_string(), "{note}");
        assert!(state["pid"].as_u64().is_some_and(|pid| pid > 0) || status == "stopped", "{note}");
        assert_eq!(note["environment"]["NAME"], note["name"], "{note}");
    }
    // Network plugins run as such a hook, and configure the namespace of this pid: it must not be the host's.
    let of_host = fs::read_link("/proc/self/ns/net").expect("this is Linux");
    for note in &notes[..2] {
        let of_task = note["task_namespaces"]["net"].as_str().unwrap_or_else(|| panic!("no network namespace: {note}"));
        assert_ne!(of_task, of_host.to_string_lossy(), "{note}");
        assert_eq!(note["namespaces"]["net"], *of_host.to_string_lossy(), "{note}");
    }
    let notes = read(&root.join("hooks"));
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert_eq!(notes[0]["name"], "startContainer");
    assert!(["created", "creating"].contains(&notes[0]["state"]["status"].as_str().unwrap_or_default()), "{notes:?}");

    // One that fails ends the container before its program runs.
    let file = host.directory().join("failed-hooks");
    let failing = json!([{ "path": program, "args": ["hook", "no-such-command", file] }]);
    let refused = Given::new(host, "failing").set("/hooks/createRuntime", failing).run();
    let told = refused.expect_err("its hook fails");
    assert!(told.contains("hook"), "{told}");
}

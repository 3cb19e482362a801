//! What a container sees of itself, and what its neighbours feel of it.

use caisson_e2e::{Host, Runtime, wait::STEP};

caisson_e2e::for_each_runtime!(a_world_of_its_own, the_rights_of_the_specification);
caisson_e2e::caisson_only!(a_fork_bomb_next_door, a_memory_hog_next_door);

fn a_world_of_its_own(host: &Host) {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("this is Linux");
    let script =
        "echo $$; cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l; uname -r; hostname; touch /mine; ls /; echo ready; cat";
    let one = host.container("one").start_ready(script);
    let text = String::from_utf8(one.stdout().so_far()).expect("it is text");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1", "sh"], "its own first process: {text}");
    // sh, ls and wc at most: nothing of the host or of the guest's own processes.
    assert!(lines[2].parse::<u32>().is_ok_and(|count| count <= 4), "processes it sees: {text}");
    let same_kernel = lines[3] == kernel.trim();
    assert_eq!(same_kernel, host.runtime == Runtime::Runc, "its kernel is {}, the host's {kernel}", lines[3]);
    assert!(lines.contains(&"mine"), "{text}");

    // Another container of the same image: another root, and no sight of the first one's processes.
    let two = host.container("two").sh("ls /; cat /proc/[0-9]*/comm");
    let text = two.succeeded();
    assert!(text.lines().any(|line| line == "bin") && !text.lines().any(|line| line == "mine"), "{text}");
    assert!(!text.contains("sleep") && !text.contains("containerd"), "{text}");

    // A name given inside stays inside.
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("this is Linux");
    let named = host.container("named").flag("--privileged").sh("hostname of-its-own && hostname");
    assert_eq!(named.succeeded(), "of-its-own\n");
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").expect("this is Linux"), host_name);
    assert_eq!(one.end().code, Some(137));
}

/// What `ctr run` asks for by default, as the container finds it.
fn the_rights_of_the_specification(host: &Host) {
    let finished = host.container("rights").sh(
        "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; ulimit -n; ls /dev | grep -v core | xargs
         stat -c %t,%T /dev/null /dev/zero; cat /proc/timer_list | wc -c; ls /proc/acpi | wc -l
         touch /proc/sys/kernel/threads-max /sys/kernel/x; echo x > /proc/sys/vm/swappiness || echo refused
         mount -t tmpfs t /tmp 2>/dev/null || echo no mounts; wc -l < /proc/net/dev; df /dev/shm | tail -n 1 | cut -d' ' -f1",
    );
    let expected = "NoNewPrivs:\t1\nSeccomp:\t0\n1024\n\
        fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero\n1,3\n1,5\n0\n0\nrefused\nno mounts\n3\nshm\n";
    let caps = "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n";
    assert_eq!(finished.succeeded(), format!("{caps}{expected}"), "{}", finished.err());
}

fn a_fork_bomb_next_door(host: &Host) {
    let neighbour = host.container("neighbour").start_idle();
    // It says so when it can fork no more, and goes on trying.
    let bomb = host.container("bomb").start(&["sh", "-c", "b() { b | b & }; echo ready; b; while :; do b; done"]);
    bomb.running.stderr.wait_for("the bomb to reach a limit", STEP * 4, |text| text.contains("fork").then_some(()));
    assert_eq!(neighbour.exec("asked", &["echo", "still", "here"]).succeeded(), "still here\n");
    assert_eq!(bomb.end().code, Some(137));
    assert_eq!(neighbour.exec("again", &["echo", "unharmed"]).succeeded(), "unharmed\n");
    assert_eq!(neighbour.end().code, Some(137));
}

fn a_memory_hog_next_door(host: &Host) {
    let neighbour = host.container("neighbour").start_idle();
    // tail keeps the last line, and /dev/zero has no line's end: it takes all the memory there is.
    let hog = host.container("hog").sh("tail -n 1 /dev/zero; echo tail ended with $?");
    assert!(hog.out().contains("tail ended with 137") || hog.code == Some(137), "{hog:?}");
    assert_eq!(neighbour.exec("asked", &["echo", "still", "here"]).succeeded(), "still here\n");
    assert_eq!(neighbour.end().code, Some(137));
}

//! Real images, and what the operator reads in containerd's log.

use caisson_e2e::{Host, Setup, host::Image, until, wait::STEP};

caisson_e2e::for_each_runtime!(busybox_at_work);
caisson_e2e::caisson_only!(debian_at_work in Setup::default().image(Image::Debian), the_log_tells_where_the_time_went);

fn debian_at_work(host: &Host) {
    let mut pod = host.container("debian").start(&["bash"]);
    pod.running.write(b"apt list 2>/dev/null | grep -c ^base-files/; perl -e 'print 6 * 7, \"\\n\"'\n");
    pod.running.write(b"set -o pipefail; [[ $(< /etc/os-release) =~ Debian ]] && echo is Debian; exit 3\n");
    pod.running.close_stdin();
    let finished = pod.finish();
    assert_eq!(finished.code, Some(3), "{finished:?}");
    assert_eq!(finished.out(), "1\n42\nis Debian\n", "{finished:?}");
}

fn busybox_at_work(host: &Host) {
    let finished = host.container("busybox").flag("--env").flag("GREETING=hello").flag("--cwd").flag("/tmp").sh(
        "echo $GREETING; pwd; id -u; seq 1 100000 | awk '{ sum += $1 } END { print sum }'; touch here; ls; echo $PATH",
    );
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(finished.succeeded(), format!("hello\n/tmp\n0\n5000050000\nhere\n{path}\n"));
}

fn the_log_tells_where_the_time_went(host: &Host) {
    assert_eq!(host.container("timed").run(&["echo", "hello"]).succeeded(), "hello\n");
    let line = until("the pod's timeline in containerd's log", STEP, || {
        let log = host.containerd.log();
        log.lines().find(|line| line.contains("msg=\"pod timeline\"")).map(str::to_owned)
    });
    assert!(
        line.starts_with("time=\"20") && line.contains(" level=info ") && line.contains("component=shim"),
        "{line}"
    );
    let field = |name: &str| -> u64 {
        let value = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no number {name} in {line}"))
    };
    let stages = ["vmm_spawned_us", "vm_started_us", "agent_ready_us", "container_created_us", "container_started_us"];
    let times: Vec<u64> = stages.iter().map(|name| field(name)).collect();
    assert!(times.is_sorted() && times[0] > 0, "the stages do not follow each other: {line}");
    assert!(field("first_output_us") >= times[3], "output before the container was there: {line}");
}

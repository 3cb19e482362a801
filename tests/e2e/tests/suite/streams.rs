//! What goes in and comes out of a container: bytes, lines, exit codes, terminals.

use caisson_e2e::{
    Finished, Host, Setup,
    host::Image,
    process::Running,
    sizes,
    terminal::Terminal,
    wait::{STEP, long},
};

caisson_e2e::for_each_runtime!(
    exit_codes_and_bytes,
    codes_of_signals,
    much_through_stdin,
    lines_on_both_streams in Setup::default().image(Image::Probe),
    terminal_and_its_size,
);

fn exit_codes_and_bytes(host: &Host) {
    for code in [0, 1, 42] {
        let script = format!("printf 'out\\000\\377{code}'; printf 'err {code}\\n' >&2; exit {code}");
        let finished = host.container(&format!("exit-{code}")).sh(&script);
        assert_eq!(finished.code, Some(code), "{finished:?}");
        assert_eq!(finished.stdout, [b"out\0\xff".as_slice(), code.to_string().as_bytes()].concat());
        assert_eq!(finished.err(), format!("err {code}\n"));
    }
    // The shell's way of saying that a program does not exist.
    let finished = host.container("no-program-in-shell").sh("no-such-program");
    assert_eq!(finished.code, Some(127), "{finished:?}");
    // And the runtime's: the container never starts, and the message names the program.
    let finished = host.container("no-program").run(&["/no/such/program"]);
    assert!(finished.code != Some(0) && finished.stdout.is_empty(), "{finished:?}");
    assert!(finished.err().contains("/no/such/program"), "{finished:?}");
}

fn codes_of_signals(host: &Host) {
    let pod = host.container("signals").start_idle();
    let ended_by = |name: &str, signal: &str| {
        let sleeper = pod.exec_start(name, &["sh", "-c", "echo here; exec sleep 100000"]);
        sleeper.stdout.wait_for("the program's first line", STEP, |text| text.contains("here\n").then_some(()));
        pod.kill_exec(name, signal);
        Finished::of(sleeper, STEP).code
    };
    assert_eq!(ended_by("term", "SIGTERM"), Some(143));
    assert_eq!(ended_by("kill", "SIGKILL"), Some(137));
    assert_eq!(ended_by("usr1", "SIGUSR1"), Some(138));
    // A signal inside, told by the shell that waited for it.
    let finished = pod.exec("inside", &["sh", "-c", "sh -c 'kill -TERM $$'"]);
    assert_eq!(finished.code, Some(143), "{finished:?}");
    assert_eq!(pod.end().code, Some(137));
}

/// Bytes that neither repeat nor compress, the same for each run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn much_through_stdin(host: &Host) {
    let sent = noise(sizes::size(4, 64) * 1024 * 1024 + 17);
    let mut running = Running::start(&mut host.container("cat").command(&["cat"]));
    let mut stdin = running.stdin.take().expect("it is a pipe");
    let writer = {
        let sent = sent.clone();
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &sent))
    };
    let finished = Finished::of(running, long());
    writer.join().expect("the writer does not panic").expect("the container takes all of its input");
    assert_eq!(finished.code, Some(0), "{}", finished.err());
    assert_eq!(finished.stdout.len(), sent.len());
    assert!(finished.stdout == sent, "other bytes came back than were sent");
}

fn lines_on_both_streams(host: &Host) {
    let count = 5000;
    let finished = host.container("lines").run(&["/bin/probe", "lines", &count.to_string()]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let expected = |word: &str| (0..count).map(|index| format!("{word} {index}\n")).collect::<String>();
    assert!(
        finished.out() == expected("out"),
        "standard output has {} lines of {count}",
        finished.out().lines().count()
    );
    assert!(
        finished.err() == expected("err"),
        "standard error has {} lines of {count}",
        finished.err().lines().count()
    );
}

fn terminal_and_its_size(host: &Host) {
    let container = host.container("terminal").flag("--tty");
    let mut terminal = Terminal::start(&container.command(&["sh"]), 91, 27);
    let shows = |terminal: &Terminal, text: &str| {
        terminal.screen().wait_for(&format!("{text:?}"), STEP, |screen| screen.contains(text).then_some(()));
    };
    shows(&terminal, "# ");
    // Written apart, so that the echo of what is typed is not taken for the answer.
    terminal.type_in("test -t 0 -a -t 1 -a -t 2 && echo is-a-'term'inal; stty size\n");
    shows(&terminal, "is-a-terminal");
    shows(&terminal, "27 91");
    terminal.resize(123, 45);
    // The change travels on its own way beside the keys: asked until it has arrived.
    terminal.type_in("until stty size | grep -q '45 123'; do sleep 0.1; done; echo resi'zed'\n");
    shows(&terminal, "resized");
    terminal.type_in("exit 9\n");
    assert_eq!(terminal.running.wait(STEP).code(), Some(9));
}

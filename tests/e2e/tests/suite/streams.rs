//! What goes in and comes out of a container: bytes, lines, exit codes, terminals.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    process::Stdio,
    thread,
    time::Duration,
};

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
    short_inputs_of_execs,
    a_reader_that_pauses,
);
// containerd 1.6's own shim waits for ever in these cases, if the input is read to its end before Create or Exec is answered.
caisson_e2e::caisson_only!(short_inputs, no_input);

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
        thread::spawn(move || stdin.write_all(&sent))
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

/// An input that is there as a whole, and over, from the beginning.
fn over(bytes: &[u8]) -> Stdio {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).and_then(|()| file.rewind()).expect("it is written");
    file.into()
}

/// Nothing, a byte, what a FIFO holds, and much more.
const SIZES: [usize; 4] = [0, 1, 64 << 10, 3 << 20];

fn same(finished: &Finished, sent: &[u8]) {
    assert_eq!(finished.code, Some(0), "{} bytes in: {finished:?}", sent.len());
    assert!(finished.stdout == sent, "{} bytes in, {} bytes out", sent.len(), finished.stdout.len());
}

fn short_inputs_of_execs(host: &Host) {
    let pod = host.container("fed").start_idle();
    for size in SIZES.into_iter().skip(1) {
        let sent = noise(size);
        let running = Running::start_with(&mut pod.exec_command(&format!("in-{size}"), &[], &["cat"]), over(&sent));
        same(&Finished::of(running, STEP), &sent);
    }
    // Closed later, after a part was seen to arrive.
    let mut running = pod.exec_start("later", &["cat"]);
    running.write(b"a\n");
    running.stdout.wait_for("what was written", STEP, |text| text.contains("a\n").then_some(()));
    running.write(b"b\n");
    running.close_stdin();
    same(&Finished::of(running, STEP), b"a\nb\n");
    pod.end();
}

fn short_inputs(host: &Host) {
    for size in SIZES {
        let sent = noise(size);
        let mut command = host.container(&format!("run-{size}")).command(&["cat"]);
        same(&Finished::of(Running::start_with(&mut command, over(&sent)), long()), &sent);
    }
}

fn no_input(host: &Host) {
    let null = || Stdio::from(File::open("/dev/null").expect("it is there"));
    same(&Finished::of(Running::start_with(&mut host.container("null").command(&["cat"]), null()), long()), b"");
    let pod = host.container("fed").start_idle();
    let running = Running::start_with(&mut pod.exec_command("null", &[], &["cat"]), null());
    same(&Finished::of(running, STEP), b"");
    pod.end();
}

fn a_reader_that_pauses(host: &Host) {
    let mut command = host.container("paused").command(&["seq", "1", "60000"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("ctr starts");
    let mut stdout = child.stdout.take().expect("it is a pipe");
    let mut text = vec![0; 10];
    stdout.read_exact(&mut text).expect("the first lines come");
    // The program is done long before; what it has written waits for its reader.
    thread::sleep(Duration::from_secs(4));
    stdout.read_to_end(&mut text).expect("the rest comes");
    assert!(child.wait().expect("ctr ends").success());
    let expected: String = (1..=60000).map(|number| format!("{number}\n")).collect();
    assert!(text == expected.as_bytes(), "{} bytes of {}", text.len(), expected.len());
}

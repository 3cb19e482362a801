//! Standard input, in every size and order of a client's steps: none of it is lost, and its end arrives. See `streams` for
//! inputs that come through `ctr` as they are.

use std::{fs::File, io::Write, path::PathBuf, thread};

use caisson_e2e::{
    Finished, Host,
    bundle::fifo,
    direct::Direct,
    process::Capture,
    sizes,
    task::Streams,
    terminal::Terminal,
    wait::{STEP, long},
};
use sha2::{Digest, Sha256};

caisson_e2e::for_each_runtime!(of_containers_by_hand, of_execs_by_hand, of_a_terminal, of_a_terminal_of_an_exec);

/// When the client ends its input, and when it calls CloseIO.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// All at once; CloseIO when it is written.
    AtOnce,
    /// CloseIO as soon as the client has opened its end, while it is still writing.
    CloseFirst,
    /// A part, which is seen to come back; then the rest, and the end.
    Later,
}

const ORDERS: [Order; 3] = [Order::AtOnce, Order::CloseFirst, Order::Later];
const SIZES: [usize; 4] = [0, 1, 64 << 10, 3 << 20];

/// Letters that do not repeat soon.
fn letters(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let letter = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        b"abcdefghijklmnopqrstuvwxyzABCDEF"[(state >> 20) as usize % 32]
    };
    (0..length).map(letter).collect()
}

/// FIFOs of one process.
struct Client {
    stdin: PathBuf,
    streams: Streams,
    output: Capture,
}

impl Client {
    fn new(pod: &Direct, name: &str) -> Self {
        let stdin = pod.bundle.directory.join(format!("{name}.stdin"));
        fifo(&stdin);
        let (stdout, output) = pod.output(&format!("{name}.stdout"));
        // runc's shim does without all streams or without none.
        let (stderr, _) = pod.output(&format!("{name}.stderr"));
        let streams = Streams { stdin: stdin.clone(), stdout, stderr, terminal: false };
        Self { stdin, streams, output }
    }

    /// Writes the input of a process that has just been started, `close` being its CloseIO, and returns its output.
    fn write_input(self, sent: &[u8], order: Order, close: impl Fn()) -> Vec<u8> {
        let first = if matches!(order, Order::Later) { sent.len() / 2 } else { sent.len() };
        let (stdin, all) = (self.stdin, sent.to_vec());
        let (tell, go_on) = std::sync::mpsc::channel();
        let (opened, is_open) = std::sync::mpsc::channel();
        let writer = thread::spawn(move || {
            let mut stdin = File::options().write(true).open(stdin)?;
            let _ = opened.send(());
            stdin.write_all(&all[..first])?;
            let _ = go_on.recv();
            stdin.write_all(&all[first..])
        });
        match order {
            Order::CloseFirst => {
                is_open.recv_timeout(STEP).expect("the shim opens the FIFO, too");
                close();
            }
            Order::AtOnce => {}
            Order::Later => {
                let here = |text: &str| (text.len() >= first).then_some(());
                self.output.wait_for("the first half", STEP, here);
            }
        }
        let _ = tell.send(());
        writer.join().expect("it does not panic").expect("the process takes its input");
        if !matches!(order, Order::CloseFirst) {
            close();
        }
        self.output.wait_for_end("standard output", STEP)
    }
}

#[track_caller]
fn same(order: Order, sent: &[u8], came: &[u8]) {
    assert!(came == sent, "{order:?}: {} bytes in, {} bytes out", sent.len(), came.len());
}

fn of_execs_by_hand(host: &Host) {
    let pod = Direct::start(host, "execs", &["sleep", "100000"]);
    pod.run();
    for order in ORDERS {
        for size in SIZES {
            let (name, sent) = (format!("{order:?}-{size}").to_lowercase(), letters(size));
            let client = Client::new(&pod, &name);
            pod.task.exec(&name, &["cat"], &client.streams).expect("Exec");
            pod.task.start(&name).expect("Start of an exec");
            let came = client.write_input(&sent, order, || pod.task.close_stdin(&name).expect("CloseIO"));
            same(order, &sent, &came);
            assert_eq!(pod.task.wait(&name).expect("Wait"), 0, "{name}");
            pod.task.delete(&name).expect("Delete");
        }
    }
    pod.kill_and_delete();
    pod.end();
}

fn of_containers_by_hand(host: &Host) {
    // Every day each size and each order once, in full size all pairs.
    for (index, order) in ORDERS.into_iter().cycle().take(12).enumerate() {
        if !sizes::full() && index >= 4 {
            break;
        }
        let sent = letters(SIZES[index % 4]);
        let pod = Direct::start(host, &format!("cat-{index}"), &["cat"]);
        let client = Client::new(&pod, "cat");
        pod.create(&client.streams).expect("Create");
        pod.task.start("").expect("Start");
        let came = client.write_input(&sent, order, || pod.task.close_stdin("").expect("CloseIO"));
        same(order, &sent, &came);
        assert_eq!(pod.task.wait("").expect("Wait"), 0, "{order:?}");
        assert_eq!(pod.task.delete("").expect("Delete"), 0, "{order:?}");
        pod.end();
    }
}

/// Takes `length` bytes of a terminal in raw mode, as editors and file transfers do.
fn script(length: usize) -> String {
    format!("stty raw -echo; echo rea''dy; head -c {length} | sha256sum; stty sane; echo over; cat > /dev/null")
}

/// Types `length` letters into a terminal that runs [`script`], and then its end of input (Control-D at a line's beginning).
fn types(mut terminal: Terminal, length: usize) {
    terminal.screen().wait_for("a terminal in raw mode", STEP, |text| text.contains("ready").then_some(()));
    let sent = letters(length);
    terminal.type_in(&String::from_utf8_lossy(&sent));
    let hash: String = Sha256::digest(&sent).iter().map(|byte| format!("{byte:02x}")).collect();
    terminal.screen().wait_for("the hash of what was typed", long(), |text| {
        assert!(!text.contains("over") || text.contains(&hash), "another hash than {hash}: {text}");
        text.contains(&hash).then_some(())
    });
    terminal.screen().wait_for("the terminal as it was", STEP, |text| text.contains("over").then_some(()));
    terminal.type_in("\x04");
    assert_eq!(terminal.running.wait(STEP).code(), Some(0), "{length} bytes");
}

fn terminal_sizes() -> Vec<usize> {
    if sizes::full() { SIZES.to_vec() } else { vec![0, 1, 64 << 10] }
}

fn of_a_terminal(host: &Host) {
    let length = sizes::size(64 << 10, 3 << 20);
    let container = host.container("typed").flag("--tty");
    types(Terminal::start(&container.command(&["sh", "-c", &script(length)]), 80, 24), length);
    // Ended at once.
    let container = host.container("ended").flag("--tty");
    let mut terminal = Terminal::start(&container.command(&["sh", "-c", "echo rea''dy; cat; exit 5"]), 80, 24);
    terminal.screen().wait_for("its first line", STEP, |text| text.contains("ready").then_some(()));
    terminal.type_in("\x04");
    assert_eq!(terminal.running.wait(STEP).code(), Some(5));
}

fn of_a_terminal_of_an_exec(host: &Host) {
    let pod = host.container("pod").start_idle();
    for length in terminal_sizes() {
        let command = pod.exec_command(&format!("typed-{length}"), &["--tty"], &["sh", "-c", &script(length)]);
        types(Terminal::start(&command, 80, 24), length);
    }
    assert_eq!(pod.exec("after", &["echo", "still", "here"]).succeeded(), "still here\n");
    let finished: Finished = pod.end();
    assert_eq!(finished.code, Some(137));
}

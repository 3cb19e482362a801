use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

fn fifo(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path.display().to_string()
}

async fn open(stdio: &Stdio) -> Result<Opened, StdioError> {
    let host = HostView::here().unwrap();
    let log = caisson_log::logger("shim", io::sink(), slog::Level::Debug);
    Opened::open(stdio, Place { owner: Owner { id: "one", namespace: "ns" }, host: &host, log }).await
}

/// With the far ends of its streams, stdin first.
async fn connected(stdio: &Stdio) -> (Connected, Vec<UnixStream>) {
    let opened = open(stdio).await.unwrap();
    let mut guest = Vec::new();
    let mut pair = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.push(theirs);
        ours
    };
    let connected = Connected {
        ports: agent::Stdio::new(),
        stdin: opened.stdin.map(|fifo| Input::new(fifo, pair(), stdio.terminal)),
        outputs: opened.outputs.map(|output| output.map(|sink| (sink, pair()))),
        loggers: opened.loggers,
        log: opened.log,
    };
    (connected, guest)
}

/// A client that opens the FIFO as soon as there is a reader.
async fn writer(path: &str) -> Sender {
    let opened = async {
        loop {
            match OpenOptions::new().open_sender(path) {
                Ok(sender) => return sender,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    timeout(LIMIT, opened).await.expect("somebody opens the FIFO for reading")
}

/// A process with nothing but its input: the directory of its FIFO, the FIFO, its copies and the guest's end.
async fn with_input() -> (tempfile::TempDir, String, Copies, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdin: fifo(directory.path(), "in"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    (directory, stdio.stdin, connected.copy(None), guest.remove(0))
}

async fn all(mut guest: UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(LIMIT, guest.read_to_end(&mut bytes)).await.expect("the input ends").unwrap();
    bytes
}

/// A client in a thread of its own that waits in open(2), as containerd's do, writes and closes.
fn client(path: &str, bytes: &[u8]) -> std::thread::JoinHandle<()> {
    let (path, bytes) = (path.to_owned(), bytes.to_vec());
    std::thread::spawn(move || {
        let mut fifo = File::options().write(true).open(path).unwrap();
        std::io::Write::write_all(&mut fifo, &bytes).unwrap();
    })
}

/// When a client calls CloseIO.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Close {
    BeforeStart,
    AtOnce,
    AfterTheWriter,
}

#[tokio::test]
async fn every_length_of_input_arrives_and_ends_whenever_close_io_comes() {
    for length in [0, 1, 64 * 1024, 3 << 20] {
        for close in [Close::BeforeStart, Close::AtOnce, Close::AfterTheWriter] {
            for is_init in [true, false] {
                let (_directory, fifo, copies, guest) = with_input().await;
                let sent = numbers(1 << 20);
                let sent = &sent[..length];
                let client = client(&fifo, sent);
                if is_init {
                    copies.open_input();
                }
                if close == Close::BeforeStart {
                    copies.close_stdin();
                }
                copies.start_input_within(LIMIT);
                if close == Close::AtOnce {
                    copies.close_stdin();
                }
                let got = tokio::spawn(all(guest));
                tokio::task::spawn_blocking(move || client.join().unwrap()).await.unwrap();
                if close == Close::AfterTheWriter {
                    copies.close_stdin();
                }
                assert!(got.await.unwrap() == sent, "{length} bytes, {close:?}, init: {is_init}");
            }
        }
    }
}

#[tokio::test]
async fn input_that_ended_before_start_needs_no_close_io() {
    for length in [0, 1, 60 * 1024] {
        let (_directory, fifo, copies, guest) = with_input().await;
        let client = client(&fifo, &vec![7; length]);
        copies.open_input();
        client.join().unwrap();
        copies.start_input_within(LIMIT);
        assert_eq!(all(guest).await.len(), length);
    }
}

/// `ctr … </dev/null`: the client has closed the FIFO before anybody opened it, and calls nothing.
#[tokio::test]
async fn input_that_nobody_opens_ends() {
    for is_init in [true, false] {
        let (_directory, _fifo, copies, guest) = with_input().await;
        if is_init {
            copies.open_input();
        }
        copies.start_input_within(Duration::from_millis(1));
        assert_eq!(all(guest).await, b"");
    }
}

#[tokio::test]
async fn an_open_but_silent_writer_keeps_the_input_open() {
    let (_directory, fifo, copies, mut guest) = with_input().await;
    copies.open_input();
    let mut client = writer(&fifo).await;
    copies.start_input_within(Duration::from_millis(1));
    assert!(
        timeout(Duration::from_millis(50), guest.read(&mut [0; 1])).await.is_err(),
        "nothing came and nothing ended"
    );
    client.write_all(b"late").await.unwrap();
    drop(client);
    copies.close_stdin();
    assert_eq!(all(guest).await, b"late");
}

#[tokio::test]
async fn a_name_that_the_client_removed_is_still_its_fifo() {
    let (_directory, fifo, copies, guest) = with_input().await;
    copies.open_input();
    let mut client = writer(&fifo).await;
    fs::remove_file(&fifo).unwrap();
    copies.start_input();
    client.write_all(b"hello").await.unwrap();
    drop(client);
    copies.close_stdin();
    assert_eq!(all(guest).await, b"hello");
}

/// The limit counts from the last byte that the reader took.
#[tokio::test]
async fn output_is_waited_for_as_long_as_its_reader_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let mut reader = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
    let copies = connected.copy(None);
    let sent = vec![5; 1 << 20];
    let mut out = guest.remove(0);
    let writer = tokio::spawn(async move { out.write_all(&sent).await });
    let stall = Duration::from_secs(2);
    let drained = tokio::spawn(copies.drained(stall.into()));
    // One byte at a time, far slower than the limit in all: less than a page at a time makes no room for the writer.
    for _ in 0..15 {
        reader.read_exact(&mut [0; 1]).await.unwrap();
        tokio::time::sleep(stall / 10).await;
    }
    assert!(!drained.is_finished(), "the reader goes on");
    let mut rest = vec![0; (1 << 20) - 15];
    timeout(LIMIT, reader.read_exact(&mut rest)).await.expect("all of it").unwrap();
    writer.await.unwrap().unwrap();
    assert!(timeout(LIMIT, drained).await.expect("it ends").unwrap(), "nothing was given up");
}

/// Bytes in which each place can be told from every other.
fn numbers(count: u32) -> Vec<u8> {
    (0..count).flat_map(u32::to_le_bytes).collect()
}

#[tokio::test]
async fn input_ends_only_after_close_io_and_the_clients_own_close() {
    let (_directory, fifo, copies, mut guest) = with_input().await;
    copies.start_input();
    let mut client = writer(&fifo).await;
    client.write_all(b"one").await.unwrap();
    drop(client);
    let mut buffer = [0; 16];
    assert_eq!(guest.read(&mut buffer).await.unwrap(), 3);
    // A second client may come, because nobody has said that the input is over.
    let mut client = OpenOptions::new().open_sender(&fifo).unwrap();
    copies.close_stdin();
    client.write_all(b"two").await.unwrap();
    drop(client);
    let mut text = String::new();
    timeout(LIMIT, guest.read_to_string(&mut text)).await.expect("end of input").unwrap();
    assert_eq!(text, "two");
}

#[tokio::test]
async fn output_arrives_whole_and_the_fifo_closes_after_it() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
    // Opened before the reader: must not wait for it.
    let (connected, mut guest) = connected(&stdio).await;
    let path = stdio.stdout.clone();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    });
    let seen = Arc::new(Mutex::new(0));
    let count = Arc::clone(&seen);
    let copies = connected.copy(Some(Arc::new(move || *count.lock().unwrap() += 1)));
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut guest = guest.remove(0);
    timeout(LIMIT, guest.write_all(&sent)).await.expect("the reader reads").unwrap();
    drop(guest);
    assert!(copies.drained(LIMIT.into()).await);
    assert_eq!(reader.join().unwrap(), sent);
    assert_eq!(*seen.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_reader_that_stalls_stops_its_own_writer_only_and_then_gets_everything() {
    let directory = tempfile::tempdir().unwrap();
    let stdio =
        Stdio { stdout: fifo(directory.path(), "out"), stderr: fifo(directory.path(), "err"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let mut reader = OpenOptions::new().open_receiver(&stdio.stderr).unwrap();
    let copies = connected.copy(None);
    let (mut out, mut err) = (guest.remove(0), guest.remove(0));
    let sent = numbers(1 << 20);
    let expected = sent.clone();
    let stalled = tokio::spawn(async move { out.write_all(&sent).await });
    for _ in 0..100 {
        timeout(LIMIT, err.write_all(&[2; 1000])).await.expect("stderr flows").unwrap();
        let mut bytes = [0; 1000];
        timeout(LIMIT, reader.read_exact(&mut bytes)).await.expect("stderr arrives").unwrap();
    }
    assert!(!stalled.is_finished());
    assert!(!copies.drained(Duration::from_millis(10).into()).await, "the stalled stream is not drained");
    let mut late = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
    let mut got = vec![0; expected.len()];
    timeout(LIMIT, late.read_exact(&mut got)).await.expect("stdout arrives").unwrap();
    assert!(got == expected, "whole and in order");
    stalled.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reader_that_leaves_and_comes_back_misses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let _copies = connected.copy(None);
    let sent = numbers(1 << 18);
    let expected = sent.clone();
    let mut out = guest.remove(0);
    let writer = tokio::spawn(async move { out.write_all(&sent).await });
    let mut got = Vec::new();
    // As often as containerd is restarted while the container writes.
    for _ in 0..4 {
        let mut reader = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
        let mut bytes = vec![0; expected.len() / 4];
        timeout(LIMIT, reader.read_exact(&mut bytes)).await.expect("it arrives").unwrap();
        got.extend(bytes);
    }
    assert!(got == expected, "whole and in order");
    timeout(LIMIT, writer).await.expect("it is all taken").unwrap().unwrap();
}

#[tokio::test]
async fn output_is_appended_to_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b c/log");
    let uri = format!("file://{}", path.display().to_string().replace(' ', "%20"));
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
    for _ in 0..2 {
        let (connected, mut guest) = connected(&stdio).await;
        let copies = connected.copy(None);
        let mut out = guest.remove(0);
        out.write_all(b"out\n").await.unwrap();
        guest.remove(0).write_all(b"err\n").await.unwrap();
        drop(out);
        assert!(copies.drained(LIMIT.into()).await);
    }
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "err", "out", "out"], "nothing was overwritten");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o644, 0o755));
    // A plain path to a file that is there is appended to as well.
    let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let copies = connected.copy(None);
    guest.remove(0).write_all(b"more\n").await.unwrap();
    assert!(copies.drained(LIMIT.into()).await);
    assert_eq!(fs::read_to_string(&path).unwrap().lines().last(), Some("more"));
}

#[tokio::test]
async fn a_file_that_takes_no_more_ends_the_stream_and_no_other() {
    let stdio = Stdio { stdout: "file:///dev/full".into(), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let _copies = connected.copy(None);
    let mut out = guest.remove(0);
    let refused = timeout(LIMIT, async { while out.write_all(&[0; 4096]).await.is_ok() {} });
    refused.await.expect("the writer in the guest gets the error");
}

#[tokio::test]
async fn one_logger_gets_both_streams_and_is_ended_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("logger");
    let here = directory.path().display();
    let script = format!("#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >> {here}/out; /bin/cat <&4 >> {here}/err\n");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?a=b", program.display());
    for stderr in ["", uri.as_str()] {
        let stdio = Stdio { stdout: uri.clone(), stderr: stderr.to_owned(), ..Stdio::default() };
        let (connected, mut guest) = connected(&stdio).await;
        let copies = connected.copy(None);
        assert_eq!((copies.loggers(), guest.len()), (1, 2));
        guest[0].write_all(b"out").await.unwrap();
        guest[1].write_all(b"err").await.unwrap();
        guest.clear();
        assert!(copies.drained(LIMIT.into()).await);
        let log = caisson_log::logger("shim", io::sink(), slog::Level::Debug);
        timeout(LIMIT, copies.end(&log)).await.expect("the logger ends");
    }
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!((read("out"), read("err")), ("outout".into(), "errerr".into()));
    let terminal = Stdio { stdout: uri, terminal: true, ..Stdio::default() };
    assert_eq!(connected(&terminal).await.1.len(), 1, "a terminal has one stream");
}

#[tokio::test]
async fn what_cannot_be_opened_is_refused_by_name() {
    let missing = Stdio { stdout: "/no/such/fifo".into(), ..Stdio::default() };
    let message = open(&missing).await.unwrap_err().to_string();
    assert!(message.starts_with("cannot open the stdout FIFO /no/such/fifo: "), "{message}");
    let uri = Stdio { stderr: "http:///x".into(), ..Stdio::default() };
    assert!(open(&uri).await.unwrap_err().to_string().starts_with("stderr: http:///x: the scheme http"));
    let unmade = Stdio { stdout: "file:///proc/no/log".into(), ..Stdio::default() };
    let message = open(&unmade).await.unwrap_err().to_string();
    assert!(message.starts_with("cannot open the stdout file \"/proc/no/log\": "), "{message}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let regular = Stdio { stdin: file.display().to_string(), ..Stdio::default() };
    assert!(open(&regular).await.is_err(), "input comes from a FIFO only");
}

#[tokio::test]
async fn unread_output_is_waited_for_and_what_somebody_may_still_write_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let copies = connected.copy(None);
    let mut reader = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
    let mut out = guest.remove(0);
    // More than the FIFO holds.
    out.write_all(&[1; 100 << 10]).await.unwrap();
    let patience = Patience { writer: Duration::ZERO, ..LIMIT.into() };
    let read = tokio::spawn(copies.drained(patience));
    let mut byte = [0];
    reader.read_exact(&mut byte).await.unwrap();
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!read.is_finished(), "the rest is unread");
    let mut rest = vec![0; (100 << 10) - 1];
    timeout(LIMIT, reader.read_exact(&mut rest)).await.expect("it arrives").unwrap();
    timeout(LIMIT, read).await.expect("nothing more is on its way").unwrap();
    // Nobody reads at all: not for ever, and not a second time.
    out.write_all(&[1; 100 << 10]).await.unwrap();
    let patience = Patience { reader: Duration::from_millis(100), ..LIMIT.into() };
    assert!(!timeout(LIMIT, copies.drained(patience)).await.expect("it is given up"));
    assert!(!timeout(LIMIT, copies.drained(Duration::MAX.into())).await.expect("it is given up"));
}

#[tokio::test]
async fn a_terminals_input_waits_for_its_client() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdin: fifo(directory.path(), "in"), terminal: true, ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let copies = connected.copy(None);
    copies.open_input();
    copies.start_input_within(Duration::ZERO);
    for word in [b"one", b"two"] {
        let path = stdio.stdin.clone();
        let opened = tokio::task::spawn_blocking(move || File::options().write(true).open(path).unwrap());
        std::io::Write::write_all(&mut opened.await.unwrap(), word).unwrap();
        let mut buffer = [0; 3];
        timeout(LIMIT, guest[0].read_exact(&mut buffer)).await.expect("it arrives").unwrap();
        assert_eq!(&buffer, word);
    }
}

/// An exec's program has ended, and what it has left running goes on writing to a reader that goes on reading.
#[tokio::test]
async fn output_that_never_ends_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let stdio = Stdio { stdout: fifo(directory.path(), "out"), ..Stdio::default() };
    let (connected, mut guest) = connected(&stdio).await;
    let copies = connected.copy(None);
    let mut reader = OpenOptions::new().open_receiver(&stdio.stdout).unwrap();
    let mut out = guest.remove(0);
    let writer = tokio::spawn(async move { while out.write_all(&[1; 100]).await.is_ok() {} });
    let reader = tokio::spawn(async move { while reader.read_exact(&mut [0; 100]).await.is_ok() {} });
    let patience = Patience { total: Duration::from_millis(200), ..LIMIT.into() };
    assert!(!timeout(LIMIT, copies.drained(patience)).await.expect("it is given up"));
    assert!(!timeout(LIMIT, copies.drained(LIMIT.into())).await.expect("it is not waited for again"));
    writer.abort();
    reader.abort();
}

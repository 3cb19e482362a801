//! Standard streams: pipes and terminals.

use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};
use ttrpc::Code;

use crate::support::{Pod, exec_shell, read_all, shell, spec, status, within};

async fn read_until(stream: &mut UnixStream, what: &str) -> String {
    let mut text = String::new();
    let reading = async {
        while !text.contains(what) {
            let mut bytes = [0; 4096];
            let length = stream.read(&mut bytes).await.unwrap();
            assert!(length > 0, "the stream ended before {what:?}: {text:?}");
            text.push_str(&String::from_utf8_lossy(&bytes[..length]));
        }
    };
    within(what, reading).await;
    text
}

#[tokio::test]
async fn sixty_four_mebibytes_go_through_cat_unchanged() {
    const SIZE: usize = 64 << 20;
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(false).await;
    pod.create("c", &spec(&["cat"]), Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut stdin = streams.stdin.unwrap();
    let sent = tokio::spawn(async move {
        let (mut hash, mut state) = (Sha256::new(), 1u64);
        let mut block = vec![0u8; 1 << 20];
        for _ in 0..SIZE / block.len() {
            for byte in &mut block {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *byte = (state >> 56) as u8;
            }
            hash.update(&block);
            stdin.write_all(&block).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
        hash.finalize()
    });
    let received = async {
        let (mut hash, mut total, mut block) = (Sha256::new(), 0, vec![0u8; 1 << 16]);
        let mut stdout = streams.stdout.unwrap();
        loop {
            let length = stdout.read(&mut block).await.unwrap();
            if length == 0 {
                return (total, hash.finalize());
            }
            hash.update(&block[..length]);
            total += length;
        }
    };
    let (total, hash) = within("64 MiB to come back", received).await;
    assert_eq!(total, SIZE);
    assert_eq!(hash, sent.await.unwrap());
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn ten_thousand_interleaved_lines_lose_none() {
    let pod = Pod::start().await;
    let script = "i=0; while [ $i -lt 10000 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done";
    let output = pod.run(&shell(script)).await;
    let expected = |letter| (0..10_000).map(|i| format!("{letter}{i}\n")).collect::<String>();
    assert!(output.stdout == expected('o'), "stdout differs");
    assert!(output.stderr == expected('e'), "stderr differs");
}

#[tokio::test]
async fn input_ends_by_half_close_before_and_after_start() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    for (exec, early) in [("early", true), ("late", false)] {
        let (stdio, streams) = pod.stdio(false).await;
        pod.exec("c", exec, &exec_shell("cat; echo end"), Some(stdio)).await.unwrap();
        let mut stdin = streams.stdin.unwrap();
        let mut send = async || {
            stdin.write_all(b"hello\n").await.unwrap();
            stdin.shutdown().await.unwrap();
        };
        if early {
            send().await;
        }
        pod.start_process("c", exec).await.unwrap();
        if !early {
            send().await;
        }
        assert_eq!(read_all(streams.stdout).await, "hello\nend\n", "{exec}");
        assert_eq!(pod.wait("c", exec).await.unwrap().exit_status, 0);
    }
}

#[tokio::test]
async fn a_background_process_holds_only_its_own_stream() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let (stdio, mut streams) = pod.stdio(false).await;
    pod.exec(
        "c",
        "e",
        &exec_shell("echo now; (sleep 1000 2>&1 >/dev/null) 2>/dev/null & sleep 1000 2>/dev/null & exit 6"),
        Some(stdio),
    )
    .await
    .unwrap();
    pod.start_process("c", "e").await.unwrap();
    assert_eq!(pod.wait("c", "e").await.unwrap().exit_status, 6);
    assert_eq!(read_all(streams.stderr.take()).await, "");
    let mut stdout = streams.stdout.take().unwrap();
    assert_eq!(read_until(&mut stdout, "now\n").await, "now\n");
    // stdout stays open until the background process ends.
    pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(read_all(Some(stdout)).await, "");
}

#[tokio::test]
async fn a_reader_that_stalls_stops_its_writer_and_nobody_else() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let (stdio, stalled) = pod.stdio(false).await;
    pod.exec("c", "y", &exec_shell("yes | head -c 16777216"), Some(stdio)).await.unwrap();
    pod.start_process("c", "y").await.unwrap();
    assert_eq!(pod.run_exec("c", "other", &exec_shell("echo free")).await.stdout, "free\n");
    assert_eq!(read_all(stalled.stdout).await.len(), 16 << 20);
}

#[tokio::test]
async fn a_reader_that_has_gone_ends_its_writer() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let (stdio, streams) = pod.stdio(false).await;
    // Not as init, which the kernel spares default actions.
    pod.exec("c", "e", &exec_shell("exec yes"), Some(stdio)).await.unwrap();
    pod.start_process("c", "e").await.unwrap();
    drop(streams);
    assert_eq!(pod.wait("c", "e").await.unwrap().exit_status, 128 + libc::SIGPIPE as u32);
}

#[tokio::test]
async fn output_can_be_opened_anew_by_the_user() {
    let pod = Pod::start().await;
    let mut spec = shell("echo a > /dev/stdout; echo b > /dev/stderr; read line < /dev/stdin; echo \"<$line>\"");
    spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000});
    let output = pod.run(&spec).await;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("a\n<>\n", "b\n"));
}

#[tokio::test]
async fn without_a_stream_a_descriptor_is_dev_null() {
    let pod = Pod::start().await;
    let (stdout_port, stdout) = pod.stream().await;
    let stdio = caisson_protos::agent::Stdio { stdout_port, ..Default::default() };
    pod.create("c", &shell("readlink /proc/self/fd/0; cat; echo x >&2 && echo ok"), Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    assert_eq!(read_all(Some(stdout)).await, "/dev/null\nok\n");
}

#[tokio::test]
async fn a_terminal_has_its_size_and_learns_of_a_new_one() {
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(true).await;
    let mut spec = shell(
        "test -t 0 && test -t 1 && test -t 2 && tty=yes; echo tty=$tty; stty size; \
                          trap 'stty size; exit 9' WINCH; echo ready; while :; do sleep 0.01; done",
    );
    spec["process"]["consoleSize"] = serde_json::json!({"width": 91, "height": 33});
    pod.create("c", &spec, Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut terminal = streams.stdout.unwrap();
    let text = read_until(&mut terminal, "ready\r\n").await;
    assert_eq!(text, "tty=yes\r\n33 91\r\nready\r\n");
    pod.resize("c", "", 120, 40).await.unwrap();
    assert_eq!(read_all(Some(terminal)).await, "40 120\r\n");
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 9);
}

#[tokio::test]
async fn a_terminal_carries_input_control_characters_and_output() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let (stdio, streams) = pod.stdio(true).await;
    pod.exec("c", "t", &exec_shell("stty -echo; echo ready; read line; echo \"got $line\"; cat"), Some(stdio))
        .await
        .unwrap();
    // Kept for the terminal that does not exist yet.
    pod.resize("c", "t", 20, 10).await.unwrap();
    pod.start_process("c", "t").await.unwrap();
    let (mut input, mut terminal) = (streams.stdin.unwrap(), streams.stdout.unwrap());
    read_until(&mut terminal, "ready\r\n").await;
    input.write_all(b"abc\n").await.unwrap();
    read_until(&mut terminal, "got abc\r\n").await;
    input.write_all(b"\x03").await.unwrap();
    assert_eq!(pod.wait("c", "t").await.unwrap().exit_status, 130);
    read_all(Some(terminal)).await;
}

#[tokio::test]
async fn the_console_is_the_terminal_and_the_terminal_is_the_containers_own() {
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(true).await;
    pod.create(
        "c",
        &shell("echo to-console > /dev/console; readlink /proc/self/fd/0; ls /dev/pts; echo -n > /dev/tty && echo tty"),
        Some(stdio),
    )
    .await
    .unwrap();
    pod.start_process("c", "").await.unwrap();
    assert_eq!(
        read_all(streams.stdout).await,
        "to-console\r\n/dev/pts/0\r\n0\r\nptmx\r\ntty\r\n".replace("\r\nptmx", "     ptmx")
    );
}

#[tokio::test]
async fn a_full_terminal_loses_nothing() {
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(true).await;
    pod.create("c", &spec(&["seq", "100000"]), Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let expected: String = (1..=100_000).map(|n| format!("{n}\r\n")).collect();
    assert!(read_all(streams.stdout).await == expected, "output differs");
}

#[tokio::test]
async fn streams_that_contradict_or_never_come_are_refused() {
    let pod = Pod::start().await;
    let stdio = |stdout_port, stderr_port, terminal| {
        Some(caisson_protos::agent::Stdio { stdout_port, stderr_port, terminal, ..Default::default() })
    };
    assert_eq!(status(pod.create("c", &spec(&["true"]), stdio(0, 7, true)).await).0, Code::INVALID_ARGUMENT);
    let (code, message) = status(pod.create("c", &spec(&["true"]), stdio(4242, 0, false)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("stdout") && message.contains("4242"), "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn a_stream_may_come_after_the_call_that_names_it() {
    let pod = Pod::start().await;
    // The first port that `stream` will use.
    let stdio = caisson_protos::agent::Stdio { stdout_port: 5000, ..Default::default() };
    let mut spec = shell("echo late");
    // So that there is a line in the log when the call is under way.
    spec["process"]["apparmorProfile"] = serde_json::json!("none");
    let create = pod.create("c", &spec, Some(stdio));
    let (created, (port, stdout)) = tokio::join!(create, async {
        while !pod.log().contains("apparmorProfile") {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        pod.stream().await
    });
    created.unwrap();
    assert_eq!(port, 5000);
    pod.start_process("c", "").await.unwrap();
    let mut line = String::new();
    within("a line", BufReader::new(stdout).read_line(&mut line)).await.unwrap();
    assert_eq!(line, "late\n");
}

//! Output through the whole shim: readers that stall, leave and come back, files, and logging programs.

use std::{fs, os::unix::fs::PermissionsExt};

use containerd_shim_protos::api::StateResponse;
use tokio::{io::AsyncReadExt, net::unix::pipe::OpenOptions, time::timeout};
use ttrpc::Code;

use crate::bench::{Bench, LIMIT, reader, refusal};

/// What `count` writes.
fn lines(count: u32) -> Vec<u8> {
    (0..count).flat_map(|line| format!("{line}\n").into_bytes()).collect()
}

#[tokio::test]
async fn a_stalled_reader_stalls_its_own_process_and_nothing_else() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["count", "200000"]);
    request.stdout = bench.fifo("out");
    let expected = lines(200_000);
    let mut stalled = OpenOptions::new().open_receiver(&request.stdout).unwrap();
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    for n in 0..5 {
        let (exec, stdout) = (format!("e{n}"), bench.fifo(&format!("e{n}")));
        let out = reader(&stdout);
        bench.exec("one", &exec, &["echo", "hello"], &stdout).await.unwrap();
        bench.start("one", &exec).await.unwrap();
        assert_eq!(out.await.unwrap(), b"hello\n");
    }
    let StateResponse { status, .. } = bench.state("one", "").await.unwrap();
    assert_eq!(status.unwrap(), containerd_shim_protos::api::Status::RUNNING, "its writer is blocked");
    let mut got = vec![0; expected.len()];
    timeout(LIMIT, stalled.read_exact(&mut got)).await.expect("it flows again").unwrap();
    assert!(got == expected, "whole and in order");
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn a_reader_that_is_restarted_reads_on_where_the_old_one_stopped() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["count", "100000"]);
    request.stdout = bench.fifo("out");
    let expected = lines(100_000);
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    let mut got = Vec::new();
    for _ in 0..2 {
        let mut reader = OpenOptions::new().open_receiver(&request.stdout).unwrap();
        let mut half = vec![0; expected.len() / 2];
        timeout(LIMIT, reader.read_exact(&mut half)).await.expect("it flows").unwrap();
        got.extend(half);
    }
    assert!(got == expected, "whole and in order");
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn output_goes_to_a_file() {
    let bench = Bench::new().await;
    let path = bench.path("logs/one");
    let mut request = bench.request("one", &["echo", "hello"]);
    (request.stdout, request.stderr) = (format!("file://{}", path.display()), format!("file://{}", path.display()));
    bench.create(&request).await.unwrap();
    assert_eq!(bench.state("one", "").await.unwrap().stdout, request.stdout);
    bench.start("one", "").await.unwrap();
    bench.wait("one", "").await.unwrap();
    bench.delete("one", "").await.unwrap();
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains("hello\n") && text.contains("to stderr\n"), "{text}");
}

#[tokio::test]
async fn a_logger_is_there_from_create_to_delete() {
    let bench = Bench::new().await;
    let (program, here) = (bench.path("logger"), bench.path("logged"));
    fs::create_dir(&here).unwrap();
    // What it was given is in its file before it says that it is ready, and what it was written to before it ends.
    let script = format!(
        "#!/bin/sh\nexec > {0}/$CONTAINER_ID\necho \"$CONTAINER_NAMESPACE $@\"; exec 5>&-\n/bin/cat <&3; /bin/cat <&4; echo end\n",
        here.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?k=v", program.display());
    let mut request = bench.request("one", &["echo", "hello"]);
    (request.stdout, request.stderr) = (uri.clone(), uri.clone());
    bench.create(&request).await.unwrap();
    let logged = |id: &str| fs::read_to_string(here.join(id)).unwrap();
    assert_eq!(logged("one"), "ns k v\n");
    // The exec first: it needs a container that has not ended.
    bench.exec("one", "x", &["echo", "exec"], &uri).await.unwrap();
    for exec in ["x", ""] {
        bench.start("one", exec).await.unwrap();
        bench.wait("one", exec).await.unwrap();
        bench.delete("one", exec).await.unwrap();
    }
    assert_eq!(logged("one"), "ns k v\nhello\nto stderr\nend\n");
    assert_eq!(logged("x"), "ns k v\nexec\nto stderr\nend\n");
}

/// A shim that is ended by SIGTERM has containers still.
#[tokio::test]
async fn the_end_of_a_pod_waits_for_its_loggers() {
    let bench = Bench::new().await;
    let (program, log) = (bench.path("logger"), bench.path("log"));
    let script = format!("#!/bin/sh\nexec 5>&-\n{{ /bin/cat <&3; /bin/sleep 0.2; echo end; }} > {}\n", log.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut request = bench.request("one", &["echo", "hello"]);
    request.stdout = format!("binary://{}", program.display());
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.wait("one", "").await.unwrap();
    timeout(LIMIT, bench.pod.shutdown(true)).await.expect("it ends");
    assert_eq!(fs::read_to_string(log).unwrap(), "hello\nend\n");
}

#[tokio::test]
async fn streams_that_cannot_be_had_are_refused_with_a_code() {
    let bench = Bench::new().await;
    for (uri, words) in [
        ("binary:///no/such/logger", "/no/such/logger"),
        ("http://x/", "the scheme http is not known"),
        ("file:///proc/no/log", "/proc/no/log"),
    ] {
        let mut request = bench.request("one", &["echo"]);
        request.stdout = uri.into();
        let message = refusal(bench.create(&request).await);
        assert!(message.0 == Code::INVALID_ARGUMENT && message.1.contains(words), "{message:?}");
    }
    assert_eq!(bench.shared(), Vec::<String>::new());
}

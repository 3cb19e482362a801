//! The task service over ttrpc, as containerd calls it, on a guest that is only played: verbs, refusals, events, streams, and
//! what is left when something fails.

mod bench;
mod containers;
mod guest;
mod host;
mod machine;
mod monitor;
mod network;
mod restart;
#[path = "../support/scratch.rs"]
mod scratch;
mod silence;
mod streams;

use bench::{Bench, LIMIT, reader, refusal, within};
use containerd_shim_protos::{
    api::{CloseIORequest, ConnectRequest, DeleteRequest, PidsRequest, ResizePtyRequest, ShutdownRequest, Status},
    shim::oci::ProcessDetails,
};
use protobuf::{Message, well_known_types::any::Any};
use tokio::{io::AsyncWriteExt, net::unix::pipe::OpenOptions, time::timeout};
use ttrpc::Code;

#[tokio::test]
async fn a_container_from_create_to_delete() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["echo", "hello", "pod"]);
    request.stdout = bench.fifo("out");
    request.stderr = bench.fifo("err");
    let (out, err) = (reader(&request.stdout), reader(&request.stderr));
    let pid = bench.create(&request).await.unwrap().pid;
    assert_eq!(bench.shared(), ["one"]);
    let state = bench.state("one", "").await.unwrap();
    assert_eq!(
        (state.status.unwrap(), state.bundle, state.stdout),
        (Status::CREATED, request.bundle.clone(), request.stdout.clone())
    );
    let waits = [bench.wait("one", ""), bench.wait("one", "")];
    assert_eq!(bench.start("one", "").await.unwrap().pid, pid);
    for wait in waits {
        let exit = wait.await.unwrap();
        assert_eq!(exit.exit_status, 0);
        assert!(exit.exited_at.seconds > 1_700_000_000, "the host's time, not the guest's");
    }
    assert_eq!((out.await.unwrap(), err.await.unwrap()), (b"hello pod\n".to_vec(), b"to stderr\n".to_vec()));
    assert_eq!(bench.state("one", "").await.unwrap().status.unwrap(), Status::STOPPED);
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 0, "however late");
    let deleted = bench.delete("one", "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (0, pid));
    assert_eq!(bench.shared(), Vec::<String>::new());
    assert_eq!(refusal(bench.delete("one", "").await).0, Code::NOT_FOUND);
    assert_eq!(refusal(bench.state("one", "").await), (Code::NOT_FOUND, "container one not created".into()));
    assert_eq!(bench.events().await, ["/tasks/create", "/tasks/start", "/tasks/exit one 0", "/tasks/delete"]);
    assert_eq!(*bench.guest.calls.lock().unwrap(), ["Create one/", "Start one/", "Delete one/"]);
}

#[tokio::test]
async fn input_flows_until_close_io() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["cat"]);
    (request.stdin, request.stdout) = (bench.fifo("in"), bench.fifo("out"));
    let out = reader(&request.stdout);
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    let sent: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let mut stdin = OpenOptions::new().open_sender(&request.stdin).unwrap();
    timeout(LIMIT, stdin.write_all(&sent)).await.expect("the guest reads").unwrap();
    drop(stdin);
    let close = CloseIORequest { id: "one".into(), stdin: true, ..CloseIORequest::default() };
    bench.task.close_io(within(), &close).await.unwrap();
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 0);
    assert_eq!(out.await.unwrap(), sent);
}

#[tokio::test]
async fn requests_that_do_not_fit_are_refused_with_their_code() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    assert_eq!(refusal(bench.create(&bench.request("one", &["sleep"])).await).0, Code::ALREADY_EXISTS);
    assert_eq!(refusal(bench.start("one", "x").await), (Code::NOT_FOUND, "process does not exist x".into()));
    assert_eq!(refusal(bench.wait("two", "").await).0, Code::NOT_FOUND);
    bench.start("one", "").await.unwrap();
    assert_eq!(
        refusal(bench.start("one", "").await),
        (Code::FAILED_PRECONDITION, "cannot start a running process".into())
    );
    assert_eq!(
        refusal(bench.delete("one", "").await),
        (Code::FAILED_PRECONDITION, "cannot delete a running process".into())
    );
    assert_eq!(refusal(bench.kill("one", "", 99).await).0, Code::INVALID_ARGUMENT);
    let resize = ResizePtyRequest { id: "one".into(), width: 80, height: 24, ..ResizePtyRequest::default() };
    bench.task.resize_pty(within(), &resize).await.expect("without a terminal there is nothing to do");
    bench.exec("one", "x", &["sleep"], "").await.unwrap();
    assert_eq!(refusal(bench.exec("one", "x", &["sleep"], "").await), (Code::ALREADY_EXISTS, "id x".into()));
    assert_eq!(refusal(bench.exec("one", "../x", &["sleep"], "").await).0, Code::INVALID_ARGUMENT);
    assert_eq!(refusal(bench.kill("one", "x", 9).await), (Code::FAILED_PRECONDITION, "process not created".into()));
    bench.kill("one", "", 15).await.unwrap();
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 143);
    assert_eq!(refusal(bench.kill("one", "", 15).await), (Code::NOT_FOUND, "process already finished".into()));
    assert_eq!(
        refusal(bench.exec("one", "y", &["sleep"], "").await),
        (Code::FAILED_PRECONDITION, "cannot exec in a stopped state".into())
    );
}

#[tokio::test]
async fn bad_creates_leave_nothing_and_do_not_take_the_name() {
    let bench = Bench::new().await;
    let good = bench.request("one", &["sleep"]);
    let mut unmountable = good.clone();
    unmountable.rootfs[0].type_ = "nosuchfs".into();
    unmountable.rootfs[0].options = vec!["ro".into(), "a=b".into()];
    let message = refusal(bench.create(&unmountable).await);
    assert_eq!(message.0, Code::FAILED_PRECONDITION);
    for word in ["\"nosuchfs\"", "bundles/one/layer", "ro,a=b"] {
        assert!(message.1.contains(word), "{}", message.1);
    }
    let mut vanished = good.clone();
    vanished.stdout = "/no/such/fifo".into();
    assert!(refusal(bench.create(&vanished).await).1.contains("stdout FIFO /no/such/fifo"));
    let mut options = good.clone();
    options.options = Some(Any { type_url: "x.Options".into(), value: vec![8, 1], ..Any::default() }).into();
    assert_eq!(refusal(bench.create(&options).await).0, Code::INVALID_ARGUMENT);
    let mut malformed = good.clone();
    malformed.bundle = "/no/such/bundle".into();
    assert!(refusal(bench.create(&malformed).await).1.contains("/no/such/bundle/config.json"));
    assert_eq!(bench.shared(), Vec::<String>::new());
    bench.create(&good).await.unwrap();
    assert_eq!(bench.events().await, ["/tasks/create"]);
}

#[tokio::test]
async fn a_program_that_is_missing_fails_start_and_can_be_deleted() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["missing"])).await.unwrap();
    let message = refusal(bench.start("one", "").await);
    assert_eq!(
        message,
        (Code::FAILED_PRECONDITION, "cannot start the container: exec: \"missing\": no such file".into())
    );
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 127);
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 127);
    assert_eq!(bench.events().await, ["/tasks/create", "/tasks/exit one 127", "/tasks/delete"]);
}

#[tokio::test]
async fn an_exit_that_overtakes_the_start_is_reported_behind_it() {
    let bench = Bench::new().await;
    for round in 0..10 {
        let id = format!("c{round}");
        bench.create(&bench.request(&id, &["quick"])).await.unwrap();
        bench.start(&id, "").await.unwrap();
        assert_eq!(bench.wait(&id, "").await.unwrap().exit_status, 7);
        bench.delete(&id, "").await.unwrap();
    }
    let events = bench.events().await;
    for (round, events) in events.chunks(4).enumerate() {
        let exit = format!("/tasks/exit c{round} 7");
        assert_eq!(events, ["/tasks/create", "/tasks/start", exit.as_str(), "/tasks/delete"]);
    }
    assert_eq!(events.len(), 40);
}

#[tokio::test]
async fn ten_execs_at_once_and_what_pids_says_of_them() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    let runs = (0..10).map(|n| {
        let (exec, bench) = (format!("e{n}"), &bench);
        async move {
            let stdout = bench.fifo(&exec);
            let out = reader(&stdout);
            bench.exec("one", &exec, &["echo", &exec], &stdout).await.unwrap();
            bench.start("one", &exec).await.unwrap();
            assert_eq!(bench.wait("one", &exec).await.unwrap().exit_status, 0);
            assert_eq!(out.await.unwrap(), format!("{exec}\n").into_bytes());
            let state = bench.state("one", &exec).await.unwrap();
            assert_eq!((state.id, state.status.unwrap()), (exec.clone(), Status::STOPPED));
        }
    });
    let runs: Vec<_> = runs.collect();
    let mut all = Vec::new();
    for run in runs {
        all.push(Box::pin(run));
    }
    join(all).await;
    let pids = PidsRequest { id: "one".into(), ..PidsRequest::default() };
    let pids = bench.task.pids(within(), &pids).await.unwrap();
    let mut named: Vec<String> = (pids.processes.iter())
        .filter_map(|process| process.info.as_ref())
        .map(|info| {
            assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
            ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id
        })
        .collect();
    named.sort();
    assert_eq!((pids.processes.len(), named), (11, (0..10).map(|n| format!("e{n}")).collect()));
    for n in 0..10 {
        bench.delete("one", &format!("e{n}")).await.unwrap();
    }
    let events = bench.events().await;
    assert_eq!(events.iter().filter(|event| event.starts_with("/tasks/exit e")).count(), 10);
}

/// Polls all to their end, in turn.
async fn join<F: Future<Output = ()> + Unpin>(mut all: Vec<F>) {
    std::future::poll_fn(|context| {
        all.retain_mut(|one| std::pin::Pin::new(one).poll(context).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test]
async fn a_lost_machine_ends_everything_and_the_reason_is_reported() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.exec("one", "x", &["sleep"], "").await.unwrap();
    bench.start("one", "x").await.unwrap();
    let waits = [bench.wait("one", ""), bench.wait("one", "x")];
    bench.lose_machine("the machine ended: triple fault");
    for wait in waits {
        assert_eq!(wait.await.unwrap().exit_status, 137);
    }
    assert_eq!(refusal(bench.exec("one", "y", &["sleep"], "").await).1, "cannot exec in a stopped state");
    assert_eq!(refusal(bench.kill("one", "", 9).await), (Code::NOT_FOUND, "process already finished".into()));
    assert_eq!(bench.delete("one", "x").await.unwrap().exit_status, 137);
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 137);
    assert_eq!(bench.shared(), Vec::<String>::new());
    let events = bench.events().await;
    let exits: Vec<_> = events.iter().filter(|event| event.contains("exit")).collect();
    assert_eq!(exits, ["/tasks/exit x 137", "/tasks/exit one 137"]);
}

#[tokio::test]
async fn an_agent_that_hangs_up_takes_its_machine_with_it() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    let (waited, ()) = tokio::join!(bench.wait("one", ""), async { bench.guest.hang_up.notify_waiters() });
    assert_eq!(waited.unwrap().exit_status, 137);
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_machine_that_never_comes_up_is_creates_error() {
    let bench = Bench::booting().await;
    let request = bench.request("one", &["sleep"]);
    let (created, ()) = tokio::join!(bench.create(&request), async {
        tokio::task::yield_now().await;
        bench.lose_machine("/dev/kvm does not exist");
    });
    assert_eq!(refusal(created), (Code::UNAVAILABLE, "/dev/kvm does not exist".into()));
    assert_eq!(bench.shared(), Vec::<String>::new());
    assert_eq!(refusal(bench.delete("one", "").await).0, Code::NOT_FOUND);
    assert_eq!(bench.events().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_guest_that_lies_about_an_exit_is_cut_to_size() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["liar"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    let exit = bench.wait("one", "").await.unwrap();
    assert_eq!(exit.exit_status, 255);
}

#[tokio::test]
async fn unread_output_does_not_hold_up_delete() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["flood"]);
    request.stdout = bench.fifo("out");
    let _reader = OpenOptions::new().open_receiver(&request.stdout).unwrap();
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 137);
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_created_container_can_be_deleted_without_a_start() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 137);
    assert_eq!(*bench.guest.calls.lock().unwrap(), ["Create one/", "Kill(9, true) one/", "Delete one/"]);
    assert_eq!(bench.shared(), Vec::<String>::new());
    assert_eq!(bench.events().await, ["/tasks/create", "/tasks/exit one 137", "/tasks/delete"]);
}

#[tokio::test]
async fn a_terminal_can_be_resized_and_has_no_stderr() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["sleep"]);
    (request.terminal, request.stdout) = (true, bench.fifo("out"));
    let _reader = OpenOptions::new().open_receiver(&request.stdout).unwrap();
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    let resize = ResizePtyRequest { id: "one".into(), width: 132, height: 43, ..ResizePtyRequest::default() };
    bench.task.resize_pty(within(), &resize).await.unwrap();
    let wide = ResizePtyRequest { width: 1 << 16, ..resize.clone() };
    assert_eq!(refusal(bench.task.resize_pty(within(), &wide).await).0, Code::INVALID_ARGUMENT);
    assert!(bench.guest.calls.lock().unwrap().contains(&"Resize(132x43) one/".to_owned()));
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container_and_then_ends_the_machine() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    let shutdown = ShutdownRequest { id: "one".into(), now: true, ..ShutdownRequest::default() };
    bench.task.shutdown(within(), &shutdown).await.unwrap();
    bench.start("one", "").await.expect("the pod is still there");
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    bench.delete("one", "").await.unwrap();
    bench.task.shutdown(within(), &shutdown).await.unwrap();
    timeout(LIMIT, bench.pod.ended()).await.expect("the pod ends");
    assert!(bench.pod_directory_exists(), "which the daemon removes");
    assert_eq!(bench.shared(), Vec::<String>::new());
}

#[tokio::test]
async fn both_names_of_the_service_are_served() {
    let bench = Bench::new().await;
    let pid = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = ttrpc::proto::Request::new();
        request.service = service.into();
        request.method = "Connect".into();
        request.payload = ConnectRequest { id: "one".into(), ..ConnectRequest::default() }.write_to_bytes().unwrap();
        let response = timeout(LIMIT, bench.client.request(request)).await.expect("an answer").unwrap();
        let connected = containerd_shim_protos::api::ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), pid));
    }
}

/// A containerd that starts anew ends the shim that refuses its first call.
#[tokio::test]
async fn a_pod_without_a_container_refuses_connect() {
    let bench = Bench::new().await;
    let connect = ConnectRequest { id: "one".into(), ..ConnectRequest::default() };
    assert_eq!(refusal(bench.task.connect(within(), &connect).await).0, Code::NOT_FOUND);
    let pid = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    assert_eq!(bench.task.connect(within(), &connect).await.unwrap().task_pid, pid);
    let other = ConnectRequest { id: "two".into(), ..ConnectRequest::default() };
    assert_eq!(bench.task.connect(within(), &other).await.unwrap().task_pid, 0);
    bench.delete("one", "").await.unwrap();
    assert_eq!(refusal(bench.task.connect(within(), &connect).await).0, Code::NOT_FOUND);
}

/// containerd was killed between Delete and Shutdown.
#[tokio::test]
async fn a_deletion_whose_client_has_gone_ends_the_pod() {
    let bench = Bench::new().await;
    let mut request = bench.request("one", &["flood"]);
    request.stdout = bench.fifo("out");
    let _reader = OpenOptions::new().open_receiver(&request.stdout).unwrap();
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    let client = bench.connect().await;
    // Output that nobody reads holds Delete up for a while.
    let delete = tokio::spawn(async move {
        let request = DeleteRequest { id: "one".into(), ..DeleteRequest::default() };
        client.delete(within(), &request).await
    });
    let begun = async { while !refusal(bench.exec("one", "x", &["sleep"], "").await).1.contains("deleted") {} };
    timeout(LIMIT, begun).await.expect("Delete begins");
    delete.abort();
    timeout(LIMIT, bench.pod.ended()).await.expect("the pod ends");
}

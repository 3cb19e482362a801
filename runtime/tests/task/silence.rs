//! An agent that does not answer, or too much: what the shim reports is what is so.

use std::time::SystemTime;

use containerd_shim_protos::api::{PidsRequest, StatsRequest, Status};
use tokio::time::timeout;
use ttrpc::Code;

use crate::bench::{Bench, LIMIT, refusal, within};

#[tokio::test]
async fn a_start_that_is_not_answered_leaves_nothing_alive() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.guest.silent.lock().unwrap().insert("Start");
    assert_eq!(refusal(bench.start("one", "").await).0, Code::DEADLINE_EXCEEDED);
    let calls = bench.guest.calls.lock().unwrap().clone();
    assert_eq!(calls, ["Create one/", "Start one/", "Kill(9, true) one/"]);
    assert_eq!(bench.state("one", "").await.unwrap().status.unwrap(), Status::STOPPED);
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_guest_that_cannot_confirm_a_kill_is_ended() {
    for silent in [&["Start", "Kill"][..], &["Create", "Kill"], &["Create", "Delete"]] {
        let bench = Bench::new().await;
        bench.guest.silent.lock().unwrap().extend(silent);
        let failed = match bench.create(&bench.request("one", &["sleep"])).await {
            Ok(_) => refusal(bench.start("one", "").await),
            refused => refusal(refused),
        };
        assert_eq!(failed.0, Code::DEADLINE_EXCEEDED, "{silent:?}: {}", failed.1);
        timeout(LIMIT, bench.machine.lost()).await.expect("the machine is ended");
    }
}

#[tokio::test]
async fn a_create_that_is_not_answered_can_be_tried_again() {
    let bench = Bench::new().await;
    bench.guest.silent.lock().unwrap().insert("Create");
    assert_eq!(refusal(bench.create(&bench.request("one", &["sleep"])).await).0, Code::DEADLINE_EXCEEDED);
    let calls = bench.guest.calls.lock().unwrap().clone();
    assert_eq!(calls, ["Create one/", "Kill(9, true) one/", "Delete one/"]);
    bench.guest.silent.lock().unwrap().clear();
    bench.create(&bench.request("one", &["sleep"])).await.expect("nothing of the first one is left");
}

#[tokio::test]
async fn a_delete_that_is_not_answered_has_not_happened() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["quick"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.wait("one", "").await.unwrap();
    bench.guest.silent.lock().unwrap().insert("Delete");
    assert_eq!(refusal(bench.delete("one", "").await).0, Code::DEADLINE_EXCEEDED);
    bench.guest.silent.lock().unwrap().clear();
    assert_eq!(bench.delete("one", "").await.unwrap().exit_status, 7, "it was still there");
}

/// SIGTERM of the shim, as when the host goes down.
#[tokio::test]
async fn the_end_of_a_pod_with_containers_writes_their_files_back() {
    for answers in [true, false] {
        let bench = Bench::new().await;
        bench.create(&bench.request("one", &["sleep"])).await.unwrap();
        if !answers {
            bench.guest.silent.lock().unwrap().insert("Shutdown");
        }
        timeout(LIMIT, bench.pod.shutdown(true)).await.expect("it ends in either case");
        assert_eq!(bench.guest.calls.lock().unwrap().last().unwrap(), "Shutdown");
    }
    let bench = Bench::new().await;
    timeout(LIMIT, bench.pod.shutdown(true)).await.expect("it ends");
    assert!(bench.guest.calls.lock().unwrap().is_empty(), "what was deleted is written back already");
}

#[tokio::test]
async fn answers_that_are_too_large_are_refused() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    *bench.guest.many.lock().unwrap() = 300_000;
    let pids = PidsRequest { id: "one".into(), ..PidsRequest::default() };
    let refused = refusal(bench.task.pids(within(), &pids).await);
    assert!(refused.0 == Code::INTERNAL && refused.1.contains("bytes, more than"), "{refused:?}");
    bench.guest.stats.lock().unwrap().cpu.extend((0..10_000).map(|n| (format!("counter-{n}"), n)));
    let stats = StatsRequest { id: "one".into(), ..StatsRequest::default() };
    let refused = refusal(bench.task.stats(within(), &stats).await);
    assert!(refused.0 == Code::INTERNAL && refused.1.contains("bytes, more than"), "{refused:?}");
}

/// The machine ends in the very moment in which Create is answered.
#[tokio::test]
async fn a_machine_that_is_lost_while_create_is_answered_ends_the_container() {
    let bench = Bench::new().await;
    let before = SystemTime::now();
    let request = bench.request("one", &["sleep"]);
    let (created, ()) = tokio::join!(bench.create(&request), async {
        while bench.guest.calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        bench.lose_machine("gone");
    });
    if created.is_ok() {
        let exit = timeout(LIMIT, bench.wait("one", "")).await.expect("it has ended").unwrap();
        assert!(exit.exit_status == 137 && SystemTime::now() >= before);
    }
}

//! containerd goes away and comes back: the pod goes on, is found again, and not one event is lost or out of order.

use std::time::Duration;

use containerd_shim_protos::api::{ConnectRequest, PidsRequest, StateRequest, Status, WaitRequest};
use tokio::time::timeout;

use crate::bench::{Bench, LIMIT, within};

/// Execs that ran while containerd was away, in the events that they should have left.
fn of_exec(n: u32) -> [String; 3] {
    [format!("/tasks/exec-added e{n}"), format!("/tasks/exec-started e{n}"), format!("/tasks/exit e{n} 0")]
}

async fn run_exec(bench: &Bench, n: u32) {
    let exec = format!("e{n}");
    bench.exec("one", &exec, &["echo"], "").await.unwrap();
    bench.start("one", &exec).await.unwrap();
    assert_eq!(bench.wait("one", &exec).await.unwrap().exit_status, 0);
    bench.delete("one", &exec).await.unwrap();
}

#[tokio::test]
async fn events_wait_for_containerd_however_often_it_dies() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    let mut n = 0;
    for round in 0..3 {
        run_exec(&bench, n).await;
        if round == 1 {
            // It hangs first: an event that it took without a word is sent again.
            bench.mute_containerd();
            run_exec(&bench, n + 1).await;
            n += 1;
        }
        bench.stop_containerd().await;
        for _ in 0..20 {
            n += 1;
            run_exec(&bench, n).await;
        }
        bench.start_containerd().await;
        n += 1;
    }
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    bench.delete("one", "").await.unwrap();
    let mut expected = vec!["/tasks/create".to_owned(), "/tasks/start".to_owned()];
    expected.extend((0..n).flat_map(of_exec));
    expected.extend(["/tasks/exit one 137".to_owned(), "/tasks/delete".to_owned()]);
    assert_eq!(bench.events().await, expected);
}

#[tokio::test]
async fn a_restarted_containerd_finds_its_task_and_goes_on_using_it() {
    let bench = Bench::new().await;
    let pid = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    bench.start("one", "").await.unwrap();
    // The old containerd waits, as it always does, and dies.
    let old = bench.connect().await;
    let waiting = tokio::spawn(async move {
        let request = WaitRequest { id: "one".into(), ..WaitRequest::default() };
        old.wait(within(), &request).await
    });
    tokio::task::yield_now().await;
    waiting.abort();
    let _ = waiting.await;

    let task = bench.connect().await;
    let connected =
        task.connect(within(), &ConnectRequest { id: "one".into(), ..ConnectRequest::default() }).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), pid));
    let request = StateRequest { id: "one".into(), ..StateRequest::default() };
    assert_eq!(task.state(within(), &request).await.unwrap().status.unwrap(), Status::RUNNING);
    // containerd takes a shim without processes for a leftover.
    let pids = task.pids(within(), &PidsRequest { id: "one".into(), ..PidsRequest::default() }).await.unwrap();
    assert_eq!(pids.processes.len(), 1);
    let request = WaitRequest { id: "one".into(), ..WaitRequest::default() };
    let (exit, killed) = tokio::join!(task.wait(within(), &request), bench.kill("one", "", 15));
    killed.unwrap();
    assert_eq!(exit.unwrap().exit_status, 143);
}

/// A containerd that never comes back must not keep a shim that is to end.
#[tokio::test]
async fn the_end_waits_for_events_only_so_long() {
    let bench = Bench::new().await;
    bench.stop_containerd().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    let flushed = bench.flush(Duration::from_millis(50));
    timeout(LIMIT, flushed).await.expect("it gives up");
    bench.start_containerd().await;
    assert_eq!(bench.events().await, ["/tasks/create"]);
}

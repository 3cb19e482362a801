//! What is asked of whole containers: pause, resume, update, stats, kills for want of memory.

use caisson_protos::agent::StatsResponse as GuestStats;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, KillRequest, PauseRequest, PidsRequest, ResumeRequest, StatsRequest, Status,
        UpdateTaskRequest,
    },
    cgroups_v2::metrics::Metrics,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::time::timeout;
use ttrpc::Code;

use crate::bench::{Bench, LIMIT, refusal, within};

/// The type that containerd gives the resources of an update.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

async fn pause(bench: &Bench, id: &str) -> ttrpc::Result<()> {
    bench.task.pause(within(), &PauseRequest { id: id.into(), ..PauseRequest::default() }).await.map(drop)
}

async fn resume(bench: &Bench, id: &str) -> ttrpc::Result<()> {
    bench.task.resume(within(), &ResumeRequest { id: id.into(), ..ResumeRequest::default() }).await.map(drop)
}

async fn update(bench: &Bench, id: &str, json: &str) -> ttrpc::Result<()> {
    let resources = Any { type_url: RESOURCES.into(), value: json.into(), ..Any::default() };
    let request =
        UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..UpdateTaskRequest::default() };
    bench.task.update(within(), &request).await.map(drop)
}

async fn stats(bench: &Bench, id: &str) -> ttrpc::Result<Any> {
    let request = StatsRequest { id: id.into(), ..StatsRequest::default() };
    bench.task.stats(within(), &request).await.map(|response| response.stats.unwrap())
}

async fn status(bench: &Bench, exec: &str) -> Status {
    bench.state("one", exec).await.unwrap().status.unwrap()
}

/// A container that runs, with an exec that runs.
async fn running() -> Bench {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.exec("one", "x", &["sleep"], "").await.unwrap();
    bench.start("one", "x").await.unwrap();
    bench
}

#[tokio::test]
async fn a_container_is_paused_and_resumed() {
    let bench = running().await;
    bench.guest.moves.send_replace(false);
    let (paused, ()) = tokio::join!(pause(&bench, "one"), async {
        while status(&bench, "").await != Status::PAUSING {}
        assert_eq!(status(&bench, "x").await, Status::PAUSING);
        assert_eq!(
            refusal(resume(&bench, "one").await),
            (Code::FAILED_PRECONDITION, "cannot resume a pausing container".into())
        );
        bench.guest.moves.send_replace(true);
    });
    paused.unwrap();
    assert_eq!((status(&bench, "").await, status(&bench, "x").await), (Status::PAUSED, Status::PAUSED));
    let words = |words: &str| (Code::FAILED_PRECONDITION, words.to_owned());
    assert_eq!(refusal(pause(&bench, "one").await), words("cannot pause a paused container"));
    assert_eq!(refusal(bench.start("one", "").await), words("cannot start a paused process"));
    assert_eq!(refusal(bench.delete("one", "").await), words("cannot delete a paused process"));
    assert_eq!(refusal(bench.exec("one", "y", &["sleep"], "").await), words("cannot exec in a paused state"));
    update(&bench, "one", "{}").await.unwrap();
    bench.task.pids(within(), &PidsRequest { id: "one".into(), ..PidsRequest::default() }).await.unwrap();
    resume(&bench, "one").await.unwrap();
    assert_eq!((status(&bench, "").await, status(&bench, "x").await), (Status::RUNNING, Status::RUNNING));
    assert_eq!(refusal(resume(&bench, "one").await), words("cannot resume a running process"));
    let events = bench.events().await;
    assert_eq!(events[4..], ["/tasks/paused", "/tasks/resumed"]);
}

#[tokio::test]
async fn what_is_paused_can_be_killed_and_deleted() {
    let bench = running().await;
    pause(&bench, "one").await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    bench.kill("one", "x", 9).await.unwrap();
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 137);
    assert_eq!(status(&bench, "").await, Status::STOPPED);
    assert_eq!(refusal(resume(&bench, "one").await).1, "cannot resume a stopped container");
    bench.delete("one", "").await.unwrap();
    let events = bench.events().await;
    assert_eq!(events[4..], ["/tasks/paused", "/tasks/exit x 137", "/tasks/exit one 137", "/tasks/delete"]);
}

#[tokio::test]
async fn a_process_that_ends_while_it_is_being_paused_was_never_paused() {
    let bench = running().await;
    bench.kill("one", "x", 9).await.unwrap();
    bench.wait("one", "x").await.unwrap();
    bench.guest.moves.send_replace(false);
    let (paused, ()) = tokio::join!(pause(&bench, "one"), async {
        while status(&bench, "").await != Status::PAUSING {}
        bench.kill("one", "", 9).await.unwrap();
        bench.wait("one", "").await.unwrap();
        bench.guest.moves.send_replace(true);
    });
    assert_eq!(refusal(paused), (Code::FAILED_PRECONDITION, "cannot pause a stopped container".into()));
    assert_eq!(bench.events().await[4..], ["/tasks/exit x 137", "/tasks/exit one 137"]);
}

#[tokio::test]
async fn what_the_guest_refuses_changes_nothing() {
    let bench = running().await;
    bench.guest.refuse.lock().unwrap().insert("Pause", Code::INTERNAL);
    assert_eq!(refusal(pause(&bench, "one").await).0, Code::INTERNAL);
    assert_eq!(status(&bench, "").await, Status::RUNNING);
    bench.guest.refuse.lock().unwrap().clear();
    pause(&bench, "one").await.unwrap();
    bench.guest.refuse.lock().unwrap().insert("Resume", Code::FAILED_PRECONDITION);
    assert_eq!(refusal(resume(&bench, "one").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(&bench, "").await, Status::PAUSED);
    bench.guest.refuse.lock().unwrap().insert("Update", Code::INVALID_ARGUMENT);
    let message = refusal(update(&bench, "one", "{}").await);
    assert_eq!(message, (Code::INVALID_ARGUMENT, "the guest refuses Update".into()));
    assert!(!bench.events().await.contains(&"/tasks/resumed".to_owned()));
}

/// Nobody knows how far a Pause came that was not answered, so it is undone.
#[tokio::test]
async fn a_pause_that_hangs_is_undone() {
    let bench = running().await;
    bench.guest.refuse.lock().unwrap().insert("Pause", Code::DEADLINE_EXCEEDED);
    assert_eq!(refusal(pause(&bench, "one").await).0, Code::DEADLINE_EXCEEDED);
    assert_eq!(status(&bench, "").await, Status::RUNNING);
    assert_eq!(bench.guest.calls.lock().unwrap().last().unwrap(), "Resume one/");
}

#[tokio::test]
async fn an_update_reaches_the_guest_as_it_is_and_only_while_there_is_something_to_update() {
    let bench = Bench::new().await;
    let json = r#"{"memory":{"limit":67108864},"unified":{"memory.high":"1"}}"#;
    assert_eq!(refusal(update(&bench, "one", json).await).0, Code::NOT_FOUND);
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    update(&bench, "one", json).await.unwrap();
    assert_eq!(bench.guest.calls.lock().unwrap().last().unwrap(), &format!("Update({json}) one/"));
    let malformed = refusal(update(&bench, "one", "{").await);
    assert!(malformed.0 == Code::INVALID_ARGUMENT && malformed.1.contains("malformed"), "{}", malformed.1);
    let none = UpdateTaskRequest { id: "one".into(), ..UpdateTaskRequest::default() };
    assert_eq!(refusal(bench.task.update(within(), &none).await).0, Code::INVALID_ARGUMENT);
    bench.start("one", "").await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    assert_eq!(
        refusal(update(&bench, "one", json).await),
        (Code::FAILED_PRECONDITION, "cannot update a stopped container".into())
    );
}

#[tokio::test]
async fn stats_are_containerds_metrics() {
    let bench = running().await;
    *bench.guest.stats.lock().unwrap() = GuestStats {
        cpu: [("usage_usec".to_owned(), 1234)].into(),
        memory_current: 4096,
        memory_max: u64::MAX,
        pids_current: 2,
        ..GuestStats::new()
    };
    let packed = stats(&bench, "one").await.unwrap();
    assert_eq!(packed.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&packed.value).unwrap();
    assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage, metrics.pids.current), (1234, 4096, 2));
    assert_eq!(refusal(stats(&bench, "two").await).0, Code::NOT_FOUND);
    bench.lose_machine("gone");
    assert_eq!(refusal(stats(&bench, "one").await), (Code::UNAVAILABLE, "gone".into()));
}

#[tokio::test]
async fn each_kill_for_want_of_memory_is_reported_once_and_before_the_delete() {
    let bench = running().await;
    bench.guest.kills.send_replace(1);
    while bench.events().await.last().unwrap() != "/tasks/oom" {
        tokio::task::yield_now().await;
    }
    bench.guest.kills.send_replace(2);
    bench.kill("one", "x", 9).await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    assert_eq!(bench.wait("one", "").await.unwrap().exit_status, 137);
    bench.delete("one", "").await.unwrap();
    let events = bench.events().await;
    assert_eq!(events.iter().filter(|event| *event == "/tasks/oom").count(), 2);
    assert_eq!(events.last().unwrap(), "/tasks/delete");
}

/// Kills that come at once are one event, as with containerd's own shim.
#[tokio::test]
async fn a_guest_cannot_flood_containerd_with_kills() {
    let bench = running().await;
    let began = std::time::Instant::now();
    let kills = bench.guest.kills.clone();
    let flood = tokio::spawn(async move {
        loop {
            kills.send_modify(|kills| *kills += 1);
            tokio::task::yield_now().await;
        }
    });
    while began.elapsed() < std::time::Duration::from_millis(500) {
        bench.state("one", "").await.unwrap();
    }
    flood.abort();
    let message = bench.events().await.iter().filter(|event| *event == "/tasks/oom").count() as u128;
    // A machine that is slow tells fewer: the bound is what counts.
    let most = began.elapsed().as_millis() / 100 + 1;
    assert!((1..=most).contains(&message), "{message} events in {:?}", began.elapsed());
}

#[tokio::test]
async fn kill_with_all_is_for_containers_and_signal_0_only_asks() {
    let bench = running().await;
    let all = |exec: &str, signal| KillRequest {
        id: "one".into(),
        exec_id: exec.into(),
        signal,
        all: true,
        ..KillRequest::default()
    };
    bench.task.kill(within(), &all("x", 15)).await.unwrap();
    bench.wait("one", "x").await.unwrap();
    let asked = bench.guest.calls.lock().unwrap().len();
    bench.kill("one", "", 0).await.unwrap();
    assert_eq!(bench.guest.calls.lock().unwrap().len(), asked, "nobody was signalled");
    bench.task.kill(within(), &all("", 9)).await.unwrap();
    bench.wait("one", "").await.unwrap();
    assert_eq!(refusal(bench.kill("one", "", 0).await).0, Code::NOT_FOUND);
    bench.task.kill(within(), &all("", 9)).await.expect("nothing is left, and that is what was wanted");
    let calls = bench.guest.calls.lock().unwrap();
    let kills: Vec<_> = calls.iter().filter(|call| call.starts_with("Kill")).collect();
    assert_eq!(kills, ["Kill(15, false) one/x", "Kill(9, true) one/"]);
}

#[tokio::test]
async fn checkpoint_is_not_there_yet() {
    let bench = running().await;
    let request = CheckpointTaskRequest { id: "one".into(), ..CheckpointTaskRequest::default() };
    assert_eq!(refusal(bench.task.checkpoint(within(), &request).await).0, Code::UNIMPLEMENTED);
    let unknown = CheckpointTaskRequest { id: "two".into(), ..CheckpointTaskRequest::default() };
    assert_eq!(refusal(bench.task.checkpoint(within(), &unknown).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn fifty_waits_for_a_process_that_ends_at_once_all_return() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["quick"])).await.unwrap();
    let waits: Vec<_> = (0..50)
        .map(|_| {
            let task = bench.task.clone();
            tokio::spawn(async move {
                let request = containerd_shim_protos::api::WaitRequest { id: "one".into(), ..Default::default() };
                task.wait(within(), &request).await.unwrap().exit_status
            })
        })
        .collect();
    bench.start("one", "").await.unwrap();
    for wait in waits {
        assert_eq!(timeout(LIMIT, wait).await.expect("it returns").unwrap(), 7);
    }
}

#[tokio::test]
async fn of_deletes_that_come_at_once_one_succeeds_and_the_others_find_nothing() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["quick"])).await.unwrap();
    bench.start("one", "").await.unwrap();
    bench.wait("one", "").await.unwrap();
    let answers = tokio::join!(bench.delete("one", ""), bench.delete("one", ""), bench.delete("one", ""));
    let (deleted, others): (Vec<_>, Vec<_>) =
        [answers.0, answers.1, answers.2].into_iter().partition(ttrpc::Result::is_ok);
    assert_eq!(deleted.len(), 1);
    for other in others {
        assert_eq!(refusal(other).0, Code::NOT_FOUND);
    }
    assert_eq!(bench.events().await.iter().filter(|event| *event == "/tasks/delete").count(), 1);
}

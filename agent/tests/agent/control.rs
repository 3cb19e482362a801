//! Pause, Resume, Stats, WaitOom.

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use ttrpc::Code;

use crate::support::{Pod, exec_shell, shell, status, within};

#[tokio::test]
async fn a_paused_container_stands_still_until_it_is_resumed() {
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(false).await;
    let script = "trap 'echo trapped; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    pod.create("c", &shell(script), Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut lines = BufReader::new(streams.stdout.unwrap()).lines();
    assert_eq!(within("the handler", lines.next_line()).await.unwrap().as_deref(), Some("ready"));
    assert!(pod.cgroup_file("c", "cgroup.events").unwrap().contains("frozen 0"));

    pod.pause("c").await.unwrap();
    // The kernel's word for it.
    assert!(pod.cgroup_file("c", "cgroup.events").unwrap().contains("frozen 1"));
    let (code, message) = status(pod.pause("c").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("c: it is paused"), "{message}");
    let used = pod.stats("c").await.unwrap().cpu["usage_usec"];
    assert!(!pod.pids("c").await.unwrap().is_empty());
    assert_eq!(pod.stats("c").await.unwrap().cpu["usage_usec"], used);
    // A signal waits until it is resumed.
    pod.kill("c", "", libc::SIGTERM, false).await.unwrap();
    pod.resume("c").await.unwrap();
    assert_eq!(within("the handler", lines.next_line()).await.unwrap().as_deref(), Some("trapped"));
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 7);
    assert_eq!(status(pod.resume("c").await).0, Code::FAILED_PRECONDITION);
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn nobody_gets_into_a_paused_container() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    pod.exec("c", "early", &exec_shell("exit 3"), None).await.unwrap();
    pod.pause("c").await.unwrap();
    for result in
        [pod.exec("c", "late", &exec_shell("true"), None).await, pod.start_process("c", "early").await.map(drop)]
    {
        let (code, message) = status(result);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(message.contains("paused"), "{message}");
    }
    pod.resume("c").await.unwrap();
    pod.start_process("c", "early").await.unwrap();
    assert_eq!(pod.wait("c", "early").await.unwrap().exit_status, 3);
}

#[tokio::test]
async fn a_paused_container_is_killed_but_not_deleted() {
    let pod = Pod::start().await;
    for all in [false, true] {
        pod.start_sleeper("c").await;
        pod.exec("c", "e", &exec_shell("exec sleep 1000"), None).await.unwrap();
        pod.start_process("c", "e").await.unwrap();
        pod.pause("c").await.unwrap();
        let (code, message) = status(pod.delete("c", "").await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        pod.kill("c", "", libc::SIGKILL, all).await.unwrap();
        assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 137);
        assert_eq!(pod.wait("c", "e").await.unwrap().exit_status, 137);
        pod.delete("c", "").await.unwrap();
        pod.assert_empty();
    }
}

#[tokio::test]
async fn an_exec_of_a_paused_container_is_killed_alone() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    pod.exec("c", "e", &exec_shell("exec sleep 1000"), None).await.unwrap();
    pod.start_process("c", "e").await.unwrap();
    pod.pause("c").await.unwrap();
    pod.kill("c", "e", libc::SIGKILL, false).await.unwrap();
    assert_eq!(pod.wait("c", "e").await.unwrap().exit_status, 137);
    pod.delete("c", "e").await.unwrap();
    assert!(pod.cgroup_file("c", "cgroup.events").unwrap().contains("frozen 1"));
    pod.resume("c").await.unwrap();
    assert_eq!(pod.run_exec("c", "f", &exec_shell("exit 4")).await.status, 4);
}

#[tokio::test]
async fn only_what_runs_is_paused_and_only_what_is_paused_is_resumed() {
    let pod = Pod::start().await;
    for result in [pod.pause("c").await, pod.resume("c").await, pod.update("c", &json!({})).await] {
        assert_eq!(status(result).0, Code::NOT_FOUND);
    }
    assert_eq!(status(pod.stats("c").await).0, Code::NOT_FOUND);
    assert_eq!(status(pod.wait_oom("c", 0).await).0, Code::NOT_FOUND);
    pod.create("c", &shell("exit 0"), None).await.unwrap();
    assert_eq!(status(pod.pause("c").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(pod.resume("c").await).0, Code::FAILED_PRECONDITION);
    pod.start_process("c", "").await.unwrap();
    pod.wait("c", "").await.unwrap();
    assert_eq!(status(pod.pause("c").await).0, Code::FAILED_PRECONDITION);
    pod.delete("c", "").await.unwrap();
    pod.start_sleeper("c").await;
    let (code, message) = status(pod.resume("c").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("c: it is not paused"), "{message}");
}

#[tokio::test]
async fn stats_are_the_kernels_numbers() {
    let pod = Pod::start().await;
    let mut spec = shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000");
    let has = |name: &str| pod.cgroup_controllers().iter().any(|known| known == name);
    let mut resources = json!({"devices": []});
    if has("memory") {
        resources["memory"] = json!({"limit": 67108864});
    }
    if has("pids") {
        resources["pids"] = json!({"limit": 33});
    }
    spec["linux"]["resources"] = resources;
    pod.create("c", &spec, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let stats = pod.stats("c").await.unwrap();
    let all = ["usage_usec", "user_usec", "system_usec"];
    assert!(all.iter().all(|key| stats.cpu.contains_key(*key)), "{stats:?}");
    let later = pod.stats("c").await.unwrap();
    assert!(later.cpu["usage_usec"] >= stats.cpu["usage_usec"] && later.cpu["usage_usec"] > 0, "{later:?}");
    // A controller that this kernel does not have leaves its fields empty.
    let limits = (stats.memory_max, stats.pids_max);
    assert_eq!(limits, (if has("memory") { 67108864 } else { 0 }, if has("pids") { 33 } else { 0 }));
    assert_eq!(stats.memory.contains_key("anon") && stats.memory_current > 0, has("memory"), "{stats:?}");
    assert_eq!(stats.memory_events.contains_key("oom_kill"), has("memory"), "{stats:?}");
    assert_eq!(stats.pids_current, u64::from(has("pids")), "{stats:?}");
    let huge = pod.cgroup_file("c", "hugetlb.2MB.max");
    let told = stats.hugetlb.iter().find(|pages| pages.page_size == "2MB");
    assert_eq!(told.map(|pages| (pages.current, pages.max == u64::MAX)), huge.map(|text| (0, text == "max\n")));
    // An ended container keeps its numbers until it is deleted.
    pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
    pod.wait("c", "").await.unwrap();
    assert!(pod.stats("c").await.unwrap().cpu["usage_usec"] >= later.cpu["usage_usec"]);
    pod.delete("c", "").await.unwrap();
}

#[tokio::test]
async fn each_kill_for_want_of_memory_is_told() {
    let pod = Pod::start().await;
    let memory = pod.cgroup_controllers().iter().any(|name| name == "memory");
    let hog = "awk 'BEGIN { s = \"x\"; while (1) s = s s }'";
    let mut spec = shell(&format!("echo begun; read line; {hog}; {hog}; echo survived; read line"));
    if memory {
        spec["linux"]["resources"]["memory"] = json!({"limit": 33554432, "swap": 33554432});
    } else {
        // Without the controller nothing is counted, and the machine's memory is not for a test to fill.
        spec = shell("echo begun; read line; echo survived; read line");
    }
    let (stdio, streams) = pod.stdio(false).await;
    pod.create("c", &spec, Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut stdin = streams.stdin.unwrap();
    let mut lines = BufReader::new(streams.stdout.unwrap()).lines();
    assert_eq!(within("the script", lines.next_line()).await.unwrap().as_deref(), Some("begun"));
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"go\n").await.unwrap();
    if memory {
        // Also while somebody waits already, and after the fact.
        let first = pod.wait_oom("c", 0).await.unwrap();
        assert!((1..=2).contains(&first), "{first}");
        assert_eq!(pod.wait_oom("c", 1).await.unwrap(), 2);
        assert!(pod.wait_oom("c", 0).await.unwrap() == 2);
        assert_eq!(pod.stats("c").await.unwrap().memory_events["oom_kill"], 2);
    }
    assert_eq!(within("the script", lines.next_line()).await.unwrap().as_deref(), Some("survived"));
    let (ended, closed) = tokio::join!(pod.wait_oom("c", 2), async {
        drop(stdin);
        pod.wait("c", "").await
    });
    closed.unwrap();
    assert_eq!(status(ended).0, Code::FAILED_PRECONDITION);
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

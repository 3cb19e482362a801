//! The pod's network namespace and the guest: what it is told, when, and the pid that leads there.

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use caisson_protos::agent::ConfigureNetworkRequest;
use caisson_runtime::network::Namespace;
use serde_json::json;
use tokio::time::timeout;
use ttrpc::Code;

use crate::{
    bench::{Bench, LIMIT, refusal},
    monitor::FIRST,
};

/// Runs `ip` in a network namespace.
fn ip(namespace: &Namespace, arguments: &str) {
    let run = || Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    let output = namespace.run(run).unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// One with an interface that has an address.
fn with_interface() -> Namespace {
    let namespace = Namespace::new().expect("these tests run as root");
    ip(&namespace, "link add eth0 address 02:00:00:00:00:02 type bridge");
    ip(&namespace, "address add 10.0.0.2/24 dev eth0");
    ip(&namespace, "link set eth0 up");
    namespace
}

fn lists(message: &ConfigureNetworkRequest, ip: [u8; 4]) -> bool {
    let addresses = message.interfaces.iter().flat_map(|interface| &interface.addresses);
    addresses.into_iter().any(|address| address.ip == ip)
}

async fn told(bench: &Bench, ip: [u8; 4]) -> ConfigureNetworkRequest {
    told_that(bench, |message| lists(message, ip)).await
}

async fn told_that(bench: &Bench, found: impl Fn(&ConfigureNetworkRequest) -> bool) -> ConfigureNetworkRequest {
    let mut told = bench.guest.network.subscribe();
    let has = told.wait_for(|message| message.as_ref().is_some_and(&found));
    timeout(LIMIT, has).await.expect("the guest is told").unwrap().clone().unwrap()
}

fn names(message: &ConfigureNetworkRequest) -> Vec<&str> {
    message.interfaces.iter().map(|interface| interface.name.as_str()).collect()
}

/// Waits until the monitor has these cards.
async fn has_cards(bench: &Bench, macs: &[[u8; 6]]) {
    let has = async {
        while bench.monitor.cards.lock().unwrap().values().map(|card| card.0).collect::<Vec<_>>() != macs {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, has).await.expect("the monitor has the cards");
}

/// The number of the network namespace of a process or thread; none if there is none.
fn inode(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|file| file.ino())
}

#[tokio::test]
async fn the_guest_is_told_before_its_first_container_and_of_each_change_later() {
    let bench = Bench::within(with_interface()).await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    let message = told(&bench, [10, 0, 0, 2]).await;
    let interface = message.interfaces.iter().find(|interface| interface.name == "eth0").unwrap();
    assert_eq!((interface.mac.as_slice(), interface.up), (&[2, 0, 0, 0, 0, 2][..], true));
    bench.create(&bench.request("two", &["sleep"])).await.unwrap();
    assert_eq!(*bench.guest.calls.lock().unwrap(), ["ConfigureNetwork", "Create one/", "Create two/"]);

    ip(&bench.network, "address add 10.0.0.3/24 dev eth0");
    assert!(lists(&told(&bench, [10, 0, 0, 3]).await, [10, 0, 0, 2]));

    bench.pod.shutdown(true).await;
    let output = bench.network.run(|| Command::new("ip").args(["-br", "link"]).output().unwrap()).unwrap();
    let links = String::from_utf8(output.stdout).unwrap();
    assert!(links.contains("eth0") && !links.contains("ctap"), "the namespace is as it was:\n{links}");
}

#[tokio::test]
async fn a_guest_without_a_network_is_told_nothing() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    assert_eq!(*bench.guest.calls.lock().unwrap(), ["Create one/"]);
}

#[tokio::test]
async fn what_a_hook_sets_comes_with_the_first_message() {
    let bench = Bench::within(with_interface()).await;
    let request = bench.request_with("one", &["sleep"], |spec| {
        // As a network plugin finds the namespace.
        let script = "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); nsenter --net=/proc/$pid/ns/net ip address add 10.0.0.4/24 dev eth0";
        let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
        spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": environment }] });
    });
    bench.create(&request).await.unwrap();
    assert!(lists(&told(&bench, [10, 0, 0, 4]).await, [10, 0, 0, 2]));
    assert_eq!(*bench.guest.calls.lock().unwrap(), ["ConfigureNetwork", "Create one/"], "in one message");
}

#[tokio::test]
async fn what_the_guest_refuses_is_creates_error_each_time() {
    let bench = Bench::within(with_interface()).await;
    bench.guest.refuse.lock().unwrap().insert("ConfigureNetwork", Code::INVALID_ARGUMENT);
    for name in ["one", "two"] {
        let (code, message) = refusal(bench.create(&bench.request(name, &["sleep"])).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert_eq!(message, "network: the guest refuses ConfigureNetwork");
    }
    assert!(bench.guest.creates.lock().unwrap().is_empty());
    bench.guest.refuse.lock().unwrap().clear();
    bench.create(&bench.request("three", &["sleep"])).await.unwrap();
    told(&bench, [10, 0, 0, 2]).await;
}

#[tokio::test]
async fn a_tasks_pid_leads_to_the_pods_network_until_the_task_ends() {
    let bench = Bench::new().await;
    let pods = bench.network.identity().unwrap().inode;
    let one = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    let two = bench.create(&bench.request("two", &["sleep"])).await.unwrap().pid;
    assert_ne!(one, two);
    assert_eq!([inode(one), inode(two)], [Some(pods), Some(pods)]);
    bench.exec("one", "more", &["sleep"], "").await.unwrap();
    assert_eq!(bench.start("one", "more").await.unwrap().pid, one);
    bench.start("one", "").await.unwrap();
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    let ended = async {
        while inode(one).is_some() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, ended).await.expect("the pid is gone");
    assert_eq!(inode(two), Some(pods));
    assert_eq!(bench.state("one", "").await.unwrap().pid, one);
}

#[tokio::test]
async fn a_later_container_names_the_pods_network_namespace_or_is_refused() {
    let bench = Bench::new().await;
    let named = |name: &str, pid: u32| {
        let path = format!("/proc/{pid}/ns/net");
        bench.request_with(name, &["sleep"], |spec| spec["linux"]["namespaces"][2]["path"] = json!(path))
    };
    let one = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    bench.create(&named("two", one)).await.unwrap();
    assert!(bench.guest.creates.lock().unwrap()[1].joins.is_empty(), "the guest has one network");
    let other = Namespace::new().unwrap();
    let thread = other.task_thread().unwrap();
    let (code, message) = refusal(bench.create(&named("three", thread.pid())).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("is not the network namespace of this pod"), "{message}");
    let (code, message) = refusal(bench.create(&named("four", std::process::id())).await);
    assert_eq!(
        (code, message.contains("is the host's network namespace")),
        (Code::INVALID_ARGUMENT, true),
        "{message}"
    );
}

const LATE: [u8; 6] = [2, 0, 0, 0, 0, 7];

#[tokio::test]
async fn an_interface_that_comes_later_becomes_a_card_of_the_running_machine_and_goes_again() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    ip(&bench.network, "link add late0 address 02:00:00:00:00:07 type bridge");
    let message = told_that(&bench, |message| names(message).contains(&"late0")).await;
    assert_eq!(message.interfaces.iter().find(|one| one.name == "late0").unwrap().mac, LATE);
    has_cards(&bench, &[LATE]).await;
    let bound = format!("BindDevices [{FIRST}] []");
    assert_eq!(bench.guest.calls.lock().unwrap()[..3], ["Create one/", &bound, "ConfigureNetwork"]);
    assert_eq!(bench.monitor.cards.lock().unwrap().values().next().unwrap().1.len(), 1, "the tap's queue");

    ip(&bench.network, "link delete late0");
    told_that(&bench, |message| !names(message).contains(&"late0")).await;
    has_cards(&bench, &[]).await;
    let unbound = format!("BindDevices [] [{FIRST}]");
    let calls = bench.guest.calls.lock().unwrap();
    assert_eq!(calls[calls.len() - 2..], [&unbound, "ConfigureNetwork"], "its name and its slot are free for others");
}

#[tokio::test]
async fn an_interface_with_another_address_is_another_card_of_the_same_name() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    ip(&bench.network, "link add late0 address 02:00:00:00:00:08 type bridge");
    has_cards(&bench, &[[2, 0, 0, 0, 0, 8]]).await;
    ip(&bench.network, "link set late0 address 02:00:00:00:00:07");
    told_that(&bench, |message| message.interfaces.iter().any(|one| one.name == "late0" && one.mac == LATE)).await;
    has_cards(&bench, &[LATE]).await;
    let calls = bench.guest.calls.lock().unwrap();
    let at = |wanted: &str| calls.iter().rposition(|call| call == wanted).expect(wanted);
    assert!(at(&format!("BindDevices [] [{FIRST}]")) < at("ConfigureNetwork"), "{calls:?}");
}

#[tokio::test]
async fn what_a_hook_adds_is_there_before_the_first_container() {
    let bench = Bench::new().await;
    let request = bench.request_with("one", &["sleep"], |spec| {
        let script = "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); nsenter --net=/proc/$pid/ns/net ip link add late0 type bridge";
        let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
        spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": environment }] });
    });
    bench.create(&request).await.unwrap();
    let bound = format!("BindDevices [{FIRST}] []");
    assert_eq!(*bench.guest.calls.lock().unwrap(), [&bound, "ConfigureNetwork", "Create one/"]);
}

#[tokio::test]
async fn a_card_that_the_machine_cannot_have_takes_nothing_from_the_others() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    // The played machine has room for two.
    for (number, name) in ["late0", "late1", "late2"].iter().enumerate() {
        ip(&bench.network, &format!("link add {name} address 02:00:00:00:00:0{number} type bridge"));
    }
    ip(&bench.network, "address add 10.0.0.5/24 dev late0");
    let message = told(&bench, [10, 0, 0, 5]).await;
    assert_eq!(names(&message), ["lo", "late0", "late1"]);
    // It is bound when the guest's kernel says so, and its slot is empty otherwise.
    ip(&bench.network, "link delete late1");
    told_that(&bench, |message| names(message) == ["lo", "late0"]).await;
    has_cards(&bench, &[[2, 0, 0, 0, 0, 0]]).await;
    bench.guest.refuse.lock().unwrap().insert("BindDevices", Code::INTERNAL);
    ip(&bench.network, "link add late3 address 02:00:00:00:00:03 type bridge");
    ip(&bench.network, "address add 10.0.0.6/24 dev late0");
    told(&bench, [10, 0, 0, 6]).await;
    has_cards(&bench, &[[2, 0, 0, 0, 0, 0]]).await;
}

#[tokio::test]
async fn an_interface_that_takes_the_place_of_another_gets_its_own_card() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    ip(&bench.network, "link add late0 address 02:00:00:00:00:07 type bridge");
    told_that(&bench, |message| names(message).contains(&"late0")).await;
    bench.guest.calls.lock().unwrap().clear();
    // One script, so that both may be seen at once.
    let script = "ip link delete late0; ip link add late1 address 02:00:00:00:00:07 type bridge";
    let run = || Command::new("sh").args(["-c", script]).status().unwrap();
    assert!(bench.network.run(run).unwrap().success());
    told_that(&bench, |message| names(message).contains(&"late1")).await;
    has_cards(&bench, &[LATE]).await;
    let calls = bench.guest.calls.lock().unwrap();
    let place = |call: String| calls.iter().position(|one| *one == call).unwrap();
    assert!(place(format!("BindDevices [] [{FIRST}]")) < place(format!("BindDevices [{FIRST}] []")), "{calls:?}");
}

#[tokio::test]
async fn what_is_done_between_create_and_start_is_there_when_the_program_begins() {
    let bench = Bench::new().await;
    bench.create(&bench.request("one", &["sleep"])).await.unwrap();
    ip(&bench.network, "link add late0 address 02:00:00:00:00:07 type bridge");
    ip(&bench.network, "address add 10.0.0.7/24 dev late0");
    bench.start("one", "").await.unwrap();
    assert_eq!(bench.guest.calls.lock().unwrap().last().unwrap(), "Start one/");
    assert!(lists(bench.guest.network.borrow().as_ref().unwrap(), [10, 0, 0, 7]));
}

//! The pod's network as the real plugins make it: the guest has what the network namespace has, and every packet passes. What runc
//! does is the measure here, too.

mod bridge;
mod kinds;
mod own;

use caisson_e2e::{
    Finished, Pod, Setup,
    host::Image,
    network::{Netns, probe, script, view},
    process::Running,
    sizes,
    wait::{STEP, long},
};

fn setup() -> Setup {
    Setup::default().image(Image::Probe).own_network()
}

/// How much is sent in each direction, bytes.
fn amount() -> String {
    sizes::size(4 << 20, 1 << 30).to_string()
}

/// Waits until an end listens.
#[track_caller]
fn listening(end: Running) -> Running {
    end.stdout.wait_for("listening", STEP, |text| text.contains("listening\n").then_some(()));
    end
}

/// Waits for an end's end; its last words.
#[track_caller]
fn finished(end: Running) -> String {
    Finished::of(end, long()).succeeded()
}

/// One end in a pod.
fn probe_in(pod: &Pod, name: &str, words: &[&str]) -> Running {
    let mut running = pod.exec_start(name, &[&["probe", "net"], words].concat());
    running.close_stdin();
    running
}

/// The interface and the routes are in the guest as they are in the network namespace.
#[track_caller]
fn sees(pod: &Pod, netns: &Netns, interface: &str) {
    let seen = pod.exec(&format!("see-{interface}"), &["sh", "-c", &script(interface)]).succeeded();
    assert_eq!(view(&seen), view(&netns.sh(&script(interface))), "{seen}");
}

/// The pod connects to an address of the host, and bytes pass in both directions at once.
#[track_caller]
fn connects(pod: &Pod, name: &str, address: &str) {
    let amount = amount();
    let server = listening(probe(&["serve", "7000", &amount]));
    finished(probe_in(pod, name, &["connect", &format!("{address}:7000"), &amount]));
    finished(server);
}

/// The host connects to an address of the pod; the address that the pod sees it from.
#[track_caller]
fn is_reached(pod: &Pod, name: &str, address: &str) -> String {
    let amount = amount();
    let server = listening(probe_in(pod, name, &["serve", "7001", &amount]));
    finished(probe(&["connect", &format!("{address}:7001"), &amount]));
    let words = finished(server);
    words.trim_end().rsplit(' ').next().unwrap_or_default().to_owned()
}

/// Datagrams of all sizes, most of them in fragments, come to the pod and back.
#[track_caller]
fn takes_datagrams(pod: &Pod, name: &str, address: &str) {
    const SIZES: [&str; 6] = ["1", "1400", "1473", "4000", "30000", "65000"];
    let echo = listening(probe_in(pod, name, &["echo", "7002", "6"]));
    finished(probe(&[&["datagrams", &format!("{address}:7002")], &SIZES[..]].concat()));
    finished(echo);
}

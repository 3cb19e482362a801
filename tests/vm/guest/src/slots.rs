//! Network cards that come to the running machine, and go. The host says line by line what to do, on a stream of its own.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use caisson_agent::slots::Slots;
use caisson_protos::agent::BindDevicesRequest;

use crate::{network, vsock};

/// Where the host says what to do.
const PORT: u32 = 5001;
/// How long a link may take to change.
const LINK_LIMIT: Duration = Duration::from_secs(30);

/// Answers each line of the host by one: `ok` with what there is to say, or `error`. The end of the stream ends the scenario.
///
/// - `bind 3 4`, `unbind 3`: what the agent does for BindDevices;
/// - `card 02:00:00:00:00:01 10.9.1.2`: gives a card an address and brings it up;
/// - `link 02:00:00:00:00:01 0`: waits until the card's link is so;
/// - `cards`: lists the hardware addresses of all cards.
pub fn obey() {
    network::echo_in_background();
    let listener = vsock::listen(PORT);
    println!("guest: listening");
    let stream = vsock::accept(&listener);
    let mut answers = stream.try_clone().expect("a second descriptor");
    for line in BufReader::new(stream).lines() {
        let line = line.expect("a line of the host");
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["bind", ref slots @ ..] => apply(&BindDevicesRequest { bind: numbers(slots), ..Default::default() }),
            ["unbind", ref slots @ ..] => apply(&BindDevicesRequest { unbind: numbers(slots), ..Default::default() }),
            ["card", mac, address] => {
                network::bring_up(&name(mac), address.parse::<Ipv4Addr>().expect("an address"));
                "ok".into()
            }
            ["link", mac, up] => link(&name(mac), up),
            ["cards"] => format!("ok {}", cards().into_iter().map(|(_, mac)| mac).collect::<Vec<_>>().join(" ")),
            _ => panic!("no command {line:?}"),
        };
        writeln!(answers, "{answer}").expect("answering the host");
    }
}

fn numbers(words: &[&str]) -> Vec<u32> {
    words.iter().map(|word| word.parse().expect("a number")).collect()
}

fn apply(request: &BindDevicesRequest) -> String {
    match Slots::default().apply(request) {
        Ok(()) => "ok".into(),
        Err(error) => format!("error {error}"),
    }
}

/// Name and hardware address of every card.
fn cards() -> Vec<(String, String)> {
    let entries = fs::read_dir("/sys/class/net").expect("/sys/class/net");
    let mut cards: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| name.starts_with("eth"))
        .map(|name| (attribute(&name, "address"), name))
        .map(|(mac, name)| (name, mac))
        .collect();
    cards.sort_by(|one, other| one.1.cmp(&other.1));
    cards
}

fn name(mac: &str) -> String {
    let card = cards().into_iter().find(|card| card.1 == mac);
    card.unwrap_or_else(|| panic!("no card {mac}")).0
}

fn link(name: &str, up: &str) -> String {
    // Linux looks at the link on a work queue of its own.
    let limit = Instant::now() + LINK_LIMIT;
    while attribute(name, "carrier") != up {
        if Instant::now() > limit {
            return format!("error the link of {name} is not {up} after {LINK_LIMIT:?}");
        }
        std::thread::yield_now();
    }
    "ok".into()
}

fn attribute(name: &str, attribute: &str) -> String {
    let path = format!("/sys/class/net/{name}/{attribute}");
    fs::read_to_string(&path).expect(&path).trim().to_owned()
}

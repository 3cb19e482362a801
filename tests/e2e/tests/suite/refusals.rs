//! The Task service wrongly used: every refusal has the gRPC code that containerd acts on. runc's shim is asked the
//! same; it often has no code at all (UNKNOWN) where Caisson has one (docs/differences.md).

use caisson_e2e::{
    Host, Runtime,
    direct::Direct,
    task::{Answer, Streams, Task},
};
use serde_json::json;
use ttrpc::Code;

caisson_e2e::for_each_runtime!(nobody, running, created_and_stopped);
caisson_e2e::caisson_only!(names_that_are_taken);

/// What a wrong use is answered.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// By both.
    Both(Code),
    /// Caisson says why; runc's shim gives its words without a code.
    RuncUnknown(Code),
}
use Expected::{Both, RuncUnknown};

/// All answers that are not as expected, so that one run shows every one.
struct Answers {
    runtime: Runtime,
    wrong: Vec<String>,
}

impl Answers {
    fn of(host: &Host) -> Self {
        Self { runtime: host.runtime, wrong: Vec::new() }
    }

    fn expect<T: std::fmt::Debug>(&mut self, what: &str, answer: Answer<T>, expected: Expected) {
        let code = answer.as_ref().map_or_else(ttrpc::Status::code, |_| Code::OK);
        let right = match (expected, self.runtime) {
            (Both(wanted), _) | (RuncUnknown(wanted), Runtime::Caisson) => code == wanted,
            // A later runc may know better.
            (RuncUnknown(wanted), Runtime::Runc) => code == Code::UNKNOWN || code == wanted,
        };
        if !right {
            self.wrong.push(format!("{what}: {expected:?} was expected, the answer is {answer:?}"));
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
        }
    }
}

/// Every call on what does not exist.
fn missing(answers: &mut Answers, task: &Task, exec: &str) {
    let mut expect = |what: &str, code: Answer<()>| {
        answers.expect(&format!("{what} of {:?} {exec:?}", task.id), code, Both(Code::NOT_FOUND));
    };
    expect("State", task.state(exec).map(drop));
    expect("Start", task.start(exec).map(drop));
    expect("Wait", task.wait(exec).map(drop));
    expect("Kill", task.kill(exec, 15, false));
    expect("Delete", task.delete(exec).map(drop));
    expect("ResizePty", task.resize(exec, 80, 24));
    if exec.is_empty() {
        expect("CloseIO", task.close_stdin(exec));
        expect("Exec", task.exec("x", &["true"], &Streams::default()));
        expect("Pids", task.pids().map(drop));
        expect("Pause", task.pause());
        expect("Resume", task.resume());
        expect("Update", task.update(&json!({ "pids": { "limit": 100 } })));
        expect("Stats", task.stats().map(drop));
    } else {
        answers.expect("CloseIO of no exec", task.close_stdin(exec), RuncUnknown(Code::NOT_FOUND));
    }
}

fn nobody(host: &Host) {
    let pod = Direct::start(host, "nobody", &["sleep", "100000"]);
    let mut answers = Answers::of(host);
    // Before there is any container, and for another container than the one there is.
    missing(&mut answers, &pod.task, "");
    pod.run();
    missing(&mut answers, &Task::new(&pod.shim, "somebody-else"), "");
    missing(&mut answers, &pod.task, "no-such-exec");
    let connected = Task::new(&pod.shim, "somebody-else").connect().expect("Connect");
    assert_eq!(connected.task_pid, 0);
    pod.kill_and_delete();
    missing(&mut answers, &pod.task, "");
    pod.end();
}

fn running(host: &Host) {
    let pod = Direct::start(host, "running", &["sleep", "100000"]);
    pod.run();
    let (task, mut answers) = (&pod.task, Answers::of(host));
    let none = Streams::default();
    answers.expect("a second Start", task.start(""), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Delete of the running", task.delete(""), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Resume of the running", task.resume(), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("signal 200", task.kill("", 200, false), RuncUnknown(Code::INVALID_ARGUMENT));
    answers.expect("Update to nonsense", task.update(&json!("much")), RuncUnknown(Code::INVALID_ARGUMENT));

    task.exec("one", &["sleep", "100000"], &none).expect("Exec");
    answers.expect("a second exec of the name", task.exec("one", &["true"], &none), Both(Code::ALREADY_EXISTS));
    answers.expect("Kill of the unstarted", task.kill("one", 15, false), Both(Code::FAILED_PRECONDITION));
    task.start("one").expect("Start of an exec");
    // containerd 1.7's own shim counts a start that it has refused as one under way, and ends in a panic at the exit.
    let twice = host.runtime == Runtime::Caisson;
    if twice {
        answers.expect("a second Start of an exec", task.start("one"), Both(Code::FAILED_PRECONDITION));
    }
    answers.expect("Delete of a running exec", task.delete("one"), RuncUnknown(Code::FAILED_PRECONDITION));
    task.kill("one", 9, false).expect("Kill of an exec");
    assert_eq!(task.wait("one").expect("Wait"), 137);
    answers.expect("Kill of an ended exec", task.kill("one", 9, false), Both(Code::NOT_FOUND));
    if twice {
        answers.expect("Start of an ended exec", task.start("one"), Both(Code::FAILED_PRECONDITION));
    }
    task.delete("one").expect("Delete of an exec");

    task.exec("two", &["/no/such/program"], &none).expect("Exec");
    answers.expect("Start of no program", task.start("two"), RuncUnknown(Code::FAILED_PRECONDITION));
    task.delete("two").expect("Delete of an exec that did not start");
    let status = task.status("").expect("State");
    assert_eq!(status, containerd_shim_protos::api::Status::RUNNING, "wrong uses do it no harm");
    pod.kill_and_delete();
    pod.end();
}

fn created_and_stopped(host: &Host) {
    let pod = Direct::start(host, "stopped", &["sleep", "100000"]);
    pod.create(&Streams::default()).expect("Create");
    let (task, mut answers) = (&pod.task, Answers::of(host));
    answers.expect("Pause of the created", task.pause(), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Resume of the created", task.resume(), RuncUnknown(Code::FAILED_PRECONDITION));
    task.start("").expect("Start");
    task.kill("", 15, false).expect("Kill, which a first process without a handler ignores");
    task.kill("", 9, false).expect("Kill");
    assert_eq!(task.wait("").expect("Wait"), 137);
    answers.expect("Start of the stopped", task.start(""), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Kill of the stopped", task.kill("", 9, false), Both(Code::NOT_FOUND));
    let exec = task.exec("late", &["true"], &Streams::default());
    answers.expect("Exec in the stopped", exec, RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Pause of the stopped", task.pause(), RuncUnknown(Code::FAILED_PRECONDITION));
    answers.expect("Resume of the stopped", task.resume(), RuncUnknown(Code::FAILED_PRECONDITION));
    assert_eq!(task.delete("").expect("Delete"), 137);
    pod.end();
}

/// runc's shim takes a second Create for the first one's failure and unmounts its root, so it is not asked.
fn names_that_are_taken(host: &Host) {
    let pod = Direct::start(host, "taken", &["sleep", "100000"]);
    pod.run();
    let mut answers = Answers::of(host);
    let again = pod.task.create(pod.bundle.create_request(Vec::new()), &Streams::default());
    answers.expect("a second Create", again, Both(Code::ALREADY_EXISTS));
    let names = ["../up", "", "a/b", "a\nb"];
    for name in names {
        let exec = pod.task.exec(name, &["true"], &Streams::default());
        answers.expect(&format!("an exec named {name:?}"), exec, Both(Code::INVALID_ARGUMENT));
        let other = Task::new(&pod.shim, name);
        let create = other.create(pod.bundle.create_request(Vec::new()), &Streams::default());
        answers.expect(&format!("a container named {name:?}"), create, Both(Code::INVALID_ARGUMENT));
    }
    answers.expect("Checkpoint", pod.task.checkpoint(&pod.bundle.directory), Both(Code::UNIMPLEMENTED));
    pod.kill_and_delete();
    pod.end();
}

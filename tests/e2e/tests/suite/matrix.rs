//! Every part of a pod, and containerd itself, killed at every moment of a task's life: containerd can report the task
//! and delete it, nothing stays, and the pod beside it notices nothing. After a restart containerd finds its tasks and
//! goes on using them. Every day some of the 36 cells, in full size all; `crash` has some more of the everyday ones. The pods
//! have a network, and their network namespace is afterwards as it was.
//!
//! No moment is guessed by time. Before Create, the shim's address is kept from containerd ([`Gate`]). During Create,
//! Exec and Delete, the pod's file server is stopped, and a request that waits for it shows that the call has come that
//! far ([`Hold`]). After Create, `ctr` gives up for want of a place for its pid file.

use std::time::Instant;

use caisson_e2e::{
    Finished, Host, Runtime, Setup,
    gate::Gate,
    guest_memory,
    hold::Hold,
    network::{self, Netns},
    process::{self, Process, Running},
    sizes, until,
    wait::STEP,
};
use rustix::process::Signal;

caisson_e2e::for_each_runtime!(shim in setup(), containerd in setup());
caisson_e2e::caisson_only!(monitor in setup(), file_server in setup(), agent in setup(), kernel in setup());

fn setup() -> Setup {
    Setup::default().own_network()
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Shim,
    Monitor,
    FileServer,
    /// The guest's first process, with which its kernel panics.
    Agent,
    /// The guest's kernel: a triple fault.
    Kernel,
    Containerd,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    BeforeCreate,
    DuringCreate,
    AfterCreate,
    Running,
    DuringExec,
    DuringDelete,
}
use Moment::{AfterCreate, BeforeCreate, DuringCreate, DuringDelete, DuringExec, Running as WhileRunning};

const MOMENTS: [Moment; 6] = [BeforeCreate, DuringCreate, AfterCreate, WhileRunning, DuringExec, DuringDelete];

fn shim(host: &Host) {
    row(host, Part::Shim, &[BeforeCreate, WhileRunning]);
}

fn monitor(host: &Host) {
    row(host, Part::Monitor, &[DuringCreate]);
}

fn file_server(host: &Host) {
    row(host, Part::FileServer, &[AfterCreate, DuringExec]);
}

fn agent(host: &Host) {
    row(host, Part::Agent, &[BeforeCreate]);
}

fn kernel(host: &Host) {
    row(host, Part::Kernel, &[WhileRunning]);
}

fn containerd(host: &Host) {
    row(host, Part::Containerd, &[WhileRunning]);
}

/// One part at all moments, or every day at some, beside a pod that lives through all of it.
fn row(host: &Host, part: Part, everyday: &[Moment]) {
    host.configure(&host.configuration().set("log_level", "\"debug\"").to_text());
    let gate = Gate::build(host);
    let neighbour = host.container("neighbour").start_idle();
    let mut netns = Netns::new(host, "killed");
    netns.attach("eth0", &[network::bridge(host, 1)]);
    let before = netns.state();
    host.count_anew();
    let moments = if sizes::full() { &MOMENTS } else { everyday };
    for (index, moment) in moments.iter().enumerate() {
        // runc has no file server that could be stopped, and containerd 1.6 never ends a shim of runc's that it
        // started and then forgot before Create.
        let held = matches!(moment, DuringCreate | DuringExec | DuringDelete);
        let forgotten = part == Part::Containerd && *moment == BeforeCreate;
        if host.runtime == Runtime::Caisson || !(held || forgotten) {
            cell(host, &gate, &netns, part, *moment);
            assert_eq!(netns.state(), before, "{part:?} killed {moment:?}: the network namespace is not as it was");
            let told = neighbour.exec(&format!("asked-{index}"), &["echo", "unharmed"]);
            assert_eq!(told.succeeded(), "unharmed\n", "{part:?} killed {moment:?}");
        }
    }
    if part == Part::Containerd {
        // Its `ctr run` went with the first containerd.
        remove(host, &neighbour.id);
    } else {
        assert_eq!(neighbour.end().code, Some(137));
    }
}

/// A pod at the moment at which something is to be killed.
struct Scene<'a> {
    host: &'a Host,
    id: String,
    /// The shim's daemon.
    shim: Process,
    hold: Option<Hold>,
    /// The `ctr` that is in the middle of something.
    client: Option<Running>,
}

fn cell(host: &Host, gate: &Gate, netns: &Netns, part: Part, moment: Moment) {
    let mut scene = Scene::reach(host, gate, netns, moment, &format!("{part:?}-{moment:?}").to_lowercase());
    let begin = Instant::now();
    scene.kill(part);
    gate.open();
    if part == Part::Containerd {
        scene.hold = None;
        scene.goes_on(moment);
    } else {
        scene.is_reported();
    }
    let reported = begin.elapsed();
    scene.hold = None;
    if let Some(client) = scene.client.take() {
        let finished = Finished::of(client, STEP);
        let survives = moment == DuringDelete;
        assert!(survives || finished.code != Some(0), "{part:?} killed {moment:?}: {finished:?}");
    }
    remove(host, &scene.id);
    host.forgive_socket_of_runc(&scene.id);
    if part == Part::Shim && moment == BeforeCreate {
        // containerd 1.6 forgets a shim that dies before the first connection: what is left goes with the next pod.
        host.container("next").run(&["true"]).succeeded();
    }
    host.expect_nothing_left();
    println!("{part:?} killed {moment:?}: reported after {reported:?}, gone after {:?}", begin.elapsed());
}

impl<'a> Scene<'a> {
    /// Brings a pod to `moment`.
    fn reach(host: &'a Host, gate: &Gate, netns: &Netns, moment: Moment, name: &str) -> Self {
        let id = host.container(name).id;
        if moment == BeforeCreate || moment == DuringCreate {
            gate.close();
            let client = Running::start(&mut run(host, netns, &id, &[]));
            gate.wait();
            let mut scene = Self::new(host, id, Some(client));
            if host.runtime == Runtime::Caisson {
                scene.wait_for_the_agent();
            }
            if moment == DuringCreate {
                scene.hold = Some(Hold::of(&scene.child("caisson-fsd")));
                gate.open();
                scene.held("Create");
            }
            return scene;
        }
        if moment == AfterCreate {
            let given_up =
                finish(Running::start(&mut run(host, netns, &id, &["--pid-file", "/no/such/directory/pid"])));
            assert!(given_up.err().contains("/no/such/directory"), "{given_up:?}");
            assert!(is(host, &id, "CREATED"), "it was created and not started");
            return Self::new(host, id, None);
        }
        finish(Running::start(&mut run(host, netns, &id, &[]))).succeeded();
        let mut scene = Self::new(host, id, None);
        match moment {
            DuringExec => {
                scene.hold = Some(Hold::of(&scene.child("caisson-fsd")));
                // A program that nobody has looked for yet.
                let arguments = ["task", "exec", "--exec-id", "held", &scene.id, "/bin/tac"];
                scene.client = Some(start(host.ctr(arguments)));
                scene.held("Exec");
            }
            DuringDelete => {
                host.ctr_output(["task", "kill", "--signal", "SIGKILL", &scene.id]).succeeded();
                until("the task to be reported as stopped", STEP, || is(host, &scene.id, "STOPPED").then_some(()));
                scene.hold = Some(Hold::of(&scene.child("caisson-fsd")));
                scene.client = Some(start(host.ctr(["task", "delete", &scene.id])));
                scene.held("Delete");
            }
            _ => {}
        }
        scene
    }

    fn new(host: &'a Host, id: String, client: Option<Running>) -> Self {
        let program = match host.runtime {
            Runtime::Caisson => "containerd-shim-caisson-v2",
            Runtime::Runc => "containerd-shim-runc-v2",
        };
        let mut shims = host.running(program);
        shims.retain(|process| process.command.contains(&id));
        assert_eq!(shims.len(), 1, "shims of {id}: {shims:?}");
        Self { host, id, shim: shims.remove(0), hold: None, client }
    }

    /// The shim's child that runs `program`.
    fn child(&self, program: &str) -> Process {
        let mut found = self.host.running(program);
        found.retain(|process| process.parent == self.shim.pid);
        assert_eq!(found.len(), 1, "{program} of {}: {found:?}", self.id);
        found.remove(0)
    }

    fn wait_for_the_agent(&self) {
        until("the agent to be ready", STEP, || {
            let log = self.host.containerd.log();
            log.lines().any(|line| line.contains(&self.id) && line.contains("agent ready")).then_some(())
        });
    }

    fn held(&self, call: &str) {
        self.hold.as_ref().expect("the file server was stopped").wait(call);
    }

    fn kill(&self, part: Part) {
        let kill = |process: Process| process::signal(process.pid, Signal::KILL);
        match part {
            Part::Shim => kill(self.shim.clone()),
            Part::Monitor => kill(self.child("caisson-vmm")),
            Part::FileServer => kill(self.child("caisson-fsd")),
            Part::Agent => guest_memory::spoil_agent(self.child("caisson-vmm").pid),
            Part::Kernel => guest_memory::spoil_kernel(self.child("caisson-vmm").pid),
            Part::Containerd => self.host.crash_containerd(),
        }
        if matches!(part, Part::Agent | Part::Kernel) {
            // A guest that sleeps has to be woken to notice.
            self.host.ctr_output(["task", "ps", &self.id]);
        }
    }

    /// containerd says that the task does not run, or that there is none.
    fn is_reported(&self) {
        until("containerd to report the task as ended", STEP, || {
            let tasks = self.host.ctr_output(["task", "list"]).succeeded();
            let line = tasks.lines().find(|line| line.contains(&self.id));
            line.is_none_or(|line| line.contains("STOPPED")).then_some(())
        });
    }

    /// A new containerd has the task as it was, and uses it.
    fn goes_on(&self, moment: Moment) {
        let host = self.host;
        match moment {
            WhileRunning | DuringExec => {
                assert!(is(host, &self.id, "RUNNING"), "the new containerd does not know it");
                let events = Running::start(&mut host.ctr(["events"]));
                let told = host.ctr_output(["task", "exec", "--exec-id", "hello", &self.id, "echo", "still here"]);
                assert_eq!(told.succeeded(), "still here\n");
                host.ctr_output(["task", "kill", "--signal", "SIGKILL", &self.id]).succeeded();
                until("the task to be reported as stopped", STEP, || is(host, &self.id, "STOPPED").then_some(()));
                events.stdout.wait_for("the event of its exit", STEP, |text| {
                    let exit =
                        |line: &str| line.contains("/tasks/exit") && line.contains(&format!("\"id\":\"{}\"", self.id));
                    text.lines().any(exit).then_some(())
                });
            }
            AfterCreate => assert!(is(host, &self.id, "CREATED"), "the new containerd does not know it"),
            BeforeCreate | DuringCreate | DuringDelete => {}
        }
    }
}

fn run(host: &Host, netns: &Netns, id: &str, flags: &[&str]) -> std::process::Command {
    let mut command = host.ctr(["run", "--detach", "--null-io", "--runtime", host.runtime.name()]);
    command.args(["--snapshotter", host.snapshotter()]).args(netns.flags()).args(flags).args([
        host.image_name(),
        id,
        "sleep",
        "100000",
    ]);
    command
}

fn start(mut command: std::process::Command) -> Running {
    let mut running = Running::start(&mut command);
    running.close_stdin();
    running
}

fn finish(mut running: Running) -> Finished {
    running.close_stdin();
    Finished::of(running, STEP)
}

fn is(host: &Host, id: &str, state: &str) -> bool {
    let tasks = host.ctr_output(["task", "list"]).succeeded();
    tasks.lines().any(|line| line.contains(id) && line.contains(state))
}

/// Deletes the task, if there is still one, and the container.
fn remove(host: &Host, id: &str) {
    until(&format!("task {id} to be deletable"), STEP, || {
        let deleted = host.ctr_output(["task", "delete", "--force", id]);
        let gone = deleted.err().contains("not found") || deleted.err().contains("no running task");
        (deleted.code == Some(0) || gone).then_some(())
    });
    let deleted = host.ctr_output(["container", "delete", id]);
    assert!(deleted.code == Some(0) || deleted.err().contains("not found"), "{deleted:?}");
    host.ctr_output(["snapshot", "--snapshotter", host.snapshotter(), "delete", id]);
}

//! One file by two names, and one file with two writers.

use std::{fs, io::Write, thread};

use caisson_e2e::{Finished, Host, Setup, host::Image, sizes, wait::STEP};

use super::{holds, mounted, volume, with_volume};

caisson_e2e::for_each_runtime!(
    one_directory_at_two_places in Setup::default().image(Image::Probe).disk(64),
    two_writers_append in Setup::default().image(Image::Probe).disk(64),
);

const TABLE: &str = "
    a file: done
    by the other name: content
    the same file: true
    flock: done
    flock by the other name: EAGAIN
    flock given back: done
    flock by the other name afterwards: done
    OFD lock: done
    OFD lock by the other name: EAGAIN
    connect by the other name: done
    heard: through a socket
    a FIFO: done
    written by the one name: done
    read by the other name: through a FIFO
    one page: done
    stored in one mapping: x
    stored in the other: y
    read from the file: xy
    a link from one to the other: EXDEV
    a rename from one to the other: EXDEV
    unlinked by the other name: done
    by the one name: ENOENT";

fn one_directory_at_two_places(host: &Host) {
    let directory = volume(host);
    let container = mounted(mounted(host.container("twice"), &directory, "/one"), &directory, "/other");
    holds(host, &container.run(&["probe", "cases", "sharing", "/one", "/other"]).succeeded(), TABLE);
    // A mount of what lies in another one.
    let inner = directory.join("inner");
    fs::create_dir(&inner).expect("a new directory");
    let container = mounted(mounted(host.container("inner"), &directory, "/outer"), &inner, "/inner");
    holds(host, &container.run(&["probe", "cases", "sharing", "/outer/inner", "/inner"]).succeeded(), TABLE);
}

/// Two pods and the host append to one file at a time, and every line of theirs is there, in their order.
fn two_writers_append(host: &Host) {
    let directory = volume(host);
    let log = directory.join("log");
    fs::write(&log, "").expect("it is written");
    let count = sizes::size(300, 5000);
    let pods = ["first", "second"].map(|name| with_volume(host, name, &directory).start_idle());
    let number = count.to_string();
    let appending = [("first", &pods[0]), ("second", &pods[1])]
        .map(|(name, pod)| pod.exec_start("append", &["probe", "cases", "append", "/v/log", name, &number]));
    for running in &appending {
        running.stdout.wait_for("its first line", STEP, |text| text.contains("appends\n").then_some(()));
    }
    let mut file = fs::File::options().append(true).open(&log).expect("it is there");
    let writer =
        thread::spawn(move || (0..count).try_for_each(|index| file.write_all(format!("host {index}\n").as_bytes())));
    writer.join().expect("it does not panic").expect("the host appends");
    for running in appending {
        assert_eq!(Finished::of(running, STEP).succeeded(), "appends\nappend: done\n");
    }
    let text = fs::read_to_string(&log).expect("it is there");
    for name in ["first", "second", "host"] {
        let found: Vec<&str> = text.lines().filter(|line| line.starts_with(name)).collect();
        let expected: Vec<String> = (0..count).map(|index| format!("{name} {index}")).collect();
        assert!(found == expected, "{} lines of {name}, not {count}", found.len());
    }
    assert_eq!(text.lines().count(), 3 * count);
    // And each reads what the others have written.
    for pod in pods {
        assert_eq!(pod.exec("count", &["wc", "-l", "/v/log"]).succeeded(), format!("{} /v/log\n", 3 * count));
        pod.end();
    }
}

//! Files that a container shares with the host and with other pods, and disks that are full.

use std::{
    fs::{self, File},
    path::Path,
};

use caisson_e2e::{Host, Setup, host::Image, pod::Container, wait::STEP};
use rustix::fs::{FlockOperation, flock};

caisson_e2e::for_each_runtime!(
    locks_meet in Setup::default().image(Image::Debian),
    locks_of_processes in Setup::default().image(Image::Debian),
    a_full_disk_is_seen_at_write in Setup::default().disk(96),
);

fn volume(host: &Host) -> std::path::PathBuf {
    let directory = host.directory().join("volume");
    fs::create_dir(&directory).expect("a new directory");
    fs::write(directory.join("file"), "").expect("it is written");
    directory
}

fn with_volume<'a>(host: &'a Host, name: &str, directory: &Path) -> Container<'a> {
    host.container(name).flag(format!("--mount=type=bind,src={},dst=/v,options=rbind:rw", directory.display()))
}

/// Takes flock(2)'s lock of the file, waiting or not, and then does what it is told.
const TAKE: &str = r#"open(F, "<", "/v/file") or die; flock(F, 2 | 4) and exit 0; exit 1"#;
const WAIT: &str = r#"$| = 1; print "waits\n"; open(F, "<", "/v/file") or die; flock(F, 2) or die; print "has it\n""#;
const HOLD: &str = r#"$| = 1; open(F, "<", "/v/file") or die; flock(F, 2) or die; print "held\n"; sleep 100000"#;

fn locks_meet(host: &Host) {
    let directory = volume(host);
    let file = File::open(directory.join("file")).expect("it is there");
    let first = with_volume(host, "first", &directory).start_idle();
    let second = with_volume(host, "second", &directory).start_idle();

    flock(&file, FlockOperation::LockExclusive).expect("nobody else has it");
    assert_eq!(first.exec("refused", &["perl", "-e", TAKE]).code, Some(1), "the host has it");
    // Who waits is killed like anybody else, or gets it when the host gives it back.
    let waits = ["perl", "-e", WAIT];
    let (killed, patient) = (first.exec_start("killed", &waits), second.exec_start("patient", &waits));
    for waiting in [&killed, &patient] {
        waiting.stdout.wait_for("its first line", STEP, |text| text.contains("waits\n").then_some(()));
    }
    first.kill_exec("killed", "SIGKILL");
    assert_eq!(caisson_e2e::Finished::of(killed, STEP).code, Some(137));
    flock(&file, FlockOperation::Unlock).expect("it is ours");
    assert_eq!(caisson_e2e::Finished::of(patient, STEP).succeeded(), "waits\nhas it\n");

    // One pod has it: neither the host nor the other pod gets it, until its holder is killed.
    let holder = first.exec_start("holder", &["perl", "-e", HOLD]);
    holder.stdout.wait_for("its first line", STEP, |text| text.contains("held\n").then_some(()));
    assert!(flock(&file, FlockOperation::NonBlockingLockShared).is_err(), "a pod has it");
    assert_eq!(second.exec("other", &["perl", "-e", TAKE]).code, Some(1), "another pod has it");
    first.kill_exec("holder", "SIGKILL");
    assert_eq!(caisson_e2e::Finished::of(holder, STEP).code, Some(137));
    first.end();
    second.exec("freed", &["perl", "-e", TAKE]).succeeded();
    flock(&file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
    second.end();
}

/// Two processes that wait for each other: one of them is refused. And a lock on some bytes is one on these alone.
const DEADLOCK: &str = r#"
use Fcntl;
sub lock_it { fcntl($_[0], $_[1], pack("s s x4 q q l x4", F_WRLCK, 0, $_[2], $_[3], 0)) ? 0 : $!{EDEADLK} ? 1 : $!{EAGAIN} ? 2 : 9 }
open(my $f, "+<", "/v/file") or die; print "other ", lock_it($f, F_SETLK, 100, 10), " taken ", lock_it($f, F_SETLK, 0, 10), "\n";
open(my $a, "+>", "/v/a") or die; open(my $b, "+>", "/v/b") or die;
pipe(my $r, my $w); my $child = fork;
if (!$child) { lock_it($b, F_SETLKW, 0, 0); syswrite($w, "x"); exit lock_it($a, F_SETLKW, 0, 0) }
lock_it($a, F_SETLKW, 0, 0); sysread($r, my $x, 1);
my $mine = lock_it($b, F_SETLKW, 0, 0); my $free = pack("s s x4 q q l x4", F_UNLCK, 0, 0, 0, 0); fcntl($a, F_SETLK, $free);
waitpid($child, 0); print "deadlocks ", $mine + ($? >> 8), "\n";
"#;

fn locks_of_processes(host: &Host) {
    let directory = volume(host);
    let file = File::options().write(true).open(directory.join("file")).expect("it is there");
    let mut lock = libc::flock64 { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 5, l_len: 1, l_pid: 0 };
    // SAFETY: the descriptor is open, and the command reads a flock64.
    let locked = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::F_OFD_SETLK, &mut lock) };
    assert_eq!(locked, 0, "nobody else has it");
    let finished = with_volume(host, "perl", &directory).run(&["perl", "-e", DEADLOCK]);
    assert_eq!(finished.succeeded(), "other 0 taken 2\ndeadlocks 1\n");
}

fn a_full_disk_is_seen_at_write(host: &Host) {
    let script = "dd if=/dev/zero of=/fill bs=1M 2> /dev/null; seq 1 100000 > /h || echo refused; \
        rm /fill; seq 1 100000 > /h && wc -l < /h";
    let finished = host.container("full").sh(script);
    assert_eq!(finished.succeeded(), "refused\n100000\n");
}

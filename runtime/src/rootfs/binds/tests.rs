use std::os::unix::{fs::symlink, net::UnixListener};

use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::mkfifo,
};
use proptest::prelude::*;

use super::*;
use crate::{
    host::paths::PodPaths,
    rootfs::share::{Binds, Share, enter_mount_namespace},
    scratch::Scratch,
};

/// Each test runs in a thread of its own, which may have a mount namespace of its own.
struct Stage {
    state: Scratch,
    share: Share,
    paths: PodPaths,
}

fn stage() -> Stage {
    enter_mount_namespace().expect("these tests run as root");
    let state = Scratch::new();
    let paths = PodPaths::new(state.path(), "ns", "pod");
    paths.create(Path::new("/bundle"), Path::new("/socket")).unwrap();
    let share = Share::mount(&paths).unwrap();
    fs::create_dir(state.path().join("host")).unwrap();
    fs::create_dir(paths.shared().join("one")).unwrap();
    Stage { state, share, paths }
}

fn tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount(Some("t"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

impl Stage {
    fn host(&self, name: &str) -> PathBuf {
        self.state.path().join("host").join(name)
    }

    fn bind(&self, index: u32, source: &Path, recursive: bool, read_only: bool) -> Bind {
        Bind { index, destination: "/inside".into(), source: source.to_owned(), recursive, read_only }
    }

    fn mounted(&self, binds: &[Bind]) -> Binds {
        self.share.mount_binds("one", open(binds).unwrap()).unwrap()
    }

    /// As caisson-fsd sees it.
    fn seen(&self, index: u32) -> PathBuf {
        self.paths.view().join(Share::bind_place("one", index))
    }
}

fn refused(bind: &Bind, words: &[&str]) {
    let message = open(std::slice::from_ref(bind)).expect_err("refused").to_string();
    assert_eq!(check(std::slice::from_ref(bind)).expect_err("before, too").to_string(), message);
    let source = format!("{:?}", bind.source);
    for word in words.iter().copied().chain(["mounts[7] (/inside)", &source]) {
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn files_and_directories_appear_and_go() {
    let stage = stage();
    fs::create_dir(stage.host("dir")).unwrap();
    fs::write(stage.host("dir/file"), "old").unwrap();
    fs::write(stage.host("file"), "content").unwrap();
    symlink("file", stage.host("link")).unwrap();
    let binds = [
        stage.bind(0, &stage.host("dir"), true, false),
        stage.bind(3, &stage.host("file"), false, false),
        stage.bind(4, &stage.host("link"), false, true),
    ];
    let mounted = stage.mounted(&binds);
    fs::write(stage.seen(0).join("file"), "from the guest").unwrap();
    assert_eq!(fs::read_to_string(stage.host("dir/file")).unwrap(), "from the guest");
    fs::write(stage.seen(3), "changed").unwrap();
    assert_eq!(fs::read_to_string(stage.seen(4)).unwrap(), "changed", "a link leads to its file on the host");
    assert!(fs::write(stage.seen(4), "x").is_err(), "read-only");
    drop(mounted);
    assert_eq!(fs::read_dir(stage.paths.shared().join("one")).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(stage.host("file")).unwrap(), "changed");
    assert!(stage.host("dir/file").exists());
}

#[test]
fn what_is_read_only_is_so_with_all_below_it_for_everybody() {
    let stage = stage();
    tmpfs(&stage.host("dir"));
    tmpfs(&stage.host("dir/below"));
    fs::write(stage.host("dir/below/file"), "").unwrap();
    let mounted = stage.mounted(&[stage.bind(0, &stage.host("dir"), true, true)]);
    for place in [stage.paths.shared().join(Share::bind_place("one", 0)), stage.seen(0)] {
        assert!(place.join("below/file").exists());
        for file in ["new", "below/new", "below/file"] {
            let error = fs::write(place.join(file), "x").expect_err(file);
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{file}");
        }
    }
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let lines: Vec<_> = mounts.lines().filter(|line| line.contains("/one/mounts/0")).collect();
    assert_eq!(lines.len(), 4, "two mounts in two places: {lines:?}");
    for line in lines {
        let options = line.split(' ').nth(5).unwrap();
        for flag in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(options.split(',').any(|option| option == flag), "{flag} is missing: {line}");
        }
    }
    drop(mounted);
    fs::write(stage.host("dir/below/file"), "the host may").unwrap();
}

#[test]
fn without_rbind_nothing_below_comes_along_and_later_mounts_never_do() {
    let stage = stage();
    tmpfs(&stage.host("dir"));
    mount(None::<&str>, &stage.host("dir"), None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    tmpfs(&stage.host("dir/below"));
    fs::write(stage.host("dir/below/file"), "").unwrap();
    fs::create_dir(stage.host("dir/later")).unwrap();
    let binds = [stage.bind(0, &stage.host("dir"), false, false), stage.bind(1, &stage.host("dir"), true, true)];
    let _mounted = stage.mounted(&binds);
    tmpfs(&stage.host("dir/later"));
    fs::write(stage.host("dir/later/file"), "").unwrap();
    assert!(!stage.seen(0).join("below/file").exists() && stage.seen(1).join("below/file").exists());
    assert!(!stage.seen(0).join("later/file").exists() && !stage.seen(1).join("later/file").exists());
}

#[test]
fn sources_that_cannot_work_are_refused_by_name() {
    let stage = stage();
    let bind = |source: &Path| stage.bind(7, source, true, true);
    let _listener = UnixListener::bind(stage.host("socket")).unwrap();
    mkfifo(&stage.host("fifo"), Mode::S_IRWXU).unwrap();
    let node = |name: &str, kind, number| mknod(&stage.host(name), kind, Mode::S_IRWXU, number).unwrap();
    node("disk", SFlag::S_IFBLK, makedev(7, 0));
    node("kvm", SFlag::S_IFCHR, makedev(10, 232));
    refused(&bind(&stage.host("none")), &["No such file"]);
    refused(&bind(&stage.host("socket")), &["is a socket"]);
    refused(&bind(&stage.host("fifo")), &["is a FIFO"]);
    refused(&bind(&stage.host("disk")), &["device 7:0"]);
    refused(&bind(&stage.host("kvm")), &["device 10:232"]);
    refused(&bind(Path::new("/proc")), &["is on proc"]);
    refused(&bind(Path::new("/proc/sys/kernel")), &["is on proc"]);
    refused(&bind(Path::new("/sys")), &["is on sysfs"]);
    refused(&bind(Path::new("/dev")), &["/dev"]);
    fs::create_dir_all("/dev/shm").unwrap();
    refused(&bind(Path::new("/dev/shm")), &["shared memory"]);
    symlink("/proc/self", stage.host("way")).unwrap();
    refused(&bind(&stage.host("way/root/proc")), &["is on proc"]);
}

#[test]
fn a_file_system_of_the_kernel_below_is_refused_unless_it_stays_outside() {
    let stage = stage();
    fs::create_dir_all(stage.host("a dir/proc")).unwrap();
    mount(Some("p"), &stage.host("a dir/proc"), Some("proc"), MsFlags::empty(), None::<&str>).unwrap();
    let point = stage.host("a dir/proc").display().to_string();
    refused(&stage.bind(7, &stage.host("a dir"), true, false), &["has proc", &point, "bind instead of rbind"]);
    let _mounted = stage.mounted(&[stage.bind(0, &stage.host("a dir"), false, false)]);
    assert!(!stage.seen(0).join("proc/self").exists());
}

#[test]
fn a_device_that_the_guest_has_becomes_a_node_for_it() {
    let stage = stage();
    let opened = open(&[stage.bind(0, Path::new("/dev/null"), false, false)]).unwrap();
    assert!(matches!(opened.as_slice(), [(0, Source::Device(1, 3))]));
    let mounted = stage.share.mount_binds("one", opened).unwrap();
    let stat = nix::sys::stat::stat(&stage.seen(0)).unwrap();
    assert_eq!((stat.st_rdev, stat.st_mode & 0o7777), (makedev(1, 3), 0o666));
    assert!(fs::read(stage.seen(0)).is_err(), "nobody on the host opens it there");
    drop(mounted);
    assert_eq!(fs::read_dir(stage.paths.shared().join("one")).unwrap().count(), 0);
}

#[test]
fn hundreds_fit() {
    let stage = stage();
    let source = |index: u32| stage.host(&format!("file-{index}"));
    for index in 0..500 {
        fs::write(source(index), "x").unwrap();
    }
    let binds: Vec<_> = (0..500).map(|index| stage.bind(index, &source(index), false, true)).collect();
    let _mounted = stage.mounted(&binds);
    assert_eq!(fs::read_to_string(stage.seen(499)).unwrap(), "x");
}

#[test]
fn a_failure_in_the_middle_leaves_nothing() {
    let stage = stage();
    fs::write(stage.host("file"), "x").unwrap();
    fs::write(stage.host("other"), "x").unwrap();
    // The same place twice.
    let binds = ["file", "other"].map(|name| stage.bind(0, &stage.host(name), false, true));
    let sources = open(&binds).unwrap();
    assert!(stage.share.mount_binds("one", sources).is_err());
    assert_eq!(fs::read_dir(stage.paths.shared().join("one")).unwrap().count(), 0);
}

proptest! {
    #[test]
    fn any_mountinfo_is_read(text in "([a-z0-9/ \\\\-]{0,40}\n?){0,3}", path in "/[a-z/]{0,5}") {
        let _ = kernels_below(&text, Path::new(&path));
        let _ = unescape(&text);
    }
}

#[test]
fn one_source_twice_is_one_mount_unless_something_differs() {
    let stage = stage();
    let (host, link) = (stage.host("d"), stage.host("link"));
    fs::create_dir(&host).unwrap();
    symlink(&host, &link).unwrap();
    fs::write(host.join("file"), "").unwrap();
    let binds = [
        stage.bind(0, &host, true, false),
        stage.bind(1, &host, true, false),
        stage.bind(2, &link, true, false),
        stage.bind(3, &host, true, true),
        stage.bind(4, &host, false, false),
        stage.bind(5, &host.join("file"), true, false),
        stage.bind(6, &host.join("file"), true, false),
    ];
    let opened = open(&binds).unwrap();
    let same: Vec<_> = opened
        .iter()
        .map(|(index, source)| match source {
            Source::Same(first) => (*index, Some(*first)),
            _ => (*index, None),
        })
        .collect();
    assert_eq!(same, [(0, None), (1, Some(0)), (2, Some(0)), (3, None), (4, None), (5, None), (6, Some(5))]);
    let mounted = stage.share.mount_binds("one", opened).unwrap();
    let place = |index: u32| stage.paths.shared().join(Share::bind_place("one", index));
    assert!(place(0).join("file").exists() && place(3).join("file").exists() && !place(1).exists());
    drop(mounted);
    assert!(!place(0).exists());
}

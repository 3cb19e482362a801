//! The shared directory, mounted in a mount namespace of each test's own.

use super::*;
use crate::scratch::Scratch;

/// Each test runs in a thread of its own, which may have a mount namespace of its own.
fn scratch() -> Scratch {
    enter_mount_namespace().expect("these tests run as root");
    Scratch::new()
}

fn share(state: &Path) -> Share {
    let paths = PodPaths::new(state, "ns", "pod");
    paths.create(Path::new("/bundle"), Path::new("/socket")).unwrap();
    Share::mount(&paths).unwrap()
}

#[test]
fn a_rootfs_appears_in_the_view_which_itself_is_read_only() {
    let state = scratch();
    let share = share(state.path());
    let layer = state.path().join("layer");
    fs::create_dir(&layer).unwrap();
    fs::write(layer.join("hello"), "x").unwrap();
    let bind = Mount {
        kind: "bind".into(),
        source: layer.display().to_string(),
        options: vec!["rbind".into()],
        ..Mount::default()
    };
    let rootfs = share.mount_rootfs("one", &[bind], Path::new("/none")).unwrap();
    let seen = share.view.join(Share::rootfs_name("one"));
    assert!(seen.join("hello").exists());
    fs::write(seen.join("from-the-guest"), "y").unwrap();
    assert!(layer.join("from-the-guest").exists());
    assert!(fs::create_dir(share.view.join("planted")).is_err());
    drop(rootfs);
    assert!(!seen.exists() && layer.join("hello").exists());
}

#[test]
fn a_rootfs_and_what_came_with_it_has_no_devices_programs_or_set_id_bits_wherever_it_is_seen() {
    let state = scratch();
    let share = share(state.path());
    let layer = state.path().join("layer");
    fs::create_dir_all(layer.join("below")).unwrap();
    let none = None::<&str>;
    mount(Some("t"), &layer.join("below"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let bind = Mount {
        kind: "bind".into(),
        source: layer.display().to_string(),
        options: vec!["rbind".into()],
        ..Mount::default()
    };
    let rootfs = share.mount_rootfs("five", &[bind], Path::new("/none")).unwrap();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    for root in [rootfs.target.clone(), share.view.join(Share::rootfs_name("five"))] {
        for place in [root.join("below"), root] {
            let line = mounts.lines().find(|line| line.split(' ').nth(4) == place.to_str());
            let line = line.unwrap_or_else(|| panic!("{} is not mounted:\n{mounts}", place.display()));
            for flag in ["nosuid", "nodev", "noexec"] {
                assert!(line.contains(flag), "{flag} is missing: {line}");
            }
        }
    }
    let staged = mounts.lines().filter(|line| line.contains("/staging ")).count();
    assert_eq!(staged, 0, "nothing stays where it was prepared");
}

/// Snapshotters of containerd 2 mount parts of a root file system below its root. A link of the image leads nowhere else.
#[test]
fn a_mount_with_a_target_lies_in_the_root_file_system() {
    let state = scratch();
    let share = share(state.path());
    let (layer, part) = (state.path().join("layer"), state.path().join("part"));
    for directory in [&layer.join("here"), &layer.join("etc"), &part] {
        fs::create_dir_all(directory).unwrap();
    }
    std::os::unix::fs::symlink("/etc", layer.join("link")).unwrap();
    fs::write(part.join("file"), "x").unwrap();
    let bind = |source: &Path, target: &str| Mount {
        kind: "bind".into(),
        source: source.display().to_string(),
        options: vec!["rbind".into()],
        target: target.into(),
    };
    let mounts = [bind(&layer, ""), bind(&part, "/here"), bind(&part, "link")];
    let rootfs = share.mount_rootfs("six", &mounts, Path::new("/none")).unwrap();
    let root = share.view.join(Share::rootfs_name("six"));
    assert!(root.join("here/file").exists() && root.join("etc/file").exists());
    assert!(!Path::new("/etc/file").exists());
    drop(rootfs);
    let missing = share.mount_rootfs("six", &[bind(&layer, ""), bind(&part, "no/such")], Path::new("/none"));
    assert!(missing.unwrap_err().to_string().contains("no/such"));
    assert!(!share.shared.join("six").exists());
}

#[test]
fn stacked_mounts_and_the_bundles_own_directory() {
    let state = scratch();
    let share = share(state.path());
    let (lower, upper, work) = (state.path().join("l"), state.path().join("u"), state.path().join("w"));
    for directory in [&lower, &upper, &work] {
        fs::create_dir(directory).unwrap();
    }
    let tmpfs = Mount {
        kind: "tmpfs".into(),
        source: "t".into(),
        options: vec!["size=64k".into(), "nodev".into()],
        ..Mount::default()
    };
    let bind = Mount {
        kind: "bind".into(),
        source: lower.display().to_string(),
        options: vec!["bind".into(), "ro".into()],
        ..Mount::default()
    };
    let rootfs = share.mount_rootfs("two", &[tmpfs, bind], Path::new("/none")).unwrap();
    assert!(fs::write(rootfs.target.join("x"), "").is_err(), "read-only");
    let target = rootfs.target.clone();
    drop(rootfs);
    assert!(!target.exists(), "both mounts are gone");
    let rootfs = share.mount_rootfs("three", &[], &upper).unwrap();
    fs::write(rootfs.target.join("x"), "").unwrap();
    assert!(upper.join("x").exists());
    drop(rootfs);
    assert!(upper.join("x").exists());
    let refused = share.mount_rootfs("four", &[], Path::new("/no/such")).unwrap_err().to_string();
    assert!(refused.contains("/no/such"), "{refused}");
    share.mount_rootfs("four", &[], &upper).expect("a refused one left nothing behind");
}

#[test]
fn a_root_without_layers_is_refused_and_an_empty_one_is_served() {
    let state = scratch();
    let share = share(state.path());
    for options in [vec![], vec!["lowerdir=".to_owned()], vec!["lowerdir=/no/such".to_owned()]] {
        let overlay =
            Mount { kind: "overlay".into(), source: "overlay".into(), options: options.clone(), ..Mount::default() };
        let refused = share.mount_rootfs("one", &[overlay], Path::new("/none")).unwrap_err().to_string();
        assert!(refused.contains("\"overlay\"") && refused.contains(&options.join(",")), "{refused}");
        assert!(!share.shared.join("one").exists(), "nothing of it remains");
    }
    let nothing = Mount::default();
    assert!(share.mount_rootfs("one", &[nothing], Path::new("/none")).is_err());
    let empty = state.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let bind = Mount {
        kind: "bind".into(),
        source: empty.display().to_string(),
        options: vec!["rbind".into()],
        ..Mount::default()
    };
    let rootfs = share.mount_rootfs("one", &[bind], Path::new("/none")).unwrap();
    assert_eq!(fs::read_dir(&rootfs.target).unwrap().count(), 0);
}

#[test]
fn links_in_a_root_lead_the_shim_nowhere() {
    let state = scratch();
    let share = share(state.path());
    let (layer, outside) = (state.path().join("layer"), state.path().join("outside"));
    for directory in [&layer, &outside] {
        fs::create_dir(directory).unwrap();
    }
    fs::write(outside.join("kept"), "").unwrap();
    // What a guest could hope that the shim mounts on, unmounts or removes by name.
    for name in ["rootfs", "mounts", "0", "up"] {
        std::os::unix::fs::symlink(&outside, layer.join(name)).unwrap();
    }
    let bind = Mount {
        kind: "bind".into(),
        source: layer.display().to_string(),
        options: vec!["rbind".into()],
        ..Mount::default()
    };
    let rootfs = share.mount_rootfs("one", &[bind], Path::new("/none")).unwrap();
    let spec = crate::spec::binds::Bind {
        index: 0,
        destination: "/rootfs/../up".into(),
        source: outside.clone(),
        recursive: true,
        read_only: true,
    };
    let binds = share.mount_binds("one", crate::rootfs::binds::open(&[spec]).unwrap()).unwrap();
    assert!(share.shared.join("one/mounts/0/kept").exists());
    // In the places that the shim uses by name nobody can put one: they are read-only for caisson-fsd.
    for place in ["one", "one/mounts", "one/mounts/0", HOST_SHARE_DIRECTORY] {
        let planted = share.view.join(place).join("planted");
        let error = std::os::unix::fs::symlink(&outside, planted).expect_err(place);
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
        assert!(fs::rename(share.view.join(place), share.view.join("away")).is_err(), "{place}");
    }
    drop((binds, rootfs));
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&layer).unwrap().count(), 4);
}

#[test]
fn an_overlay_of_more_layers_than_a_page_names() {
    let state = scratch();
    let share = share(state.path());
    // An overlay's upper directory cannot lie on every file system; the scratch directory's tmpfs takes it.
    let layers = state.path().join("layers-".repeat(15));
    fs::create_dir(&layers).unwrap();
    let name = |n: usize| layers.join(n.to_string());
    for n in 0..60 {
        fs::create_dir(name(n)).unwrap();
        fs::write(name(n).join(format!("file-{n}")), "x").unwrap();
    }
    for directory in ["upper", "work"] {
        fs::create_dir(layers.join(directory)).unwrap();
    }
    let lower: Vec<_> = (0..60).map(|n| name(n).display().to_string()).collect();
    let options = vec![
        format!("lowerdir={}", lower.join(":")),
        format!("upperdir={}/upper", layers.display()),
        format!("workdir={}/work", layers.display()),
    ];
    let overlay = Mount { kind: "overlay".into(), source: "overlay".into(), options, ..Mount::default() };
    let here = std::env::current_dir().unwrap();
    let rootfs = share.mount_rootfs("one", &[overlay], Path::new("/none"));
    assert_eq!(std::env::current_dir().unwrap(), here);
    let target = rootfs.as_ref().expect("it is mounted").target.clone();
    assert!((0..60).all(|n| target.join(format!("file-{n}")).exists()));
}

//! Files through the root file system: right in the container, and right on the host.

use std::{
    fs,
    io::Read,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use caisson_e2e::{Host, Setup, host::Image, sizes, wait::long};
use sha2::{Digest, Sha256};

caisson_e2e::for_each_runtime!(
    files_in_the_container_and_on_the_host in Setup::default().image(Image::Probe).disk(sizes::size(512, 3072)),
    files_on_the_native_snapshotter in Setup::default().snapshotter("native"),
);

/// Where the container's changes lie on the host: the upper directory of its overlay, or the only directory.
fn changes(host: &Host, id: &str) -> PathBuf {
    let mounts =
        host.ctr_output(["snapshot", "--snapshotter", host.snapshotter(), "mounts", "/target", id]).succeeded();
    let upper = mounts.split([' ', ',']).find_map(|word| word.strip_prefix("upperdir=").or(bind_source(word)));
    PathBuf::from(upper.unwrap_or_else(|| panic!("no directory of changes in {mounts}")))
}

fn bind_source(word: &str) -> Option<&str> {
    (word.starts_with('/') && word.contains("snapshots/")).then_some(word)
}

fn files_in_the_container_and_on_the_host(host: &Host) {
    let (count, mib) = (sizes::size(300, 10_000), sizes::size(8, 1024));
    let script = format!("probe files /work {count} {mib} && cp /bin/busybox /bin/copied && sync && echo ready && cat");
    let pod = host.container("files").start(&["sh", "-c", &script]);
    pod.stdout().wait_for("all checks", long(), |text| {
        let done = text.contains("ready\n");
        (done || text.contains("failed")).then_some(())
    });
    let report = String::from_utf8(pod.stdout().so_far()).expect("it is text");
    let names: Vec<&str> = report.lines().filter_map(|line| line.strip_prefix("ok ")).collect();
    assert_eq!(names.len(), 18, "{report}\n{}", String::from_utf8_lossy(&pod.running.stderr.so_far()));

    let work = changes(host, &pod.id).join("work");
    let path = |name: &str| work.join(name);
    assert_eq!(fs::read(path("created")).expect("it is there"), b"made in the guest\n");
    assert_eq!(fs::read(path("grown")).expect("it is there"), b"0123");
    let (one, two) = (meta(&path("one")), meta(&path("two")));
    assert_eq!((one.ino(), one.nlink()), (two.ino(), 2), "hard links");
    assert_eq!(fs::read_link(path("link")).expect("it is a link"), Path::new("created"));
    assert_eq!(attribute(&path("created"), "user.caisson.note"), b"kept with the file");
    assert_eq!(fs::read(path("renamed")).expect("it is there"), b"other");
    assert_eq!(fs::read(path("moved/there/file")).expect("it is there"), b"file");
    for gone in ["old", "other", "doomed", "tree/a", "moved/to"] {
        assert!(!path(gone).exists(), "{gone} is still there");
    }
    let mode = meta(&path("mode"));
    assert_eq!((mode.mode() & 0o7777, mode.mtime(), mode.mtime_nsec()), (0o2750, 1_000_000_000, 123_456_789));
    assert!(meta(&path("fifo")).file_type().is_fifo());

    let sparse = meta(&path("sparse"));
    assert_eq!(sparse.len(), 64 * 1024 * 1024 + 3);
    assert!(sparse.blocks() * 512 < 1024 * 1024, "the hole takes {} blocks", sparse.blocks());
    let mut bytes = [0; 7];
    fs::File::open(path("mapped")).expect("it is there").read_exact_at(&mut bytes, 8192).expect("it is long enough");
    assert_eq!(&bytes, b"written");
    assert_eq!(meta(&path("direct")).len(), 16384);
    let told = report.lines().find_map(|line| line.strip_prefix("sha256 ")).expect("the probe tells the hash");
    assert_eq!(sha256(&path("large")), told, "the host reads other bytes");

    assert_eq!(fs::read_dir(path("many")).expect("it is there").count(), count / 2);
    assert_eq!(fs::read(path("many/file-1")).expect("it is there"), b"1\n");
    let owner = |name: &str| (meta(&path(name)).uid(), meta(&path(name)).gid());
    assert_eq!(owner("owned"), (1000, 2000));
    assert_eq!(fs::read(path("owned")).expect("it is there"), b"written by its owner");
    assert_eq!(owner("public/mine"), (1000, 1000));
    assert_eq!(owner("group/shared"), (1000, 3000));
    assert_eq!(owner("secret"), (0, 0));
    assert_eq!(meta(&path("public")).mode() & 0o7777, 0o1777);

    // A file from a lower layer, read through the container, is the file that was packed.
    let copied = changes(host, &pod.id).join("bin/copied");
    assert_eq!(pod.exec("sum", &["sha256sum", "/bin/busybox"]).succeeded().split(' ').next(), Some(&*sha256(&copied)));
    assert_eq!(pod.end().code, Some(137));
}

fn files_on_the_native_snapshotter(host: &Host) {
    let pod = host.container("native").start_ready("echo changed > /etc/passwd; mkdir /new; echo ready; cat");
    let root = changes(host, &pod.id);
    assert_eq!(fs::read(root.join("etc/passwd")).expect("it is there"), b"changed\n");
    assert!(root.join("new").is_dir() && root.join("bin/busybox").is_file());
    assert_eq!(pod.end().code, Some(137));
}

fn meta(path: &Path) -> fs::Metadata {
    fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = [0; 256];
    let length = rustix::fs::getxattr(path, name, &mut value);
    let length = length.unwrap_or_else(|error| panic!("{name} of {}: {error}", path.display()));
    value[..length].to_vec()
}

fn sha256(path: &Path) -> String {
    let mut file = fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut hash, mut block) = (Sha256::new(), vec![0; 1024 * 1024]);
    loop {
        let count = file.read(&mut block).expect("it can be read");
        if count == 0 {
            return hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        }
        hash.update(&block[..count]);
    }
}

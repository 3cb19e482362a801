//! Shared directories, through the real file server.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use caisson_vm_tests::{
    environment::program,
    linux::{Guest, scenario},
};
use caisson_vmm_client::{Child, Share, packet, process::spawn_file_server};

fn serve(root: &Path) -> (Child, OwnedFd) {
    let (theirs, ours) = packet::pair().unwrap();
    let root = File::open(root).unwrap();
    let log = std::io::stderr();
    let arguments = ["--socket-fd", "3", "--root-fd", "4"];
    let descriptors = [(theirs.as_fd(), 3), (root.as_fd(), 4)];
    (spawn_file_server(&program("caisson-fsd"), &arguments, &descriptors, log.as_fd(), None).unwrap(), ours)
}

#[test]
fn a_shared_directory_is_used_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("hello"), "from the host").unwrap();
    let (_server, socket) = serve(root);
    let (mut machine, console) = scenario("files caisson.tag=pod");
    machine.vcpus = 2;
    machine.shares = vec![Share { tag: "pod".into(), server: socket }];
    Guest::start((machine, console)).passes();

    assert_eq!(fs::read_to_string(root.join("folder/linked")).unwrap(), "from the guest");
    let renamed = fs::metadata(root.join("folder/renamed")).unwrap();
    assert_eq!((renamed.permissions().mode() & 0o777, renamed.nlink()), (0o640, 2));
    assert_eq!(fs::read_link(root.join("folder/symlink")).unwrap(), Path::new("renamed"));
    let large = fs::read(root.join("large")).unwrap();
    assert_eq!(large.len(), 4 << 20);
    assert!(large.iter().enumerate().all(|(n, byte)| *byte == ((n % (1 << 20)) % 249) as u8));
    assert_eq!(fs::read_dir(root.join("many")).unwrap().count(), 299);
}

#[test]
fn a_server_that_dies_fails_the_files_and_not_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let (server, socket) = serve(folder.path());
    drop(server);
    let (mut machine, console) = scenario("files caisson.tag=pod");
    machine.shares = vec![Share { tag: "pod".into(), server: socket }];
    let mut guest = Guest::start((machine, console));
    let said = guest.verdict();
    assert!(
        said.contains("guest: failed") && (said.contains("ConnectionRefused") || said.contains("NotConnected")),
        "{said}"
    );
    assert_eq!(guest.monitor.exit_reason(), caisson_protos::monitor::ExitReason::PoweredOff);
}

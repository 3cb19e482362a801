//! A shared directory from inside.

use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
};

/// The host has put `hello` (with "from the host") into it, and looks at what is there afterwards.
pub fn share(tag: &str) {
    crate::mount(tag, "/share", "virtiofs", "");
    assert_eq!(fs::read_to_string("/share/hello").expect("hello"), "from the host");
    fs::create_dir("/share/folder").expect("mkdir");
    fs::write("/share/folder/file", "from the guest").expect("write");
    fs::set_permissions("/share/folder/file", fs::Permissions::from_mode(0o640)).expect("chmod");
    fs::rename("/share/folder/file", "/share/folder/renamed").expect("rename");
    fs::hard_link("/share/folder/renamed", "/share/folder/linked").expect("link");
    assert_eq!(fs::metadata("/share/folder/linked").expect("stat").nlink(), 2);
    symlink("renamed", "/share/folder/symlink").expect("symlink");
    assert_eq!(fs::read_to_string("/share/folder/symlink").expect("symlink"), "from the guest");

    let mut large = fs::File::create("/share/large").expect("create");
    let block: Vec<u8> = (0..1u32 << 20).map(|n| (n % 249) as u8).collect();
    for _ in 0..4 {
        large.write_all(&block).expect("write");
    }
    large.sync_all().expect("fsync");
    let large = fs::File::open("/share/large").expect("open");
    let mut back = vec![0; block.len()];
    large.read_exact_at(&mut back, 3 << 20).expect("read");
    assert!(back == block, "a MiB came back changed");

    fs::create_dir("/share/many").expect("mkdir");
    for n in 0..300 {
        fs::write(format!("/share/many/{n}"), n.to_string()).expect("write");
    }
    assert_eq!(fs::read_dir("/share/many").expect("readdir").count(), 300);
    let open = fs::File::open("/share/many/7").expect("open");
    fs::remove_file("/share/many/7").expect("unlink");
    let mut byte = [0];
    open.read_exact_at(&mut byte, 0).expect("an unlinked file stays readable");
    assert_eq!(&byte, b"7");
    assert!(fs::read("/share/../etc/passwd").is_err(), "the initramfs has no such file");
}

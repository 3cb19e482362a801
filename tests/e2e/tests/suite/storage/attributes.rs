//! Extended attributes, capabilities of programs, access control lists, flags.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use caisson_e2e::{Host, Setup, host::Image};
use rustix::fs::{IFlags, getxattr, ioctl_getflags, ioctl_setflags};

use super::{holds, volume, with_volume};

caisson_e2e::for_each_runtime!(
    extended in Setup::default().image(Image::Probe).disk(64),
    flags_of_the_host in Setup::default().image(Image::Probe).disk(64),
    flags_that_a_container_changes in Setup::default().image(Image::Probe).disk(64),
    append_only_files_are_not_opened_to_write in Setup::default().image(Image::Probe).disk(64),
);

const TABLE: &str = "
    a file: done
    user: get of none: ENODATA
    user: set: done
    user: create again: EEXIST
    user: replace: done
    user: replace of none: ENODATA
    user: get: three
    user: too little room: ERANGE
    user: list: user.note
    user: empty value: done
    user: get of the empty value:
    user: remove: done
    user: remove again: ENODATA
    user: of a directory: done
    user: of a symbolic link: EPERM
    unknown prefix: EOPNOTSUPP
    trusted: set: EPERM
    trusted: get: ENODATA
    trusted: of overlay: ENODATA
    a program: done
    capability: set: done
    capability: get: true
    capability: as another user: 0000000000000400
    capability: wrong value: EINVAL
    capability: after a write: ENODATA
    a private file: done
    user 1000 before: EACCES EACCES
    access list: set: done
    access list: get: true
    access list: mode: 660
    user 1000: yes yes
    user 1001: EACCES EACCES
    chmod: done
    chmod: user 1000: yes EACCES
    chmod: the mask: true
    access list: wrong value: EOPNOTSUPP
    access list: remove: done
    user 1000 afterwards: EACCES EACCES
    a directory: done
    default list: of a file: EACCES
    default list: set: done
    directories for all: done
    a file in it: done
    a file in it: mode: 660
    a file in it: user 1000: yes yes
    a file in it: user 1001: EACCES EACCES
    a directory in it: done
    a directory in it: default list: true
    set-user-id: 6777
    set-user-id: after a write of another user: 777
    set-user-id: after chown: 777
    user: of another's file: done";

fn extended(host: &Host) {
    let directory = volume(host);
    // Without no_new_privs, under which a program's capabilities have no effect.
    let pod = with_volume(host, "attributes", &directory).flag("--allow-new-privs").start_idle();
    pod.exec("make", &["mkdir", "/work"]).succeeded();
    for (name, place) in [("volume", "/v"), ("root", "/work")] {
        holds(host, &pod.exec(name, &["probe", "cases", "attributes", place]).succeeded(), TABLE);
    }
    // On the host they are what they are inside.
    let value = |name: &str, attribute: &str| {
        let mut value = [0; 64];
        getxattr(directory.join(name), attribute, &mut value).map(|length| value[..length].to_vec())
    };
    assert_eq!(value("setuid", "user.last"), Ok(b"x".to_vec()));
    assert_eq!(value("noted", "user.empty"), Ok(Vec::new()));
    assert_eq!(value("folder/new", "system.posix_acl_access").map(|list| list.len()), Ok(4 + 5 * 8));
    assert_eq!(value("folder/deeper", "system.posix_acl_default").map(|list| list.len()), Ok(4 + 5 * 8));
    pod.end();
}

/// Flags of a file, which are taken away again.
struct Flagged(PathBuf);

impl Flagged {
    fn set(path: &Path, flags: IFlags) -> Self {
        change(path, |found| found | flags);
        Self(path.to_owned())
    }
}

impl Drop for Flagged {
    fn drop(&mut self) {
        change(&self.0, |found| found - (IFlags::IMMUTABLE | IFlags::APPEND));
    }
}

fn change(path: &Path, flags: impl Fn(IFlags) -> IFlags) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let set = ioctl_getflags(&file).and_then(|found| ioctl_setflags(&file, flags(found)));
    set.unwrap_or_else(|error| panic!("flags of {}: {error}", path.display()));
}

const FLAGS: &str = "
    immutable: read: done
    immutable: open to write: EPERM
    immutable: open to append: EPERM
    immutable: append: EPERM
    immutable: truncate: EPERM
    immutable: chmod: EPERM
    immutable: rename: EPERM
    immutable: link: EPERM
    immutable: unlink: EPERM
    immutable: write over it: EPERM
    append: read: done
    append: open to append: done
    append: append: done
    append: truncate: EPERM
    append: chmod: EPERM
    append: rename: EPERM
    append: link: EPERM
    append: unlink: EPERM
    append: write over it: EPERM
    immutable: flags: 0x10
    append: flags: 0x20
    plain: flags: 0x0";

fn flags_of_the_host(host: &Host) {
    let directory = volume(host);
    let path = |name: &str| directory.join(name);
    for name in ["immutable", "append", "plain"] {
        fs::write(path(name), "before\n").expect("it is written");
    }
    let flagged = [Flagged::set(&path("immutable"), IFlags::IMMUTABLE), Flagged::set(&path("append"), IFlags::APPEND)];
    let output = with_volume(host, "flags", &directory).run(&["probe", "cases", "flags", "/v"]).succeeded();
    drop(flagged);
    holds(host, &output, FLAGS);
    assert_eq!(fs::read_to_string(path("immutable")).expect("it is there"), "before\n");
    assert_eq!(fs::read_to_string(path("append")).expect("it is there"), "before\nmore\n");
}

fn flags_that_a_container_changes(host: &Host) {
    let directory = volume(host);
    fs::write(directory.join("plain"), "before\n").expect("it is written");
    let output = with_volume(host, "flags", &directory).run(&["probe", "cases", "change-flags", "/v"]).succeeded();
    holds(host, &output, "chattr +d: done\nlsattr: 0x40\nchattr +i without the capability: EPERM");
}

fn append_only_files_are_not_opened_to_write(host: &Host) {
    let directory = volume(host);
    fs::write(directory.join("append"), "before\n").expect("it is written");
    let flagged = Flagged::set(&directory.join("append"), IFlags::APPEND);
    let output = with_volume(host, "flags", &directory).run(&["probe", "cases", "write-into", "/v"]).succeeded();
    drop(flagged);
    assert_eq!(fs::read_to_string(directory.join("append")).expect("it is there"), "before\n");
    holds(host, &output, "open to write: EPERM\ncontent: before");
}

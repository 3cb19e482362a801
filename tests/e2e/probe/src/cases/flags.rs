//! Files that the host has made immutable or append-only.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use rustix::fs::{IFlags, ioctl_getflags};

use super::{below, case, done};

/// On `immutable`, `append` and `plain` in `directory`.
pub fn all(directory: &Path) {
    let path = below(directory);
    for name in ["immutable", "append"] {
        let file = path(name);
        let print = |what: &str, outcome: io::Result<&'static str>| case(&format!("{name}: {what}"), outcome);
        print("read", done(fs::read(&file)));
        if name == "immutable" {
            print("open to write", done(File::options().write(true).open(&file)));
        }
        print("open to append", done(File::options().append(true).open(&file)));
        let append = || File::options().append(true).open(&file)?.write_all(b"more\n");
        print("append", done(append()));
        print("truncate", done(File::options().write(true).truncate(true).open(&file)));
        print("chmod", done(fs::set_permissions(&file, fs::Permissions::from_mode(0o600))));
        print("rename", done(fs::rename(&file, path("renamed"))));
        print("link", done(fs::hard_link(&file, path("linked"))));
        print("unlink", done(fs::remove_file(&file)));
        print("write over it", done(fs::rename(path("plain"), &file)));
    }
    for name in ["immutable", "append", "plain"] {
        let flags = File::open(path(name)).and_then(|file| Ok(ioctl_getflags(&file)?));
        let known = IFlags::IMMUTABLE | IFlags::APPEND | IFlags::NODUMP;
        case(&format!("{name}: flags"), flags.map(|flags| format!("{:#x}", (flags & known).bits())));
    }
}

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
        let say = |what: &str, outcome: io::Result<&'static str>| case(&format!("{name}: {what}"), outcome);
        say("read", done(fs::read(&file)));
        if name == "immutable" {
            say("open to write", done(File::options().write(true).open(&file)));
        }
        say("open to append", done(File::options().append(true).open(&file)));
        let append = || File::options().append(true).open(&file)?.write_all(b"more\n");
        say("append", done(append()));
        say("truncate", done(File::options().write(true).truncate(true).open(&file)));
        say("chmod", done(fs::set_permissions(&file, fs::Permissions::from_mode(0o600))));
        say("rename", done(fs::rename(&file, path("renamed"))));
        say("link", done(fs::hard_link(&file, path("linked"))));
        say("unlink", done(fs::remove_file(&file)));
        say("write over it", done(fs::rename(path("plain"), &file)));
    }
    for name in ["immutable", "append", "plain"] {
        let flags = File::open(path(name)).and_then(|file| Ok(ioctl_getflags(&file)?));
        let known = IFlags::IMMUTABLE | IFlags::APPEND | IFlags::NODUMP;
        case(&format!("{name}: flags"), flags.map(|flags| format!("{:#x}", (flags & known).bits())));
    }
}

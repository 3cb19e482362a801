//! Files that the host has made immutable or append-only.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

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

/// Changes the flags of `plain` in `directory`, which holds none.
pub fn change(directory: &Path) {
    let file = directory.join("plain");
    let set = |more: IFlags| {
        let file = File::open(&file)?;
        Ok::<_, io::Error>(ioctl_setflags(&file, ioctl_getflags(&file)? | more)?)
    };
    case("chattr +d", done(set(IFlags::NODUMP)));
    let flags = File::open(&file).and_then(|file| Ok(ioctl_getflags(&file)?));
    case("lsattr", flags.map(|flags| format!("{:#x}", (flags & IFlags::NODUMP).bits())));
    case("chattr +i without the capability", done(set(IFlags::IMMUTABLE)));
}

/// Opens `append` in `directory`, which is append-only, to write anywhere.
pub fn write_into(directory: &Path) {
    let file = directory.join("append");
    match File::options().write(true).open(&file) {
        Ok(mut file) => {
            case("open to write", Ok::<_, io::Error>("done"));
            case("write", done(file.write_all(b"BEFORE")));
            case("fsync", done(file.sync_all()));
        }
        Err(error) => case("open to write", Err::<&str, _>(error)),
    }
    case("content", fs::read_to_string(&file).map(|text| text.trim().to_owned()));
}

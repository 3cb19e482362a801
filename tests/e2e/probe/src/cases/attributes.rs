//! Extended attributes: the user's, capabilities of programs, access control lists; and what a write takes away.

use std::{
    ffi::CStr,
    fs::{self, File},
    io,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use rustix::fs::{XattrFlags, getxattr, lgetxattr, listxattr, lsetxattr, removexattr, setxattr};

use super::{below, case, done};

/// In an empty `directory`, as root.
pub fn all(directory: &Path) {
    of_the_user(directory);
    of_programs(directory);
    lists(directory);
    what_a_write_takes(directory);
}

fn read(file: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut value = [0; 1024];
    let length = getxattr(file, name, &mut value)?;
    Ok(value[..length].to_vec())
}

fn text(file: &Path, name: &str) -> io::Result<String> {
    read(file, name).map(|value| String::from_utf8_lossy(&value).into_owned())
}

fn of_the_user(directory: &Path) {
    let path = below(directory);
    let file = path("noted");
    let name = "user.note";
    case("a file", done(File::create(&file)));
    case("user: get of none", text(&file, name));
    case("user: set", done(setxattr(&file, name, b"one", XattrFlags::empty())));
    case("user: create again", done(setxattr(&file, name, b"two", XattrFlags::CREATE)));
    case("user: replace", done(setxattr(&file, name, b"three", XattrFlags::REPLACE)));
    case("user: replace of none", done(setxattr(&file, "user.other", b"x", XattrFlags::REPLACE)));
    case("user: get", text(&file, name));
    case("user: too little room", getxattr(&file, name, &mut [0_u8; 2]));
    let mut names = [0_u8; 256];
    let listed = listxattr(&file, &mut names);
    case("user: list", listed.map(|length| String::from_utf8_lossy(&names[..length]).replace('\0', " ")));
    case("user: empty value", done(setxattr(&file, "user.empty", b"", XattrFlags::empty())));
    case("user: get of the empty value", text(&file, "user.empty"));
    case("user: remove", done(removexattr(&file, name)));
    case("user: remove again", done(removexattr(&file, name)));
    case("user: of a directory", done(setxattr(directory, name, b"one", XattrFlags::empty())));
    let _ = (removexattr(directory, name), symlink("noted", path("link")));
    case("user: of a symbolic link", done(lsetxattr(path("link"), name, b"one", XattrFlags::empty())));
    case("unknown prefix", done(setxattr(&file, "unknown.note", b"one", XattrFlags::empty())));
    case("trusted: set", done(setxattr(&file, "trusted.note", b"one", XattrFlags::empty())));
    case("trusted: get", text(&file, "trusted.note"));
    case("trusted: of overlay", done(lgetxattr(directory, "trusted.overlay.opaque", &mut [0_u8; 8])));
}

/// struct vfs_cap_data of revision 2: CAP_NET_BIND_SERVICE (10) permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const CAPABILITY_NAME: &str = "security.capability";

fn of_programs(directory: &Path) {
    let program = directory.join("program");
    case("a program", done(fs::copy("/proc/self/exe", &program)));
    case("capability: set", done(setxattr(&program, CAPABILITY_NAME, &CAPABILITY, XattrFlags::empty())));
    case("capability: get", read(&program, CAPABILITY_NAME).map(|value| value == CAPABILITY));
    let output = Command::new(&program).args(["cases", "capabilities"]).uid(1000).gid(1000).output();
    case("capability: as another user", output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()));
    case("capability: wrong value", done(setxattr(&program, CAPABILITY_NAME, b"wrong", XattrFlags::empty())));
    let write =
        || File::options().append(true).open(&program).and_then(|mut file| io::Write::write_all(&mut file, b"x"));
    case("capability: after a write", write().and_then(|()| read(&program, CAPABILITY_NAME)).map(|value| value.len()));
}

/// The effective capabilities of this process.
pub fn capabilities() {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    println!("{}", line.unwrap_or("none").trim());
}

/// struct posix_acl_xattr_header and its entries: (tag, permissions, id).
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let entry = |(tag, permissions, id): &(u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [2_u32.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
}

const NOBODY: u32 = u32::MAX;
const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn lists(directory: &Path) {
    let path = below(directory);
    let (file, folder) = (path("listed"), path("folder"));
    let private =
        fs::write(&file, "content").and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o600)));
    case("a private file", done(private));
    // rw for the owner and for user 1000, nothing for the group and others, and a mask.
    let entries = [(1, 6, NOBODY), (2, 6, 1000), (4, 0, NOBODY), (0x10, 6, NOBODY), (0x20, 0, NOBODY)];
    let as_user = |file: &Path, uid: u32| {
        let output = Command::new("/proc/self/exe").args(["cases", "opens"]).arg(file).uid(uid).gid(uid).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    case("user 1000 before", as_user(&file, 1000));
    case("access list: set", done(setxattr(&file, ACCESS, &list(&entries), XattrFlags::empty())));
    case("access list: get", read(&file, ACCESS).map(|value| value == list(&entries)));
    let mode = |file: &Path| fs::metadata(file).map(|meta| format!("{:o}", meta.permissions().mode() & 0o7777));
    case("access list: mode", mode(&file));
    case("user 1000", as_user(&file, 1000));
    case("user 1001", as_user(&file, 1001));
    case("chmod", done(fs::set_permissions(&file, fs::Permissions::from_mode(0o640))));
    case("chmod: user 1000", as_user(&file, 1000));
    let masked = [(1, 6, NOBODY), (2, 6, 1000), (4, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)];
    case("chmod: the mask", read(&file, ACCESS).map(|value| value == list(&masked)));
    case("access list: wrong value", done(setxattr(&file, ACCESS, b"wrong", XattrFlags::empty())));
    case("access list: remove", done(removexattr(&file, ACCESS)));
    case("user 1000 afterwards", as_user(&file, 1000));

    case("a directory", done(fs::create_dir(&folder)));
    case("default list: of a file", done(setxattr(&file, DEFAULT, &list(&entries), XattrFlags::empty())));
    case("default list: set", done(setxattr(&folder, DEFAULT, &list(&entries), XattrFlags::empty())));
    let open = fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
        .and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)));
    case("directories for all", done(open));
    case("a file in it", done(fs::write(folder.join("new"), "new")));
    case("a file in it: mode", mode(&folder.join("new")));
    case("a file in it: user 1000", as_user(&folder.join("new"), 1000));
    case("a file in it: user 1001", as_user(&folder.join("new"), 1001));
    case("a directory in it", done(fs::create_dir(folder.join("deeper"))));
    case("a directory in it: default list", read(&folder.join("deeper"), DEFAULT).map(|value| value == list(&entries)));
}

/// Whether this process may open `file` for reading, and for writing.
pub fn opens(file: &Path) {
    let may = |write: bool| match File::options().read(!write).write(write).open(file) {
        Ok(_) => "yes".to_owned(),
        Err(error) => super::error_name(&error),
    };
    println!("{} {}", may(false), may(true));
}

/// A write or a change of owner takes the set-user-id bit.
fn what_a_write_takes(directory: &Path) {
    let file = directory.join("setuid");
    let fresh = || fs::write(&file, "x").and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o6777)));
    let mode = || fs::metadata(&file).map(|meta| format!("{:o}", meta.permissions().mode() & 0o7777));
    case("set-user-id", fresh().and_then(|()| mode()));
    let write = Command::new("/proc/self/exe").args(["cases", "append"]).arg(&file).args(["x", "1"]).uid(1000).output();
    case("set-user-id: after a write of another user", write.and_then(|_| mode()));
    let owned = fresh().and_then(|()| std::os::unix::fs::chown(&file, Some(1000), Some(1000)));
    case("set-user-id: after chown", owned.and_then(|()| mode()));
    let name: &CStr = c"user.last";
    case("user: of another's file", done(setxattr(&file, name, b"x", XattrFlags::empty())));
}

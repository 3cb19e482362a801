//! `tmpcopyup`: a new tmpfs begins with what lies at its destination.
//!
//! The image may hold anything: links are copied and never followed, and each directory is opened from the top
//! through no link, so that something that changes meanwhile cannot lead elsewhere.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fchmod, fchown, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat,
};

use super::inroot::find_beneath;

/// Copies everything in the directory `from` to the empty directory `to`, with owners and modes.
///
/// # Errors
/// What the kernel says, ENOSPC for a tmpfs that is too small.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut directories = vec![PathBuf::from(".")];
    while let Some(path) = directories.pop() {
        let (source, target) = (open(from, &path)?, open(to, &path)?);
        for entry in Dir::read_from(&source)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let name = Path::new(OsStr::from_bytes(name.to_bytes()));
            if one(&source, &target, name)? {
                directories.push(path.join(name));
            }
        }
    }
    Ok(())
}

fn open(top: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let found = find_beneath(top, path, OFlags::DIRECTORY)?;
    Ok(openat(&found, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Copies one entry. True if it is a directory, which is empty afterwards.
fn one(source: &OwnedFd, target: &OwnedFd, name: &Path) -> io::Result<bool> {
    let found = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    let mode = Mode::from_raw_mode(found.st_mode);
    match kind {
        FileType::Directory => {
            mkdirat(target, name, Mode::RWXU)?;
            let made = openat(target, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            own(&made, &found, mode)?;
        }
        FileType::RegularFile => {
            // Not blocking: it may be another file by now.
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let mut from = File::from(openat(source, name, flags, Mode::empty())?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut to = File::from(openat(target, name, flags, Mode::RUSR)?);
            io::copy(&mut from, &mut to)?;
            own(&to, &found, mode)?;
        }
        FileType::Symlink => {
            symlinkat(readlinkat(source, name, Vec::new())?, target, name)?;
            chown_link(target, name, &found)?;
        }
        _ => {
            mknodat(target, name, kind, mode, found.st_rdev)?;
            chown_link(target, name, &found)?;
        }
    }
    Ok(kind.is_dir())
}

fn own(file: impl AsFd, like: &Stat, mode: Mode) -> io::Result<()> {
    fchown(&file, Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid)))?;
    // After the owner, whose change takes set-user-id away.
    Ok(fchmod(&file, mode)?)
}

fn chown_link(directory: &OwnedFd, name: &Path, like: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    Ok(chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_tree_is_copied_without_following_links() {
        let top = tempfile::tempdir().unwrap();
        let (from, to) = (top.path().join("from"), top.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(top.path().join("secret"), "s").unwrap();
        fs::write(from.join("a/b/file"), "text").unwrap();
        fs::set_permissions(from.join("a/b/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o711)).unwrap();
        std::os::unix::fs::symlink("../secret", from.join("link")).unwrap();
        nix::unistd::mkfifo(&from.join("a/pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let open = |path: &Path| File::open(path).unwrap();
        copy(open(&from).as_fd(), open(&to).as_fd()).unwrap();
        let mode = |path: &str| fs::symlink_metadata(to.join(path)).unwrap().permissions().mode();
        assert_eq!(fs::read_to_string(to.join("a/b/file")).unwrap(), "text");
        assert_eq!((mode("a/b/file") & 0o7777, mode("a") & 0o7777), (0o4751, 0o711));
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("../secret"));
        assert_eq!(mode("a/pipe") & libc::S_IFMT, libc::S_IFIFO);
    }
}

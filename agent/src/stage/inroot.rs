//! Paths of the image, resolved as the container would resolve them and never outside its root.
//!
//! The image is hostile: any part of a path may be a symbolic link that points up, out or into /proc. The kernel does
//! the resolving (openat2, RESOLVE_IN_ROOT: absolute links and `..` stop at the root; magic links of /proc are
//! refused), and everything is then done to the descriptor that it returned, so nothing can be exchanged in between.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, mkdirat, openat, openat2, readlinkat},
    io::{Errno, Result},
};

/// A container's root directory.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// The kernel answers EAGAIN when a rename elsewhere raced with a `..`; it asks to try again.
const ATTEMPTS: usize = 32;
/// As many links as the kernel follows: MAXSYMLINKS of include/linux/namei.h.
const MAX_LINKS: usize = 40;
/// PROC_SUPER_MAGIC of include/uapi/linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;
/// Of what is made where the image has nothing.
const MODE: Mode = Mode::from_raw_mode(0o755);

fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode, resolve: ResolveFlags) -> Result<OwnedFd> {
    let mut result = Err(Errno::AGAIN);
    for _ in 0..ATTEMPTS {
        result = openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve);
        if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    result
}

/// Finds `path` below `parent` where neither it nor anything on the way is a symbolic link.
///
/// # Errors
/// What openat2(2) says: ELOOP for a link, EXDEV for a way out.
pub fn find_beneath(parent: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let found = open_in(parent, path, OFlags::PATH | OFlags::NOFOLLOW | flags, Mode::empty(), resolve)?;
    // With these flags the kernel hands out a link itself rather than refuse it.
    match FileType::from_raw_mode(fstat(&found)?.st_mode) {
        FileType::Symlink => Err(Errno::LOOP),
        _ => Ok(found),
    }
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

impl Root {
    /// Takes the directory as the root of every further path.
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// The directory itself.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens a path for reading or writing.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        open_in(self.directory(), path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    /// Finds a path, which may be anything, without opening it.
    ///
    /// # Errors
    /// What openat2(2) says.
    pub fn find(&self, path: &Path) -> Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// Finds a directory with no symbolic link on the way.
    ///
    /// # Errors
    /// What openat2(2) says: ELOOP for a link.
    pub fn find_plain_directory(&self, path: &Path) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        open_in(self.directory(), path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty(), resolve)
    }

    /// Finds a directory, after making it and its parents where they are missing (mode 755).
    ///
    /// # Errors
    /// What openat2(2) and mkdirat(2) say; ENOTDIR for a file.
    pub fn make_directories(&self, path: &Path) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => self.make(path, true),
            result => result,
        }
    }

    /// Finds a file, after making it (empty, mode 755, as runc does) and its parents where they are missing.
    ///
    /// # Errors
    /// What openat2(2), mkdirat(2) and open(2) say.
    pub fn make_file(&self, path: &Path) -> Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => self.make(path, false),
            result => result,
        }
    }

    /// Walks a path that does not exist as a whole. A link to nothing stands for what is made at its target, inside the
    /// root.
    fn make(&self, path: &Path, directory: bool) -> Result<OwnedFd> {
        let mut rest: VecDeque<OsString> = parts(path).collect();
        // Where the walk is, without links.
        let mut here = PathBuf::from("/");
        let mut found = self.open(&here, OFlags::PATH | OFlags::DIRECTORY)?;
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            if part == ".." {
                here.pop();
                found = self.open(&here, OFlags::PATH | OFlags::DIRECTORY)?;
                continue;
            }
            let next = here.join(&part);
            let at = match self.open(&next, OFlags::PATH | OFlags::NOFOLLOW) {
                Err(Errno::NOENT) => {
                    let name = Path::new(&part);
                    let made = if directory || !rest.is_empty() {
                        mkdirat(&found, name, MODE)
                    } else {
                        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                        openat(&found, name, flags | OFlags::RDONLY, MODE).map(drop)
                    };
                    match made {
                        // Another process made it first: what it is, is seen when it is opened.
                        Ok(()) | Err(Errno::EXIST) => self.open(&next, OFlags::PATH | OFlags::NOFOLLOW)?,
                        Err(error) => return Err(error),
                    }
                }
                result => result?,
            };
            if FileType::from_raw_mode(fstat(&at)?.st_mode).is_symlink() {
                links += 1;
                // The links of /proc say one thing and lead to another.
                if links > MAX_LINKS || fstatfs(&at)?.f_type as u64 == PROC_MAGIC {
                    return Err(Errno::LOOP);
                }
                let target = readlinkat(&at, "", Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                if target.is_absolute() {
                    here = PathBuf::from("/");
                    found = self.open(&here, OFlags::PATH | OFlags::DIRECTORY)?;
                }
                for part in parts(target).collect::<Vec<_>>().into_iter().rev() {
                    rest.push_front(part);
                }
                continue;
            }
            (here, found) = (next, at);
        }
        if directory { self.open(&here, OFlags::PATH | OFlags::DIRECTORY) } else { Ok(found) }
    }

    /// Splits a path into its parent, made where missing, and its last name.
    ///
    /// # Errors
    /// As [`Root::make_directories`]; EINVAL for a path without a last name.
    pub fn parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p Path)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL) };
        Ok((self.make_directories(parent)?, Path::new(name)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let outside = tempfile::tempdir().unwrap();
        let inside = outside.path().join("root");
        fs::create_dir(&inside).unwrap();
        let directory =
            openat2(rustix::fs::CWD, &inside, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty());
        (outside, Root::new(directory.unwrap()))
    }

    #[test]
    fn directories_are_made_inside_whatever_links_say() {
        let (outside, root) = root();
        let inside = outside.path().join("root");
        symlink("../..", inside.join("up")).unwrap();
        symlink(outside.path(), inside.join("out")).unwrap();
        root.make_directories(Path::new("/up/a/b")).unwrap();
        root.make_directories(Path::new("/../../c")).unwrap();
        assert!(inside.join("a/b").is_dir());
        assert!(inside.join("c").is_dir());
        // The absolute link is read from the container's root, where its target is made.
        root.make_directories(Path::new("/out/d")).unwrap();
        assert!(inside.join(outside.path().strip_prefix("/").unwrap()).join("d").is_dir());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_made_where_a_link_to_nothing_leads() {
        let (outside, root) = root();
        let inside = outside.path().join("root");
        fs::create_dir(inside.join("etc")).unwrap();
        symlink("../run/../run/x/resolv.conf", inside.join("etc/resolv.conf")).unwrap();
        symlink("../../../../../../../above", inside.join("etc/up")).unwrap();
        symlink("round", inside.join("etc/about")).unwrap();
        symlink("about", inside.join("etc/round")).unwrap();
        root.make_file(Path::new("/etc/resolv.conf")).unwrap();
        assert!(inside.join("run/x/resolv.conf").is_file());
        root.make_file(Path::new("/etc/up")).unwrap();
        assert!(inside.join("above").is_file() && !outside.path().join("above").exists());
        assert_eq!(root.make_file(Path::new("/etc/round")).unwrap_err(), Errno::LOOP);
        assert_eq!(root.make_directories(Path::new("/etc/up")).unwrap_err(), Errno::NOTDIR);
        assert_eq!(root.make_file(Path::new("/above/below")).unwrap_err(), Errno::NOTDIR);
    }

    proptest::proptest! {
        #[test]
        fn whatever_links_say_nothing_is_made_outside(
            targets in proptest::collection::vec("(/|\\.\\./|a/|b/|l0/|l1/|l2/){0,5}(\\.\\.|a|b|l0|l1|l2)", 3),
            path in "/(\\.\\./|a/|b/|l0/|l1/|l2/){0,4}(a|b|l0|l1|l2)",
            file: bool,
        ) {
            let (outside, root) = root();
            for (index, target) in targets.iter().enumerate() {
                symlink(target, outside.path().join(format!("root/l{index}"))).unwrap();
            }
            let made = if file { root.make_file(Path::new(&path)) } else { root.make_directories(Path::new(&path)) };
            if made.is_ok() {
                proptest::prop_assert!(root.find(Path::new(&path)).is_ok());
            }
            proptest::prop_assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_plain_directory_has_no_link_on_the_way() {
        let (outside, root) = root();
        fs::create_dir(outside.path().join("root/real")).unwrap();
        symlink("real", outside.path().join("root/link")).unwrap();
        root.find_plain_directory(Path::new("/real")).unwrap();
        assert_eq!(root.find_plain_directory(Path::new("/link")).unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn the_root_file_system_is_found_beneath_the_share_only() {
        let (outside, _root) = root();
        symlink("root", outside.path().join("link")).unwrap();
        let share = rustix::fs::open(outside.path(), OFlags::PATH, Mode::empty()).unwrap();
        find_beneath(share.as_fd(), Path::new("root"), OFlags::DIRECTORY).unwrap();
        assert_eq!(find_beneath(share.as_fd(), Path::new("link"), OFlags::empty()).unwrap_err(), Errno::LOOP);
        assert_eq!(find_beneath(share.as_fd(), Path::new("root/../.."), OFlags::empty()).unwrap_err(), Errno::XDEV);
        assert_eq!(find_beneath(share.as_fd(), Path::new("/"), OFlags::empty()).unwrap_err(), Errno::XDEV);
    }
}

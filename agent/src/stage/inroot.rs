//! Paths of the image, resolved as the container would resolve them and never outside its root.
//!
//! The image is hostile: any part of a path may be a symbolic link that points up, out or into /proc. The kernel does
//! the resolving (openat2, RESOLVE_IN_ROOT: absolute links and `..` stop at the root; magic links of /proc are
//! refused), and everything is then done to the descriptor that it returned, so nothing can be exchanged in between.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::{Errno, Result},
};

/// A container's root directory.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// The kernel answers EAGAIN when a rename elsewhere raced with a `..`; it asks to try again.
const ATTEMPTS: usize = 32;

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

/// Opens the directory `path` below `parent` where neither it nor anything on the way is a symbolic link.
///
/// # Errors
/// What openat2(2) says: ELOOP for a link, EXDEV for a way out.
pub fn open_beneath(parent: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    open_in(parent, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty(), resolve)
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
    /// What openat2(2) and mkdirat(2) say; ENOENT also where a link points to nothing.
    pub fn make_directories(&self, path: &Path) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let mut prefix = PathBuf::new();
        let mut found = self.open(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY)?;
        for part in path.components() {
            prefix.push(part);
            found = match self.open(&prefix, OFlags::PATH | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    match mkdirat(&found, Path::new(part.as_os_str()), Mode::from_raw_mode(0o755)) {
                        // A link to nothing exists; opening it again says so.
                        Ok(()) | Err(Errno::EXIST) => self.open(&prefix, OFlags::PATH | OFlags::DIRECTORY)?,
                        Err(error) => return Err(error),
                    }
                }
                result => result?,
            };
        }
        Ok(found)
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
        // The absolute link is read from the container's root, where its target does not exist.
        assert_eq!(root.make_directories(Path::new("/out/d")).unwrap_err(), Errno::NOENT);
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
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
        open_beneath(share.as_fd(), Path::new("root")).unwrap();
        assert_eq!(open_beneath(share.as_fd(), Path::new("link")).unwrap_err(), Errno::LOOP);
        assert_eq!(open_beneath(share.as_fd(), Path::new("root/../..")).unwrap_err(), Errno::XDEV);
        assert_eq!(open_beneath(share.as_fd(), Path::new("/")).unwrap_err(), Errno::XDEV);
    }
}

//! Names, links, attributes: what the directory tree must do.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{RenameFlags, XattrFlags};

use crate::step;

/// Every check on names and small files below `directory`. What it leaves there, the host checks from its side.
pub fn check(directory: &Path) -> Result<()> {
    let path = |name: &str| directory.join(name);
    step("create", || {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path("created"))?;
        file.write_all(b"made in the guest\n")?;
        file.sync_all()?;
        let again = OpenOptions::new().write(true).create_new(true).open(path("created"));
        ensure!(again.is_err_and(|error| error.kind() == ErrorKind::AlreadyExists), "O_EXCL made it a second time");
        ensure!(fs::read(path("created"))? == b"made in the guest\n", "other bytes than written");
        Ok(())
    })?;
    step("append and truncate", || {
        fs::write(path("grown"), b"0123456789")?;
        let mut file = OpenOptions::new().append(true).open(path("grown"))?;
        file.write_all(b"ab")?;
        ensure!(fs::read(path("grown"))? == b"0123456789ab", "O_APPEND did not append");
        OpenOptions::new().write(true).open(path("grown"))?.set_len(4)?;
        ensure!(fs::read(path("grown"))? == b"0123", "truncation left {:?}", fs::read(path("grown")));
        Ok(())
    })?;
    step("directory", || {
        fs::create_dir_all(path("tree/a/b"))?;
        fs::write(path("tree/a/b/leaf"), b"leaf")?;
        let error = fs::remove_dir(path("tree/a")).expect_err("a directory with entries must stay");
        ensure!(error.kind() == ErrorKind::DirectoryNotEmpty, "rmdir of a full directory: {error}");
        fs::remove_dir_all(path("tree/a"))?;
        ensure!(fs::read_dir(path("tree"))?.count() == 0, "something stayed");
        Ok(())
    })?;
    step("rename", || rename(directory))?;
    step("hard link", || {
        fs::write(path("one"), b"first")?;
        fs::hard_link(path("one"), path("two"))?;
        let (one, two) = (fs::metadata(path("one"))?, fs::metadata(path("two"))?);
        ensure!(
            one.ino() == two.ino() && one.nlink() == 2,
            "inodes {} {}, links {}",
            one.ino(),
            two.ino(),
            one.nlink()
        );
        fs::write(path("two"), b"second")?;
        ensure!(fs::read(path("one"))? == b"second", "a write through one name does not show under the other");
        Ok(())
    })?;
    step("symbolic link", || {
        symlink("created", path("link"))?;
        ensure!(fs::read_link(path("link"))? == Path::new("created"), "it points elsewhere");
        ensure!(fs::read(path("link"))? == b"made in the guest\n", "it leads elsewhere");
        symlink("nowhere", path("dangling"))?;
        ensure!(
            fs::metadata(path("dangling")).is_err_and(|error| error.kind() == ErrorKind::NotFound),
            "it leads somewhere"
        );
        Ok(())
    })?;
    step("extended attributes", || attributes(&path("created")))?;
    step("unlink while open", || {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path("doomed"))?;
        file.write_all(b"before")?;
        fs::remove_file(path("doomed"))?;
        ensure!(!path("doomed").exists(), "its name stayed");
        file.write_all(b" and after")?;
        file.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        ensure!(text == "before and after", "it reads {text:?}");
        ensure!(file.metadata()?.nlink() == 0, "its link count is {}", file.metadata()?.nlink());
        Ok(())
    })?;
    step("times and modes", || {
        fs::write(path("mode"), b"x")?;
        fs::set_permissions(path("mode"), fs::Permissions::from_mode(0o2750))?;
        ensure!(fs::metadata(path("mode"))?.mode() & 0o7777 == 0o2750, "mode {:o}", fs::metadata(path("mode"))?.mode());
        let second = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 };
        let times = rustix::fs::Timestamps { last_access: second, last_modification: second };
        rustix::fs::utimensat(rustix::fs::CWD, path("mode"), &times, rustix::fs::AtFlags::empty())?;
        let meta = fs::metadata(path("mode"))?;
        ensure!(
            (meta.mtime(), meta.mtime_nsec()) == (1_000_000_000, 123_456_789),
            "time {}.{}",
            meta.mtime(),
            meta.mtime_nsec()
        );
        Ok(())
    })?;
    step("a FIFO", || {
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o640.into(), 0)?;
        let reader = path("fifo");
        let reader = std::thread::spawn(move || fs::read(reader));
        OpenOptions::new().write(true).open(path("fifo"))?.write_all(b"through")?;
        let bytes = reader.join().expect("the reader does not panic")?;
        ensure!(bytes == b"through", "it carried {bytes:?}");
        Ok(())
    })?;
    step("locks", || {
        let (one, two) = (File::open(path("created"))?, File::open(path("created"))?);
        rustix::fs::flock(&one, rustix::fs::FlockOperation::LockExclusive)?;
        let second = rustix::fs::flock(&two, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        ensure!(second == Err(rustix::io::Errno::WOULDBLOCK), "a second lock: {second:?}");
        Ok(())
    })
}

fn rename(directory: &Path) -> Result<()> {
    let path = |name: &str| directory.join(name);
    fs::write(path("old"), b"old")?;
    fs::rename(path("old"), path("renamed"))?;
    ensure!(!path("old").exists() && fs::read(path("renamed"))? == b"old", "a plain rename");
    fs::write(path("other"), b"other")?;
    let open = File::open(path("renamed"))?;
    fs::rename(path("other"), path("renamed"))?;
    ensure!(fs::read(path("renamed"))? == b"other", "a rename over another file");
    let mut bytes = [0; 3];
    open.read_exact_at(&mut bytes, 0).context("the replaced file, still open")?;
    ensure!(&bytes == b"old", "the replaced file, still open, reads {bytes:?}");
    fs::write(path("kept"), b"kept")?;
    let refused = rustix::fs::renameat_with(
        rustix::fs::CWD,
        path("renamed"),
        rustix::fs::CWD,
        path("kept"),
        RenameFlags::NOREPLACE,
    );
    ensure!(refused == Err(rustix::io::Errno::EXIST), "RENAME_NOREPLACE over a file: {refused:?}");
    fs::create_dir_all(path("moved/from"))?;
    fs::create_dir_all(path("moved/to"))?;
    fs::write(path("moved/from/file"), b"file")?;
    fs::rename(path("moved/from/file"), path("moved/to/file"))?;
    fs::rename(path("moved/to"), path("moved/there"))?;
    ensure!(fs::read(path("moved/there/file"))? == b"file", "a rename of a directory");
    Ok(())
}

fn attributes(file: &Path) -> Result<()> {
    let name = "user.caisson.note";
    rustix::fs::setxattr(file, name, b"kept with the file", XattrFlags::empty()).context("set")?;
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(file, name, &mut value).context("get")?;
    ensure!(&value[..length] == b"kept with the file", "it reads {:?}", &value[..length]);
    let mut names = [0; 512];
    let length = rustix::fs::listxattr(file, &mut names).context("list")?;
    ensure!(names[..length].split(|byte| *byte == 0).any(|listed| listed == name.as_bytes()), "it is not listed");
    rustix::fs::setxattr(file, "user.caisson.gone", b"", XattrFlags::CREATE).context("set a second")?;
    rustix::fs::removexattr(file, "user.caisson.gone").context("remove")?;
    let gone = rustix::fs::getxattr(file, "user.caisson.gone", &mut value);
    ensure!(gone == Err(rustix::io::Errno::NODATA), "a removed attribute: {gone:?}");
    Ok(())
}

/// `count` files in one directory: all found, all listed, half of them removed again.
pub fn many(directory: &Path, count: usize) -> Result<()> {
    step("many small files", || {
        let directory = directory.join("many");
        fs::create_dir(&directory)?;
        for index in 0..count {
            fs::write(directory.join(format!("file-{index}")), format!("{index}\n"))?;
        }
        let listed = fs::read_dir(&directory)?.count();
        ensure!(listed == count, "{listed} of {count} are listed");
        for index in (0..count).step_by(7) {
            let text = fs::read_to_string(directory.join(format!("file-{index}")))?;
            ensure!(text == format!("{index}\n"), "file-{index} reads {text:?}");
        }
        for index in (0..count).step_by(2) {
            fs::remove_file(directory.join(format!("file-{index}")))?;
        }
        let left = fs::read_dir(&directory)?.count();
        ensure!(left == count / 2, "{left} are left of {}", count / 2);
        Ok(())
    })
}

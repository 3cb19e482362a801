//! Files without a name, renames with flags, and renames of what the image holds.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::Path,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, open, renameat_with};

use super::{below, case, done};

/// In an empty `directory`, with `elsewhere` in another file system.
pub fn all(directory: &Path, elsewhere: &Path) {
    without_a_name(directory);
    renames(directory, elsewhere);
}

fn without_a_name(directory: &Path) {
    let path = below(directory);
    let unnamed = |more: OFlags| {
        open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | more, Mode::from_raw_mode(0o640))
            .map(File::from)
    };
    let mut file = match unnamed(OFlags::empty()) {
        Ok(file) => file,
        Err(error) => return case("O_TMPFILE", Err::<&str, _>(error)),
    };
    case("O_TMPFILE", file.write_all(b"content").map(|()| "done"));
    case("O_TMPFILE: links", file.metadata().map(|meta| meta.nlink()));
    case("O_TMPFILE: entries", fs::read_dir(directory).map(Iterator::count));
    let through_proc = |file: &File, name: &str| {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, own, CWD, path(name), AtFlags::SYMLINK_FOLLOW)
    };
    case("linkat through /proc", done(through_proc(&file, "named")));
    case("linkat through /proc: content", fs::read_to_string(path("named")));
    let mode = |name: &str| fs::metadata(path(name)).map(|meta| format!("{:o}", meta.permissions().mode() & 0o7777));
    case("linkat through /proc: mode", mode("named"));
    case("linkat through /proc: links", file.metadata().map(|meta| meta.nlink()));
    case("linkat over a file", done(through_proc(&file, "named")));
    let second = unnamed(OFlags::empty());
    let linked = second.and_then(|file| linkat(file, "", CWD, path("second"), AtFlags::EMPTY_PATH));
    case("linkat with an empty path", done(linked));
    let exclusive = unnamed(OFlags::EXCL).and_then(|file| through_proc(&file, "third"));
    case("linkat after O_EXCL", done(exclusive));
    let mut text = String::new();
    let read = file.write_all(b" and more").and_then(|()| file.rewind()).and_then(|()| file.read_to_string(&mut text));
    case("written after linkat", read.map(|_| text));
    case("read by its name", fs::read_to_string(path("named")));
    let _ = (fs::remove_file(path("named")), fs::remove_file(path("second")));
}

fn renames(directory: &Path, elsewhere: &Path) {
    let path = below(directory);
    let rename = |from: &str, to: &str, flags| done(renameat_with(CWD, path(from), CWD, path(to), flags));
    let text = |name: &str| fs::read_to_string(path(name));
    let made = || -> io::Result<()> {
        fs::write(path("a"), "a")?;
        fs::write(path("b"), "b")?;
        fs::create_dir_all(path("full/below"))?;
        fs::write(path("full/file"), "file")
    };
    case("files and directories", done(made()));
    let number = |name: &str| fs::metadata(path(name)).map(|meta| meta.ino());
    let (a, b) = (number("a").unwrap_or(0), number("b").unwrap_or(0));
    case("EXCHANGE of files", rename("a", "b", RenameFlags::EXCHANGE));
    case("EXCHANGE of files: contents", text("a").and_then(|a| Ok(a + &text("b")?)));
    case("EXCHANGE of files: numbers", number("a").and_then(|now| Ok((now, number("b")?) == (b, a))));
    case("EXCHANGE of a file and a directory", rename("a", "full", RenameFlags::EXCHANGE));
    case("EXCHANGE of a file and a directory: content", text("a/file"));
    case("EXCHANGE back", rename("a", "full", RenameFlags::EXCHANGE));
    case("EXCHANGE with nothing", rename("a", "nothing", RenameFlags::EXCHANGE));
    case("EXCHANGE of a directory and what is below", rename("full", "full/below", RenameFlags::EXCHANGE));
    case("NOREPLACE over a file", rename("a", "b", RenameFlags::NOREPLACE));
    case("NOREPLACE to a free name", rename("a", "free", RenameFlags::NOREPLACE));
    case("NOREPLACE and EXCHANGE", rename("free", "b", RenameFlags::NOREPLACE | RenameFlags::EXCHANGE));
    case("WHITEOUT", rename("free", "moved", RenameFlags::WHITEOUT));
    let whiteout = fs::symlink_metadata(path("free"));
    case("WHITEOUT: left", whiteout.map(|meta| meta.file_type().is_char_device() && meta.rdev() == 0));
    let _ = fs::remove_file(path("free"));
    let _ = (fs::create_dir_all(path("other/below")), fs::create_dir(path("empty")));
    let plain = RenameFlags::empty();
    case("a directory over a full one", rename("full", "other", plain));
    case("a directory over an empty one", rename("full", "empty", plain));
    case("a directory over an empty one: content", text("empty/file"));
    case("a directory below itself", rename("empty", "empty/below/deeper", plain));
    case("a file over a directory", rename("b", "other", plain));
    case("a directory over a file", rename("empty", "b", plain));
    let _ = fs::write(path("across"), "across");
    case("to another mount", done(fs::rename(path("across"), elsewhere.join("across"))));
    let _ = fs::remove_dir_all(path("other"));
}

/// On the directories and files that the image brings along, which lie in a lower layer of an overlay.
pub fn of_the_image() {
    let rename = |from: &str, to: &str| done(fs::rename(from, to));
    case("a directory of the image", rename("/etc", "/moved"));
    case("a directory of the image: content", fs::read_to_string("/etc/group").map(|text| text.lines().count()));
    case("a file of the image", rename("/etc/group", "/etc/moved"));
    case("a file of the image: old name", done(fs::metadata("/etc/group")));
    case("a file of the image: content", fs::read_to_string("/etc/moved").map(|text| text.lines().count()));
    case("over a file of the image", rename("/etc/moved", "/etc/passwd"));
    case("a new directory", done(fs::create_dir("/new")));
    case("a file of the image into it", rename("/bin/busybox", "/new/busybox"));
    case("the new directory", rename("/new", "/newer"));
    case("a file of the image in it", fs::metadata("/newer/busybox").map(|meta| meta.len() > 100_000));
    case("an empty directory of the image", rename("/var", "/newer/var"));
    let replaced = || fs::remove_dir("/var").and_then(|()| fs::create_dir("/var"));
    case("an empty directory of the image, made again", done(replaced()));
    case("and renamed", rename("/var", "/newer/var"));
    let exchange = renameat_with(CWD, "/usr", CWD, "/tmp", RenameFlags::EXCHANGE);
    case("EXCHANGE of directories of the image", done(exchange));
    let listed = fs::read_dir("/").map(|entries| {
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.join(" ")
    });
    case("the root", listed);
}

/// Looks at everything below `directory` twice, as find(1) and du(1) do.
pub fn walk(directory: &Path) {
    fn below(directory: &Path, count: &mut usize) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            *count += 1;
            if fs::symlink_metadata(&path)?.is_dir() {
                below(&path, count)?;
            }
        }
        Ok(())
    }
    for round in ["first", "second"] {
        let mut count = 0;
        let walked = below(directory, &mut count);
        case(&format!("{round} walk"), walked.map(|()| count));
    }
}

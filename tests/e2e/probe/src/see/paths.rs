//! Files and directories: what they are, whether they can be read, whether they can be written.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use caisson_e2e_probe::{Look, Node, Outcome};

/// The most that is read of one file, bytes.
const MOST: u64 = 64 * 1024;

pub fn outcome<T>(result: io::Result<T>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(error) => Outcome::Refused(number(&error)),
    }
}

/// The error's number; -1 if it is not the kernel's.
fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

pub fn look(path: &str) -> Look {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) => return Look::Refused(number(&error)),
    };
    let (mode, owner) = (meta.mode() & 0o7777, (meta.uid(), meta.gid()));
    if meta.is_dir() {
        return Look::Directory { mode, owner, names: names(path).map_err(|error| number(&error)) };
    }
    let device = meta.file_type().is_char_device() || meta.file_type().is_block_device();
    let text = if device { open(path, false).map(|_| String::new()) } else { text(path) };
    Look::File { mode, owner, text: text.map_err(|error| number(&error)) }
}

fn names(path: &str) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(path)?;
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = entries.map(name).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn text(path: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    open(path, false)?.take(MOST).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// Never waits for another end (FIFOs, terminals, kernel messages).
pub fn open(path: &str, write: bool) -> io::Result<File> {
    let wait_not = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    OpenOptions::new().read(!write).write(write).custom_flags(wait_not.bits() as i32).open(path)
}

pub fn write(path: &str) -> Outcome {
    if !Path::new(path).is_dir() {
        return outcome(open(path, true));
    }
    let file = Path::new(path).join("made-by-the-probe");
    outcome(File::create_new(&file).and_then(|_| fs::remove_file(&file)))
}

/// Everything below /dev but the directories that are file systems of their own.
pub fn devices() -> BTreeMap<String, Node> {
    let mut found = BTreeMap::new();
    collect(Path::new("/dev"), &mut found);
    found
}

fn collect(directory: &Path, found: &mut BTreeMap<String, Node>) {
    let device = |path: &Path| fs::symlink_metadata(path).map(|meta| meta.dev()).ok();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            if device(&path) == device(directory) {
                collect(&path, found);
            }
            continue;
        }
        let target = fs::read_link(&path).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let node = Node {
            kind: kind(&meta.file_type()),
            major: rustix::fs::major(meta.rdev()),
            minor: rustix::fs::minor(meta.rdev()),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            target,
        };
        found.insert(path.to_string_lossy().into_owned(), node);
    }
}

fn kind(file_type: &fs::FileType) -> char {
    match file_type {
        _ if file_type.is_char_device() => 'c',
        _ if file_type.is_block_device() => 'b',
        _ if file_type.is_fifo() => 'p',
        _ if file_type.is_symlink() => 'l',
        _ if file_type.is_socket() => 's',
        _ => 'f',
    }
}

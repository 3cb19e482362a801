//! Writes that append, and writes for which there is no space.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use super::{case, done};

/// Appends `count` numbered lines that begin with `word`, each by a write of its own.
pub fn append(path: &Path, word: &str, count: usize) {
    let write = || {
        let mut file = File::options().append(true).open(path)?;
        println!("appends");
        (0..count).try_for_each(|index| file.write_all(format!("{word} {index}\n").as_bytes()))
    };
    case("append", done(write()));
}

/// Writes until a write fails, and prints how much the writes have accepted.
pub fn fill(path: &Path) {
    let mut file = match File::create(path) {
        Ok(file) => file,
        Err(error) => return case("create", Err::<&str, _>(error)),
    };
    let block = [7; 64 << 10];
    let mut written = 0;
    let error = loop {
        match file.write(&block) {
            Ok(count) => written += count,
            Err(error) => break error,
        }
    };
    case("fill", Err::<&str, _>(error));
    case("written", Ok::<_, io::Error>(written));
    case("fsync", done(file.sync_all()));
    case("length", file.metadata().map(|meta| meta.len()));
}

/// A length that the host's ext4 cannot have (its limit is 16 TiB).
const TOO_LARGE: u64 = 1 << 45;

/// Writes behind the largest length of a file.
pub fn too_large(directory: &Path) {
    let path = directory.join("large");
    let file = File::create(&path).expect("there is space for a file");
    case("write", file.write_at(b"x", TOO_LARGE));
    case("truncate", done(file.set_len(TOO_LARGE)));
    case("fsync", done(file.sync_all()));
    case("length", file.metadata().map(|meta| meta.len()));
}

//! `probe storage DIRECTORY FILES MIB`: what the benchmark measures, each step printed as `NAME MILLISECONDS`.
//!
//! Times are the container's own clock's. Nothing is read from where it has just been written: between writing and reading,
//! the page cache is asked to forget the file.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};

const BLOCK: usize = 4096;
const CHUNK: usize = 1 << 20;
/// Blocks that are read or written at random places.
const RANDOM: u64 = 1000;
/// Files of the step in which they are listed while being removed.
const MIXED: usize = 400;

fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let value = work().with_context(|| name.to_owned())?;
    println!("{name} {:.3}", begin.elapsed().as_secs_f64() * 1000.0);
    Ok(value)
}

/// See the module; `count` files and a file of `mib` MiB.
pub fn run(directory: &Path, count: usize, mib: usize) -> Result<()> {
    fs::create_dir_all(directory)?;
    small_files(&directory.join("small"), count)?;
    mixed(&directory.join("mixed"))?;
    one_file(&directory.join("large"), mib)
}

fn names(directory: &Path, count: usize) -> Vec<PathBuf> {
    (0..count).map(|index| directory.join(format!("file-{index}"))).collect()
}

fn small_files(directory: &Path, count: usize) -> Result<()> {
    fs::create_dir(directory)?;
    let names = names(directory, count);
    let each = |work: &dyn Fn(&Path) -> Result<()>| names.iter().try_for_each(|path| work(path));
    step("files_make", || each(&|path| File::create_new(path).map(drop).context("create")))?;
    step("files_write", || each(&|path| Ok(File::options().write(true).open(path)?.write_all(&[7; 100])?)))?;
    step("files_read", || {
        each(&|path| {
            let mut bytes = [0; 128];
            let length = File::open(path)?.read(&mut bytes)?;
            ensure!(length == 100, "{length} bytes of 100");
            Ok(())
        })
    })?;
    step("files_list", || {
        let sizes = fs::read_dir(directory)?.map(|entry| Ok(entry?.metadata()?.len()));
        let total = sizes.sum::<std::io::Result<u64>>()?;
        ensure!(total == 100 * count as u64, "{total} bytes in {count} files");
        Ok(())
    })?;
    step("files_remove", || each(&|path| Ok(fs::remove_file(path)?)))?;
    ensure!(fs::read_dir(directory)?.count() == 0, "files are left");
    Ok(())
}

/// Files made, written, read, and listed while they are removed.
fn mixed(directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    let names = names(directory, MIXED);
    step("files_400", || {
        for path in &names {
            fs::write(path, "content")?;
        }
        for path in &names {
            ensure!(fs::read(path)? == b"content", "other bytes in {}", path.display());
        }
        let mut removed = 0;
        while removed < MIXED {
            for entry in fs::read_dir(directory)?.take(100) {
                fs::remove_file(entry?.path())?;
                removed += 1;
            }
        }
        Ok(())
    })
}

fn one_file(path: &Path, mib: usize) -> Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let mut chunk: Vec<u8> = (0..CHUNK).map(|index| (index % 251) as u8).collect();
    let forget = || fadvise(&file, 0, None, Advice::DontNeed).context("fadvise");
    step("write_sequential", || {
        (0..mib).try_for_each(|index| file.write_all_at(&chunk, (index * CHUNK) as u64))?;
        Ok(file.sync_all()?)
    })?;
    forget()?;
    step("read_sequential", || {
        for index in 0..mib {
            file.read_exact_at(&mut chunk, (index * CHUNK) as u64)?;
        }
        Ok(())
    })?;
    let blocks = (mib * CHUNK / BLOCK) as u64;
    // A step that is odd and has no factor in common with the count of blocks reaches every block once.
    let places: Vec<u64> = (0..RANDOM).map(|index| index * 7919 % blocks * BLOCK as u64).collect();
    let mut block = [0; BLOCK];
    forget()?;
    step("read_random", || places.iter().try_for_each(|at| Ok(file.read_exact_at(&mut block, *at)?)))?;
    forget()?;
    step("write_random", || {
        places.iter().try_for_each(|at| file.write_all_at(&block, *at))?;
        Ok(file.sync_all()?)
    })?;
    fs::remove_file(path).context("remove the file")
}

//! The test program inside the container: it does to files what real programs do and says what went wrong, and it
//! reports what it sees of the container.
//!
//! ```text
//! probe report [WORD...]              JSON (see the library); words are look=PATH, write=PATH, node=KIND:MAJOR:MINOR,
//!                                     call=NUMBER:ARGUMENT...
//! probe call NUMBER:ARGUMENT...       one system call (started by `report`)
//! probe hook FILE NAME                stands in for a hook's program
//! probe files DIRECTORY COUNT MIB     every check on files; prints `ok NAME` for each, fails at the first that fails
//! probe lines COUNT                   COUNT numbered lines to standard output and error, taking turns
//! probe as UID DIRECTORY              what a user may and may not do (started by `files`)
//! probe cases GROUP ARGUMENT...       system calls, each with what the kernel answered (see `cases`)
//! probe storage DIRECTORY FILES MIB   the times of the storage benchmark
//! probe net END ARGUMENT...           one end of a connection (see `net`)
//! probe speed PORT                    the server of the network benchmark
//! ```
//!
//! It is static (musl), so it runs on any image.

mod cases;
mod files;
mod hook;
mod net;
mod see;
mod space;
mod storage;
mod users;

use std::{
    io::{self, Write},
    path::Path,
};

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["files", directory, count, mib] => {
            let directory = Path::new(directory);
            std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
            files::check(directory)?;
            space::check(directory, number(mib)?)?;
            files::many(directory, number(count)?)?;
            users::check(directory)
        }
        ["report", ref words @ ..] => {
            println!("{}", serde_json::to_string(&see::report(words)?)?);
            Ok(())
        }
        ["call", call] => see::call(call),
        ["hook", file, name] => hook::note(Path::new(file), name),
        ["lines", count] => lines(number(count)?),
        ["cases", ref words @ ..] => cases::run(words),
        ["storage", directory, files, mib] => storage::run(Path::new(directory), number(files)?, number(mib)?),
        ["net", ref words @ ..] => net::run(words),
        ["speed", port] => caisson_e2e_probe::speed::serve(number(port)? as u16),
        ["as", uid, directory] => users::as_user(number(uid)? as u32, Path::new(directory)),
        _ => bail!(
            "usage: probe files DIRECTORY COUNT MIB | lines COUNT | as UID DIRECTORY | report [WORD...] | hook FILE NAME | \
             cases GROUP ARGUMENT... | storage DIRECTORY FILES MIB | net END ARGUMENT... | \
             speed PORT"
        ),
    }
}

fn number(text: &str) -> Result<usize> {
    text.parse().with_context(|| format!("{text:?} is not a number"))
}

/// One write for each line, so that each could be lost or torn on its own.
fn lines(count: usize) -> Result<()> {
    for index in 0..count {
        io::stdout().lock().write_all(format!("out {index}\n").as_bytes())?;
        io::stdout().flush()?;
        io::stderr().write_all(format!("err {index}\n").as_bytes())?;
    }
    Ok(())
}

/// Runs one named check.
fn step(name: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    check().with_context(|| format!("check {name:?} failed"))?;
    println!("ok {name}");
    Ok(())
}

//! Cases of system calls on files, each printed as one line with what the kernel answered: the test knows what it must be.
//!
//! ```text
//! unlink of a busy directory: ENOTEMPTY        NAME: the error's name, "done", or a value
//! ```
//!
//! No case stops the ones after it, so one run shows everything that differs.

mod attributes;
mod flags;
mod locks;
mod names;
mod ranges;
mod sharing;
mod space;

use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

/// `probe cases GROUP ARGUMENT...`.
pub fn run(words: &[&str]) -> Result<()> {
    let path = Path::new;
    match *words {
        ["names", directory, elsewhere] => names::all(path(directory), path(elsewhere)),
        ["image"] => names::of_the_image(),
        ["ranges", directory] => ranges::all(path(directory)),
        ["walk", directory] => names::walk(path(directory)),
        ["born", file] => ranges::born(path(file)),
        ["attributes", directory] => attributes::all(path(directory)),
        ["opens", file] => attributes::opens(path(file)),
        ["capabilities"] => attributes::capabilities(),
        ["flags", directory] => flags::all(path(directory)),
        ["change-flags", directory] => flags::change(path(directory)),
        ["write-into", directory] => flags::write_into(path(directory)),
        ["sharing", one, other] => sharing::all(path(one), path(other)),
        ["append", file, word, count] => space::append(path(file), word, crate::number(count)?),
        ["fill", file] => space::fill(path(file)),
        ["too-large", directory] => space::too_large(path(directory)),
        ["lock", action, kind, file] => locks::lock(action, kind, path(file)),
        _ => bail!("there is no such case: {words:?}"),
    }
    Ok(())
}

/// Prints one case.
fn case(name: &str, outcome: impl Into<Outcome>) {
    println!("{name}: {}", outcome.into().0);
}

/// What a case has come to, as its line shows it.
struct Outcome(String);

impl<T: Display, E: Into<io::Error>> From<Result<T, E>> for Outcome {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(value) => Self(value.to_string()),
            Err(error) => Self(error_name(&error.into())),
        }
    }
}

/// `done`, or the error.
fn done<T, E: Into<io::Error>>(result: Result<T, E>) -> Result<&'static str, io::Error> {
    result.map(|_| "done").map_err(Into::into)
}

fn error_name(error: &io::Error) -> String {
    let names = [
        (libc::EACCES, "EACCES"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::EDEADLK, "EDEADLK"),
        (libc::EDQUOT, "EDQUOT"),
        (libc::EEXIST, "EEXIST"),
        (libc::EFBIG, "EFBIG"),
        (libc::EINVAL, "EINVAL"),
        (libc::EIO, "EIO"),
        (libc::EISDIR, "EISDIR"),
        (libc::ENODATA, "ENODATA"),
        (libc::ENOENT, "ENOENT"),
        (libc::ENOLCK, "ENOLCK"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::ENOTEMPTY, "ENOTEMPTY"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::ENXIO, "ENXIO"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EPERM, "EPERM"),
        (libc::ERANGE, "ERANGE"),
        (libc::EROFS, "EROFS"),
        (libc::EXDEV, "EXDEV"),
    ];
    let name = error.raw_os_error().and_then(|number| names.iter().find(|(known, _)| *known == number));
    name.map_or_else(|| error.to_string(), |(_, name)| (*name).to_owned())
}

/// Paths below a directory.
fn below(directory: &Path) -> impl Fn(&str) -> PathBuf {
    move |name| directory.join(name)
}

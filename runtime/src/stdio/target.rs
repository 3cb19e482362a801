//! Where a stream goes, read from what containerd says: a path, or a log URI as containerd's own shim knows them. Pure.
//!
//! ```text
//! /run/…/stdout                          a FIFO; for output also a file that is there already
//! file:///var/log/one                    a file, made with its directories if need be, and appended to
//! binary:///usr/bin/logger?key=value     a program that gets the streams as descriptors and `key value` as arguments
//! ```

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// What a stream's name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/dev/null`.
    None,
    /// A FIFO, or for output a file.
    Path(PathBuf),
    /// A file that is made if it is not there.
    File(PathBuf),
    /// A logging program.
    Binary(Binary),
}

/// A logging program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// Its absolute path.
    pub program: PathBuf,
    /// Key and value in turn, in the order of the URI; of a key that stands there twice the first value.
    pub arguments: Vec<String>,
}

/// A name that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not one of ours.
    #[error("{0}: the scheme {1} is not known: pass a path, file:// or binary://")]
    Scheme(String, String),
    /// Something between the scheme and the path.
    #[error("{0}: a log URI is written {1}:///absolute/path")]
    Relative(String, String),
}

impl Target {
    /// Reads a stream's name.
    ///
    /// # Errors
    /// See [`TargetError`].
    pub fn parse(name: &str) -> Result<Self, TargetError> {
        if name.is_empty() {
            return Ok(Self::None);
        }
        let (scheme, rest) = match name.split_once("://") {
            // A path may hold anything, also what looks like a scheme.
            Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
            _ => return Ok(Self::Path(name.into())),
        };
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path);
        let checked = |path: PathBuf| match is_usable(&path) {
            true => Ok(path),
            false => Err(TargetError::Relative(name.to_owned(), scheme.to_owned())),
        };
        match scheme {
            "file" => Ok(Self::File(checked(path)?)),
            "binary" => Ok(Self::Binary(Binary { program: checked(path)?, arguments: arguments(query) })),
            _ => Err(TargetError::Scheme(name.to_owned(), scheme.to_owned())),
        }
    }
}

fn is_usable(path: &Path) -> bool {
    path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0)
}

/// The bytes that `%41` and the like stand for.
fn decode(text: &str) -> PathBuf {
    OsString::from_vec(percent_encoding::percent_decode_str(text).collect()).into()
}

fn arguments(query: &str) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    let mut arguments = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if !keys.iter().any(|known| *known == key) {
            keys.push(key.to_string());
            arguments.extend([key.into_owned(), value.into_owned()]);
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_read_as_containerds_shim_reads_them() {
        let path = |path: &str| Target::Path(path.into());
        let file = |path: &str| Target::File(path.into());
        let binary = |program: &str, arguments: &[&str]| {
            let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
            Target::Binary(Binary { program: program.into(), arguments })
        };
        for (name, target) in [
            ("", Target::None),
            ("/run/containerd/fifo/1/stdout", path("/run/containerd/fifo/1/stdout")),
            ("/run/a://b", path("/run/a://b")),
            ("file:///var/log/one%20two+three", file("/var/log/one two+three")),
            ("file:///var/log/one?mode=1#there", file("/var/log/one")),
            ("binary:///bin/logger", binary("/bin/logger", &[])),
            ("binary:///bin/logger?id", binary("/bin/logger", &["id", ""])),
            (
                "binary:///bin/log%67er?-b=two+words&a=%2Fpath&-b=second",
                binary("/bin/logger", &["-b", "two words", "a", "/path"]),
            ),
        ] {
            assert_eq!(Target::parse(name).unwrap(), target, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused_by_name() {
        for (name, words) in [
            ("http://host/path", "the scheme http is not known"),
            ("file://var/log/one", "is written file:///absolute/path"),
            ("binary://logger?a=b", "is written binary:///absolute/path"),
            ("file:///a%00b", "is written file:///absolute/path"),
        ] {
            let message = Target::parse(name).unwrap_err().to_string();
            assert!(message.contains(words) && message.contains(name), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_name_is_read_or_refused(name in "((file|binary|x)://)?[/a-z%&=?#+0-9]{0,40}", any in ".{0,40}") {
            for name in [name, any] {
                if let Ok(Target::File(path) | Target::Binary(Binary { program: path, .. })) = Target::parse(&name) {
                    prop_assert!(is_usable(&path));
                }
            }
        }
    }
}

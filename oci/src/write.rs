//! Writing settings to a cgroup: all or none.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{Need, Setting};

/// A setting that the kernel does not take, or has no controller for.
#[derive(Debug, thiserror::Error)]
#[error("{field}: write {value:?} to {file}: {}", refusal(.error))]
pub struct WriteError {
    /// The specification's field.
    pub field: String,
    /// The cgroup's file.
    pub file: String,
    /// What was written.
    pub value: String,
    /// What the kernel said.
    #[source]
    pub error: io::Error,
}

fn refusal(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file, so the kernel has no such limit".into(),
        _ => error.to_string(),
    }
}

/// Never creates: a file that is not there belongs to a controller that is not there.
fn write(file: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

/// Writes the settings of a cgroup that nobody uses yet.
///
/// # Errors
/// The first that the kernel refuses.
pub fn set(cgroup: &Path, settings: &[Setting]) -> Result<(), WriteError> {
    settings.iter().try_for_each(|setting| one(cgroup, setting).map(drop))
}

/// Writes the settings of a cgroup in use, and takes all of them back if one is refused. Returns the way back.
///
/// # Errors
/// The first that the kernel refuses.
pub fn change(cgroup: &Path, settings: &[Setting]) -> Result<Undo, WriteError> {
    let mut undo = Undo(Vec::new());
    for setting in settings {
        let read = |file: &String| fs::read_to_string(cgroup.join(file)).ok();
        let before: Vec<_> = setting.choices.iter().map(|(file, _)| read(file)).collect();
        match one(cgroup, setting) {
            Ok(None) => {}
            Ok(Some(place)) => {
                if let (Some((file, value)), Some(Some(text))) = (setting.choices.get(place), before.get(place)) {
                    undo.0.push((cgroup.join(file), restoring(text, value)));
                }
            }
            Err(error) => {
                undo.apply();
                return Err(error);
            }
        }
    }
    Ok(undo)
}

/// What the changed files said before.
#[derive(Debug)]
pub struct Undo(Vec<(PathBuf, String)>);

impl Undo {
    /// Takes the changes back, the last one first.
    pub fn apply(self) {
        for (file, value) in self.0.into_iter().rev() {
            // It had this value a moment ago. If the kernel does not take it now there is nothing better to write.
            let _ = write(&file, &value);
        }
    }
}

/// Writes to the first of a setting's files that exists. Returns which; None if nothing was written.
fn one(cgroup: &Path, setting: &Setting) -> Result<Option<usize>, WriteError> {
    let mut refused = None;
    for (place, (file, value)) in setting.choices.iter().enumerate() {
        match write(&cgroup.join(file), value) {
            Ok(()) => return Ok(Some(place)),
            Err(error) => {
                let absent = error.kind() == io::ErrorKind::NotFound;
                refused = Some((file, value, error));
                if !absent {
                    break;
                }
            }
        }
    }
    match (setting.need, refused) {
        (_, None) | (Need::Try, _) => Ok(None),
        (Need::IfThere, Some((_, _, error))) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        (Need::IfThere | Need::Must, Some((file, value, error))) => {
            Err(WriteError { field: setting.field.clone(), file: file.clone(), value: value.clone(), error })
        }
    }
}

/// What to write to a file so that it says again what it said. A file that holds a line for each device (`8:0 rbps=1
/// wbps=max ...`) gets the line of the device that was `written`.
fn restoring(before: &str, written: &str) -> String {
    let Some((device, settings)) = written.split_once(' ').filter(|(first, _)| first.contains(':')) else {
        // An empty list is written as an empty line: no bytes at all would be no write. Of a file with a line for each
        // device the first one is the default.
        return format!("{}\n", before.lines().next().unwrap_or_default());
    };
    let line = before.lines().find(|line| line.split(' ').next() == Some(device));
    match line {
        Some(line) => line.into(),
        // It had none: what a device without a line has.
        None if settings.contains('=') => {
            let keys = settings.split_whitespace().filter_map(|setting| setting.split_once('='));
            let unset: Vec<String> = keys.map(|(key, _)| format!("{key}=max")).collect();
            format!("{device} {}", unset.join(" "))
        }
        None => format!("{device} default"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_back_is_what_the_file_said() {
        assert_eq!(restoring("max 100000\n", "5000"), "max 100000\n");
        assert_eq!(restoring("", "0-1"), "\n");
        let max = "8:0 rbps=1 wbps=max riops=max wiops=max\n8:16 rbps=2 wbps=max riops=max wiops=max\n";
        assert_eq!(restoring(max, "8:16 rbps=7"), "8:16 rbps=2 wbps=max riops=max wiops=max");
        assert_eq!(restoring(max, "8:32 rbps=7"), "8:32 rbps=max");
        assert_eq!(restoring("default 100\n8:32 70\n", "50"), "default 100\n");
        assert_eq!(restoring("default 100\n", "8:32 50"), "8:32 default");
        assert_eq!(restoring("default 100\n8:32 70\n", "8:32 50"), "8:32 70");
    }

    fn setting(files: &[&str], value: &str, need: Need) -> Setting {
        Setting {
            choices: files.iter().map(|file| ((*file).to_owned(), value.to_owned())).collect(),
            field: format!("field of {value}"),
            need,
        }
    }

    /// Ordinary files stand for the kernel's; one that must not be opened for writing stands for a refusal.
    #[test]
    fn one_refusal_takes_all_changes_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for (file, text) in [("a", "1\n"), ("b", "2\n")] {
            fs::write(path.join(file), text).unwrap();
        }
        fs::create_dir(path.join("refusing")).unwrap();
        let read = || (fs::read_to_string(path.join("a")).unwrap(), fs::read_to_string(path.join("b")).unwrap());
        let limits = [
            setting(&["absent", "a"], "7\n", Need::Must),
            setting(&["b"], "8\n", Need::Must),
            setting(&["absent"], "9\n", Need::IfThere),
            setting(&["refusing"], "9\n", Need::Try),
        ];
        change(path, &limits).unwrap().apply();
        assert_eq!(read(), ("1\n".into(), "2\n".into()));
        let mut failing = limits.to_vec();
        failing.push(setting(&["refusing"], "10", Need::IfThere));
        let error = change(path, &failing).unwrap_err();
        assert!(error.field == "field of 10", "{error}");
        assert_eq!(read(), ("1\n".into(), "2\n".into()));
        set(path, &limits).unwrap();
        assert_eq!(read(), ("7\n".into(), "8\n".into()));
        let error = set(path, &[setting(&["absent"], "9", Need::Must)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "field of 9: write \"9\" to absent: there is no such file, so the kernel has no such limit"
        );
    }
}

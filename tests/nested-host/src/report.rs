//! What the inner init reports to the outer process: lines on a virtio-serial port of their own.
//!
//! ```text
//!   step mounts        init began this step
//!   exit 42            the command ended (128 + n: by signal n); all its output has been written
//!   fail no module …   init cannot go on
//! ```

use std::fmt;

/// One line.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// This step begins; the previous one is done.
    Step(String),
    /// The command's exit status.
    Exit(u8),
    /// Why the nested host cannot run the command.
    Fail(String),
}

impl Report {
    /// Reads one line without its newline. `None`: not a report.
    pub fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ')? {
            ("step", name) => Some(Self::Step(name.to_owned())),
            ("exit", status) => status.parse().ok().map(Self::Exit),
            ("fail", reason) => Some(Self::Fail(reason.to_owned())),
            _ => None,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(name) => writeln!(f, "step {name}"),
            Self::Exit(status) => writeln!(f, "exit {status}"),
            Self::Fail(reason) => writeln!(f, "fail {}", reason.replace('\n', " ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back() {
        for report in [Report::Step("mounts".into()), Report::Exit(137), Report::Fail("a\u{20}b".into())] {
            let line = report.to_string();
            assert_eq!(Report::parse(line.strip_suffix('\n').unwrap()), Some(report));
        }
        assert_eq!(Report::Fail("two\nlines".into()).to_string(), "fail two lines\n");
    }

    #[test]
    fn other_lines_are_no_reports() {
        for line in ["", "exit", "exit 256", "exit x", "kernel panic"] {
            assert_eq!(Report::parse(line), None, "{line}");
        }
    }
}

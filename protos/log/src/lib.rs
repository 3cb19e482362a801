//! One log line, as every part of Caisson writes it and containerd shows it: logfmt, one record to a line,
//!
//! ```text
//! time="2026-11-22T10:00:00.000000000Z" level=info msg="machine started" component=shim vcpus=1
//! ```
//!
//! The line goes out in a single write without waiting: a log that nobody reads must never stop a pod, so a line
//! that cannot be written now is dropped. Values are quoted and escaped, because a guest or an image may have chosen them.
//!
//! ```
//! let log = caisson_log::logger("shim", std::io::stderr(), slog::Level::Info);
//! slog::info!(log, "machine started"; "vcpus" => 1);
//! caisson_log::bridge(log); // records of dependencies that use `log` follow the same way
//! ```

use std::{
    fmt::{self, Write as _},
    io::Write,
    sync::Mutex,
    time::SystemTime,
};

use slog::{Drain, KV, Key, Level, Logger, OwnedKVList, Record, Serializer, o};

/// A logger that writes its lines to `sink` and names `component` in each. Records below `level` cost one comparison.
///
/// `sink` should be non-blocking if its reader can stall.
pub fn logger<W: Write + Send + 'static>(component: &'static str, sink: W, level: Level) -> Logger {
    let drain = Logfmt { sink: Mutex::new(sink) }.filter_level(level).fuse();
    Logger::root(drain, o!("component" => component))
}

/// Sends the `log` records of dependencies to `logger`, once for the process; warnings and errors only.
pub fn bridge(logger: Logger) {
    if log::set_boxed_logger(Box::new(Bridge(logger))).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// Reads a level's name as configuration files write it: trace, debug, info, warning, error.
pub fn parse_level(name: &str) -> Option<Level> {
    Some(match name {
        "trace" => Level::Trace,
        "debug" => Level::Debug,
        "info" => Level::Info,
        "warning" | "warn" => Level::Warning,
        "error" => Level::Error,
        _ => return None,
    })
}

struct Logfmt<W> {
    sink: Mutex<W>,
}

impl<W: Write> Drain for Logfmt<W> {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record, values: &OwnedKVList) -> Result<(), slog::Never> {
        let line = line(SystemTime::now(), record, values);
        let mut sink = self.sink.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Dropped when it cannot be written now: see the crate's introduction.
        let _ = sink.write(line.as_bytes());
        Ok(())
    }
}

fn line(now: SystemTime, record: &Record, values: &OwnedKVList) -> String {
    let level = match record.level() {
        Level::Critical => "fatal",
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let mut fields = Fields(format!("time=\"{}\" level={level}", humantime::format_rfc3339_nanos(now)));
    // Writing to a String cannot fail, so neither can these.
    let _ = fields.emit_arguments("msg", record.msg());
    let _ = values.serialize(record, &mut fields);
    let _ = record.kv().serialize(record, &mut fields);
    fields.0.push('\n');
    fields.0
}

struct Fields(String);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments) -> slog::Result {
        self.0.push(' ');
        self.0.push_str(key);
        self.0.push('=');
        let text = value.to_string();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+:".contains(c);
        if !text.is_empty() && text.chars().all(plain) {
            self.0.push_str(&text);
        } else {
            // Rust's escapes (\n, \u{1b}, \") keep a hostile value on its line and out of the terminal.
            write!(self.0, "{text:?}")?;
        }
        Ok(())
    }
}

struct Bridge(Logger);

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let (args, target) = (record.args(), record.target().to_owned());
        match record.level() {
            log::Level::Error => slog::error!(self.0, "{}", args; "target" => target),
            log::Level::Warn => slog::warn!(self.0, "{}", args; "target" => target),
            _ => slog::debug!(self.0, "{}", args; "target" => target),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(say: impl Fn(&Logger)) -> String {
        let sink = Sink::default();
        say(&logger("test", sink.clone(), Level::Info));
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_has_time_level_message_component_and_fields() {
        let line = logged(|log| slog::info!(log, "machine started"; "vcpus" => 2));
        assert!(line.starts_with("time=\"20"), "{line}");
        assert!(line.ends_with("Z\" level=info msg=\"machine started\" component=test vcpus=2\n"), "{line}");
    }

    #[test]
    fn a_hostile_value_stays_on_its_line_and_in_its_quotes() {
        let line = logged(|log| slog::warn!(log, "said"; "text" => "a\" level=fatal\n\u{1b}[2J"));
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.contains(r#"text="a\" level=fatal\n\u{1b}[2J""#), "{line}");
    }

    #[test]
    fn records_below_the_level_are_not_written() {
        assert_eq!(logged(|log| slog::debug!(log, "detail")), "");
    }
}

//! The operator's configuration: /etc/caisson/config.toml, or the file that the environment variable CAISSON_CONFIG or
//! the runtime options name. Everything has a default, so the file may be absent; a key that is not known is
//! refused with its name and line, because a misspelt limit that is silently ignored is worse than an error.

mod network;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

pub use self::network::{Limit, NetworkConfig, bytes_bucket};

/// Where the configuration lies unless something names another file.
pub const DEFAULT_PATH: &str = "/etc/caisson/config.toml";
/// Names another file. `start` passes it on to the daemon.
pub const PATH_VARIABLE: &str = "CAISSON_CONFIG";
/// Largest file that is read, bytes.
const MAX_SIZE: u64 = 64 * 1024;
/// The most memory that caisson-vmm gives a machine, MiB.
const MAX_MEMORY_MIB: u32 = 1 << 20;
/// The least with which a guest boots, MiB.
const MIN_MEMORY_MIB: u32 = 32;

/// The configuration with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The guest kernel, an uncompressed ELF vmlinux.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// vCPUs of a pod whose container has no limit of processors, 1 to 32.
    pub vcpus: u8,
    /// Guest memory of a pod whose container has no limit of memory, MiB, 32 to 1 TiB.
    pub memory_mib: u32,
    /// The most vCPUs that a limit gives a pod, 1 to 32.
    pub max_vcpus: u8,
    /// The least guest memory that a limit gives a pod, MiB.
    pub min_memory_mib: u32,
    /// The most guest memory that a limit gives a pod, MiB.
    pub max_memory_mib: u32,
    /// What the guest's kernel and agent take: added to a container's memory limit, MiB.
    pub guest_overhead_mib: u32,
    /// What caisson-vmm and caisson-fsd may take of the host beside the guest's memory: added to a limit, MiB.
    pub pod_overhead_memory_mib: u32,
    /// The same of processors, thousandths of one.
    pub pod_overhead_cpu_millis: u32,
    /// Send the guest's console to containerd's log.
    pub debug_console: bool,
    /// trace, debug, info, warning or error. containerd's own `-debug` makes it at least debug.
    pub log_level: String,
    /// Sockets and directories of running pods.
    pub state_dir: PathBuf,
    /// caisson-vmm. None: beside the shim, then /usr/local/bin, then PATH.
    pub monitor: Option<PathBuf>,
    /// caisson-fsd. None: as the monitor.
    pub file_server: Option<PathBuf>,
    /// How long a machine may take from its start to a ready agent, seconds.
    pub boot_timeout_s: u32,
    /// What the pods' network cards may do.
    pub network: NetworkConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/share/caisson/vmlinux".into(),
            initramfs: "/usr/local/share/caisson/initramfs".into(),
            vcpus: 1,
            memory_mib: 256,
            max_vcpus: 32,
            min_memory_mib: 128,
            max_memory_mib: MAX_MEMORY_MIB,
            guest_overhead_mib: 64,
            pod_overhead_memory_mib: 128,
            pod_overhead_cpu_millis: 250,
            debug_console: false,
            log_level: "info".into(),
            state_dir: "/run/caisson".into(),
            monitor: None,
            file_server: None,
            boot_timeout_s: 30,
            network: NetworkConfig::default(),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It is no such file as Caisson's configuration.
    #[error("configuration {path}, line {line}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What stands there and what could.
        message: String,
    },
    /// A value out of its range.
    #[error("configuration {path}: {key} is {value}, it must be {range}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it is.
        value: String,
        /// What it may be.
        range: &'static str,
    },
}

impl Config {
    /// The file that counts: CAISSON_CONFIG or the default.
    pub fn path() -> PathBuf {
        env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
    }

    /// Reads [`Config::path`]. Only the default file may be missing.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load() -> Result<Self, ConfigError> {
        let path = Self::path();
        let read = fs::File::open(&path).and_then(|file| {
            let mut text = String::new();
            io::Read::read_to_string(&mut io::Read::take(file, MAX_SIZE), &mut text)?;
            Ok(text)
        });
        match read {
            Ok(text) => Self::parse(&path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// Reads `text`, naming `path` in errors.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] or [`ConfigError::Range`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start).min(text.len());
            let line = text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1;
            ConfigError::Parse { path: path.to_owned(), line, message: error.message().to_owned() }
        })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let range = |key: &str, value: String, range| {
            let (path, key) = (path.to_owned(), key.to_owned());
            ConfigError::Range { path, key, value, range }
        };
        for (key, value) in [("vcpus", self.vcpus), ("max_vcpus", self.max_vcpus)] {
            if !(1..=32).contains(&value) {
                return Err(range(key, value.to_string(), "1 to 32"));
            }
        }
        for (key, value) in [
            ("memory_mib", self.memory_mib),
            ("min_memory_mib", self.min_memory_mib),
            ("max_memory_mib", self.max_memory_mib),
        ] {
            if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&value) {
                return Err(range(key, value.to_string(), "32 to 1048576"));
            }
        }
        if self.min_memory_mib > self.max_memory_mib {
            return Err(range("min_memory_mib", self.min_memory_mib.to_string(), "at most max_memory_mib"));
        }
        for (key, value) in
            [("guest_overhead_mib", self.guest_overhead_mib), ("pod_overhead_memory_mib", self.pod_overhead_memory_mib)]
        {
            if value > MAX_MEMORY_MIB {
                return Err(range(key, value.to_string(), "0 to 1048576"));
            }
        }
        if self.pod_overhead_cpu_millis > 1_000_000 {
            let value = self.pod_overhead_cpu_millis.to_string();
            return Err(range("pod_overhead_cpu_millis", value, "0 to 1000000"));
        }
        if let Some((key, value, must)) = self.network.mistake() {
            return Err(range(&key, value.to_string(), must));
        }
        if !(1..=3600).contains(&self.boot_timeout_s) {
            return Err(range("boot_timeout_s", self.boot_timeout_s.to_string(), "1 to 3600"));
        }
        if caisson_log::parse_level(&self.log_level).is_none() {
            let range = range("log_level", format!("{:?}", self.log_level), "trace, debug, info, warning or error");
            return Err(range);
        }
        let absolute = "an absolute path";
        for (key, value) in [("kernel", &self.kernel), ("initramfs", &self.initramfs), ("state_dir", &self.state_dir)] {
            if !value.is_absolute() {
                return Err(range(key, value.display().to_string(), absolute));
            }
        }
        for (key, value) in [("monitor", &self.monitor), ("file_server", &self.file_server)] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_absolute()) {
                return Err(range(key, value.display().to_string(), absolute));
            }
        }
        Ok(())
    }

    /// The level to log at.
    pub fn level(&self, debug: bool) -> slog::Level {
        let level = caisson_log::parse_level(&self.log_level).unwrap_or(slog::Level::Info);
        if debug && !level.is_at_least(slog::Level::Debug) { slog::Level::Debug } else { level }
    }

    /// Where caisson-vmm is.
    pub fn monitor(&self) -> PathBuf {
        self.monitor.clone().unwrap_or_else(|| find_program("caisson-vmm"))
    }

    /// Where caisson-fsd is.
    pub fn file_server(&self) -> PathBuf {
        self.file_server.clone().unwrap_or_else(|| find_program("caisson-fsd"))
    }
}

/// Beside this program, in /usr/local/bin, in PATH; if it is nowhere, where the documentation says it should be.
fn find_program(name: &str) -> PathBuf {
    let beside = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let installed = PathBuf::from("/usr/local/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = beside.into_iter().chain([installed.clone()]).chain(env::split_paths(&path));
    places.find(|place| place.join(name).is_file()).unwrap_or(installed).join(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/c.toml"), text)
    }

    #[test]
    fn an_empty_file_is_the_defaults_and_every_key_can_be_set() {
        assert_eq!(parse("").unwrap(), Config::default());
        let text = "kernel = '/k'\ninitramfs = '/i'\nvcpus = 2\nmemory_mib = 512\ndebug_console = true\n\
            log_level = 'debug'\nstate_dir = '/s'\nmonitor = '/m'\nfile_server = '/f'\nboot_timeout_s = 5\n\
            max_vcpus = 4\nmin_memory_mib = 64\nmax_memory_mib = 1024\nguest_overhead_mib = 32\n\
            pod_overhead_memory_mib = 16\npod_overhead_cpu_millis = 100\n\
            [network]\nanti_spoofing = true\n[network.send]\nbytes = 1000\nbytes_burst = 10\npackets = 5\npackets_burst = 2\n\
            [network.receive]\nbytes = 2000\n";
        let config = parse(text).unwrap();
        assert_eq!((config.vcpus, config.memory_mib, config.debug_console), (2, 512, true));
        assert_eq!((config.monitor(), config.file_server()), ("/m".into(), "/f".into()));
        assert_eq!(config.level(false), slog::Level::Debug);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_name_and_line() {
        let refused = parse("vcpus = 1\n\nmemory_mb = 512\n").unwrap_err().to_string();
        assert!(refused.starts_with("configuration /c.toml, line 3: "), "{refused}");
        assert!(refused.contains("memory_mb"), "{refused}");
    }

    #[test]
    fn a_value_out_of_range_is_refused_by_name_and_value() {
        for (text, words) in [
            ("vcpus = 0", "vcpus is 0"),
            ("vcpus = 33", "vcpus is 33"),
            ("memory_mib = 16", "memory_mib is 16"),
            ("max_vcpus = 0", "max_vcpus is 0"),
            ("min_memory_mib = 300\nmax_memory_mib = 200", "min_memory_mib is 300"),
            ("max_memory_mib = 2000000", "max_memory_mib is 2000000"),
            ("guest_overhead_mib = 2000000", "guest_overhead_mib is 2000000"),
            ("pod_overhead_cpu_millis = 2000000", "pod_overhead_cpu_millis is 2000000"),
            ("kernel = 'vmlinux'", "kernel is vmlinux"),
            ("[network.send]\nbytes = 0", "network.send.bytes is 0"),
            ("[network]\nanti_spoof = true", "anti_spoof"),
            ("log_level = 'loud'", "log_level is \"loud\""),
            ("vcpus = 'two'", "line 1"),
        ] {
            let refused = parse(text).unwrap_err().to_string();
            assert!(refused.contains(words), "{text}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_without_panic(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }
}

//! What a container has used: the kernel's files as numbers. Documentation/admin-guide/cgroup-v2.rst describes the
//! formats.

use std::{collections::HashMap, fs, io, path::Path};

use caisson_protos::agent::{HugetlbStats, IoStats, StatsResponse};

use super::{Cgroup, CgroupError, io_error};

/// Stands for `max`.
pub const NO_LIMIT: u64 = u64::MAX;

/// `key value` lines. A line that is none is left out.
pub fn flat(text: &str) -> HashMap<String, u64> {
    let line = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// One number, or `max`.
pub fn single(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(NO_LIMIT),
        number => number.parse().ok(),
    }
}

/// `major:minor key=value key=value` lines.
pub fn nested(text: &str) -> Vec<IoStats> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let counter = |word: &str| {
            let (key, value) = word.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        };
        Some(IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            counters: words.filter_map(counter).collect(),
            ..Default::default()
        })
    };
    text.lines().filter_map(line).collect()
}

/// The page size of a file `hugetlb.<size>.current`.
fn page_size(name: &str) -> Option<&str> {
    let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
    // Others are hugetlb.<size>.rsvd.current.
    (!size.contains('.')).then_some(size)
}

impl Cgroup {
    /// The numbers of now.
    ///
    /// # Errors
    /// If a file that exists cannot be read.
    pub fn stats(&self) -> Result<StatsResponse, CgroupError> {
        let text = |name: &str| match read(&self.path.join(name)) {
            Ok(text) => Ok(text.unwrap_or_default()),
            Err(error) => Err(io_error("read", &self.path.join(name))(error)),
        };
        let number = |name: &str| Ok(single(&text(name)?).unwrap_or(0));
        let mut hugetlb = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("list", &self.path))?.flatten() {
            let name = entry.file_name();
            if let Some(size) = name.to_str().and_then(page_size) {
                hugetlb.push(HugetlbStats {
                    page_size: size.into(),
                    current: number(&format!("hugetlb.{size}.current"))?,
                    max: number(&format!("hugetlb.{size}.max"))?,
                    ..Default::default()
                });
            }
        }
        hugetlb.sort_by(|a, b| a.page_size.cmp(&b.page_size));
        Ok(StatsResponse {
            cpu: flat(&text("cpu.stat")?),
            memory: flat(&text("memory.stat")?),
            memory_events: flat(&text("memory.events")?),
            memory_current: number("memory.current")?,
            memory_max: number("memory.max")?,
            swap_current: number("memory.swap.current")?,
            swap_max: number("memory.swap.max")?,
            pids_current: number("pids.current")?,
            pids_max: number("pids.max")?,
            io: nested(&text("io.stat")?),
            hugetlb,
            ..Default::default()
        })
    }
}

/// None if the kernel has no such file.
fn read(file: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // A statistic that this kernel's configuration or hardware cannot give.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let cpu = flat("usage_usec 17\nuser_usec 10\nsystem_usec 7\nnr_bursts 0\n");
        assert_eq!((cpu.len(), cpu["usage_usec"], cpu["nr_bursts"]), (4, 17, 0));
        assert_eq!(
            (single("max\n"), single("18446744073709551614\n"), single("")),
            (Some(NO_LIMIT), Some(NO_LIMIT - 1), None)
        );
        let io = nested("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:0\n8:0 cost.usage=9\n");
        assert_eq!(io.len(), 3);
        assert_eq!((io[0].major, io[0].minor, io[0].counters["dios"]), (8, 16, 6));
        assert_eq!((io[1].major, io[1].counters.len(), io[2].counters["cost.usage"]), (254, 0, 9));
        assert_eq!(page_size("hugetlb.2MB.current"), Some("2MB"));
        assert_eq!(page_size("hugetlb.2MB.rsvd.current"), None);
        assert_eq!(page_size("hugetlb.2MB.max"), None);
    }

    #[test]
    fn lines_of_another_kind_are_left_out() {
        assert_eq!(flat("a\nb x\n\nc 1 2\nd -1\ne 3\n").into_iter().collect::<Vec<_>>(), [("e".to_owned(), 3)]);
        assert_eq!(nested("x\n8 a=1\n8:x a=1\n8:0 a b=x c=1\n").len(), 1);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text: String) {
            let _ = (flat(&text), single(&text), nested(&text), page_size(&text));
        }

        #[test]
        fn what_the_kernel_writes_is_read_back(
            values in proptest::collection::hash_map("[a-z_]{1,12}", any::<u64>(), 0..20),
        ) {
            let text: String = values.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
            prop_assert_eq!(flat(&text), values.clone());
            let words: String = values.iter().map(|(key, value)| format!(" {key}={value}")).collect();
            let read = nested(&format!("8:0{words}\n"));
            prop_assert_eq!(&read[0].counters, &values);
        }
    }
}

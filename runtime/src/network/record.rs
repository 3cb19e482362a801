//! In which network namespace a pod was, written down for the day its shim is killed: taps go with the processes that have them
//! open, but filters on the pod's interfaces stay. A namespace that the runtime has made is not written down: it goes with
//! the pod's processes.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::namespace::{Identity, Namespace};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which it was: by now the path may lead to another.
    pub identity: Identity,
    /// Its path.
    pub path: PathBuf,
}

impl Record {
    /// Writes it to `file`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        let mut text = format!("{} {}\n", self.identity.device, self.identity.inode).into_bytes();
        text.extend(self.path.as_os_str().as_bytes());
        fs::write(file, text)
    }

    /// Reads it from `file`; none if there is none, or something else.
    pub fn read(file: &Path) -> Option<Self> {
        let text = fs::read(file).ok()?;
        let end = text.iter().position(|byte| *byte == b'\n')?;
        let (numbers, path) = text.split_at_checked(end)?;
        let (device, inode) = std::str::from_utf8(numbers).ok()?.split_once(' ')?;
        let identity = Identity { device: device.parse().ok()?, inode: inode.parse().ok()? };
        Some(Self { identity, path: PathBuf::from(OsStr::from_bytes(path.get(1..)?)) })
    }

    /// The namespace, if it is still where it was.
    pub fn namespace(&self) -> Option<Namespace> {
        let found = Namespace::open(&self.path).ok()?;
        (found.identity().ok()? == self.identity).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn another_namespace_at_the_same_path_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("network");
        assert_eq!(Record::read(&file), None);
        let namespace = Namespace::new().expect("these tests run as root");
        let thread = namespace.task_thread().unwrap();
        let path = PathBuf::from(format!("/proc/{}/ns/net", thread.pid()));
        let record = Record { identity: namespace.identity().unwrap(), path };
        record.write(&file).unwrap();
        assert_eq!(Record::read(&file).unwrap(), record);
        assert!(record.namespace().is_some());
        let other = Record { identity: Namespace::new().unwrap().identity().unwrap(), ..record };
        assert!(other.namespace().is_none());
    }

    proptest! {
        #[test]
        fn any_path_comes_back_and_any_bytes_are_read_or_not(path in proptest::collection::vec(1u8.., 1..50), device: u64, inode: u64) {
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join("network");
            fs::write(&file, &path).unwrap();
            let _ = Record::read(&file);
            let record = Record { identity: Identity { device, inode }, path: OsStr::from_bytes(&path).into() };
            record.write(&file).unwrap();
            prop_assert_eq!(Record::read(&file), Some(record));
        }
    }
}

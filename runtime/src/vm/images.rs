//! The guest's kernel and initramfs, opened for the monitor. A file that is missing or of the wrong kind is refused here, where its
//! path is known: the monitor gets descriptors and knows no paths.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// A kernel or initramfs that cannot be used, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened or read.
    #[error("cannot read the {what} {path}: {source}: install it (make install) or name it in {config}", config = crate::host::config::DEFAULT_PATH)]
    Unreadable {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// Not a kernel that the monitor boots.
    #[error("the kernel {0} is not an ELF file: an uncompressed vmlinux is needed, not a bzImage")]
    NotElf(PathBuf),
    /// The file has no bytes.
    #[error("the {what} {path} is empty")]
    Empty {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
}

/// Opens the kernel, if it is an ELF file. The monitor, which loads it, checks the rest.
///
/// # Errors
/// [`ImageError::Unreadable`], [`ImageError::NotElf`] or [`ImageError::Empty`].
pub fn open_kernel(path: &Path) -> Result<File, ImageError> {
    let file = open_file("kernel", path)?;
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if &magic == b"\x7fELF" => Ok(file),
        Ok(()) => Err(ImageError::NotElf(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ImageError::NotElf(path.to_owned())),
        Err(source) => Err(ImageError::Unreadable { what: "kernel", path: path.to_owned(), source }),
    }
}

/// Opens the initramfs.
///
/// # Errors
/// [`ImageError::Unreadable`] or [`ImageError::Empty`].
pub fn open_initramfs(path: &Path) -> Result<File, ImageError> {
    open_file("initramfs", path)
}

fn open_file(what: &'static str, path: &Path) -> Result<File, ImageError> {
    let unreadable = |source| ImageError::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    if metadata.len() == 0 { Err(ImageError::Empty { what, path: path.to_owned() }) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_no_kernel_and_no_initramfs_are_refused_by_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        std::fs::write(&path, b"\x7fELF and more").unwrap();
        open_kernel(&path).unwrap();
        for other in ["MZ\0\0 bzImage", "\x7fE"] {
            std::fs::write(&path, other).unwrap();
            assert!(matches!(open_kernel(&path), Err(ImageError::NotElf(_))), "{other}");
        }
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(open_kernel(&path), Err(ImageError::Empty { .. })));
        assert!(matches!(open_initramfs(directory.path()), Err(ImageError::Unreadable { .. })));
        let error = open_initramfs(Path::new("/no/initramfs")).unwrap_err().to_string();
        assert!(error.contains("initramfs /no/initramfs") && error.contains("make install"), "{error}");
    }
}

//! FUSE's operations on the [`Tree`], each a few system calls.
//!
//! The crate fuse-backend-rs decodes requests and encodes replies. Its own pass-through file system is not used; what
//! stood against it, in version 0.14: it needs `/proc` by name inside the jail for attributes; hard links need
//! CAP_DAC_READ_SEARCH; it drops CAP_DAC_OVERRIDE while it creates a file, so supplementary groups are lost; it sets the
//! guest's O_DIRECT and O_APPEND on the host's descriptor; it applies the umask where an ACL should win; it never
//! forgets inode numbers, or takes 255 mounts in a lifetime; and it numbers entries in readdir differently from stat.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, IoSlice},
    time::Duration,
};

use fuse_backend_rs::{
    abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64, statvfs64},
    api::filesystem::{
        Context, DirEntry, Entry, FileLock, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
    },
};
use rustix::{
    fs::{
        AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
        UTIME_OMIT, Uid, chmodat, chownat, fallocate, fdatasync, fsync, ftruncate, getxattr, getxattr_query, linkat,
        listxattr, listxattr_query, mkdirat, mknodat, openat, readlinkat, removexattr, renameat_with, seek, symlinkat,
        unlinkat, utimensat,
    },
    io::{Errno, ReadWriteFlags, pwritev2},
    path::DecInt,
};

use crate::{
    attributes::file_system,
    directory,
    files::Access,
    handshake::{MAX_DATA, Sharing},
    identity::without_fsetid,
    service::{Service, check_name},
    tree::component,
    wire::is_guests,
};

/// The longest extended attribute and list of them that Linux has (XATTR_SIZE_MAX, XATTR_LIST_MAX), bytes.
const MAX_XATTR: usize = 65536;

impl FileSystem for Service {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.tree.clear();
        Ok(capable & self.tree.sharing().options())
    }

    fn destroy(&self) {
        self.tree.clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        match self.tree.lookup(parent, name) {
            // Inode 0: "does not exist", and the guest may remember that.
            Err(Errno::NOENT) => {
                let parent = self.tree.node(parent)?;
                Ok(Entry { entry_timeout: self.tree.timeout(&parent), ..Entry::default() })
            }
            result => Ok(result?),
        }
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        self.tree.forget(node, count);
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let node = self.tree.node(node)?;
        let stat = self.tree.identify(&node)?;
        Ok((self.tree.attributes(&stat), self.tree.timeout(&node)))
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        new: stat64,
        _: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let of = self.tree.node(node)?;
        let proc_name = || DecInt::from_fd(&*of);
        let has = |which: SetattrValid| valid.intersects(which);
        // The owner first: a change of owner takes setuid and setgid bits away, a new mode may bring them back.
        if has(SetattrValid::UID | SetattrValid::GID | SetattrValid::MODE) {
            let uid = (has(SetattrValid::UID) && new.st_uid != u32::MAX).then(|| Uid::from_raw(new.st_uid));
            let gid = (has(SetattrValid::GID) && new.st_gid != u32::MAX).then(|| Gid::from_raw(new.st_gid));
            self.tree.change(&of, || {
                if has(SetattrValid::UID | SetattrValid::GID) {
                    chownat(&*of, c"", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
                }
                if has(SetattrValid::MODE) {
                    let mode = Mode::from_raw_mode(new.st_mode & 0o7777);
                    chmodat(self.tree.proc_fds(), proc_name(), mode, AtFlags::empty())?;
                }
                Ok(())
            })?;
        }
        if has(SetattrValid::SIZE) {
            let size = u64::try_from(new.st_size).map_err(|_| Errno::INVAL)?;
            let file = self.tree.file(node, Access::Write)?;
            without_fsetid(has(SetattrValid::KILL_SUIDGID), || ftruncate(&**file, size))??;
        }
        if has(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |now: SetattrValid, set: SetattrValid, sec, nsec| match () {
                () if valid.contains(now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                () if valid.contains(set) => Timespec { tv_sec: sec, tv_nsec: nsec },
                () => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            };
            let times = Timestamps {
                last_access: time(SetattrValid::ATIME_NOW, SetattrValid::ATIME, new.st_atime, new.st_atime_nsec),
                last_modification: time(SetattrValid::MTIME_NOW, SetattrValid::MTIME, new.st_mtime, new.st_mtime_nsec),
            };
            self.tree.change(&of, || utimensat(self.tree.proc_fds(), proc_name(), &times, AtFlags::empty()))?;
        }
        self.getattr(context, node, None)
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        Ok(readlinkat(&*self.tree.node(node)?, c"", Vec::new())?.into_bytes())
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make(context, parent, name, 0, |directory| symlinkat(target, directory, name))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode & 0o7777));
        self.make(context, parent, name, umask, |directory| mknodat(directory, name, kind, mode, rdev.into()))
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.make(context, parent, name, umask, |directory| mkdirat(directory, name, mode))
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        Ok(unlinkat(&*self.tree.node(parent)?, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        Ok(unlinkat(&*self.tree.node(parent)?, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(&self, _: &Context, from: u64, name: &CStr, to: u64, new_name: &CStr, flags: u32) -> io::Result<()> {
        component(name)?;
        component(new_name)?;
        let flags = RenameFlags::from_bits_retain(flags);
        let (from, to) = (self.tree.node(from)?, self.tree.node(to)?);
        if !from.overlay && !to.overlay {
            return Ok(renameat_with(&*from, name, &*to, new_name, flags)?);
        }
        // What is renamed may get another identity by that.
        let _exclusive = self.tree.exclusive();
        let exchanged = flags.contains(RenameFlags::EXCHANGE).then(|| self.tree.unsettled(&to, new_name)).flatten();
        let changed = [self.tree.unsettled(&from, name), exchanged];
        renameat_with(&*from, name, &*to, new_name, flags)?;
        for node in changed.into_iter().flatten() {
            self.tree.note_identity(&node, true)?;
        }
        Ok(())
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        let (node, directory) = (self.tree.node(node)?, self.tree.node(parent)?);
        // Of the mount that the new name is on; others are refused.
        let file = node.path_on(directory.mount);
        // By way of /proc: linking a descriptor itself (AT_EMPTY_PATH) needs CAP_DAC_READ_SEARCH.
        let link = || linkat(self.tree.proc_fds(), DecInt::from_fd(file), &*directory, name, AtFlags::SYMLINK_FOLLOW);
        if !directory.overlay {
            link()?;
            return Ok(self.tree.lookup(parent, name)?);
        }
        let _exclusive = self.tree.exclusive();
        link()?;
        self.tree.note_identity(&node, true)?;
        Ok(self.tree.lookup_exclusive(&directory, name)?)
    }

    fn open(&self, _: &Context, node: u64, flags: u32, _: u32) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        // "Not needed": see crate::handshake.
        let not_needed = Err(Errno::NOSYS.into());
        let regular = self.tree.node(node)?.kind == FileType::RegularFile;
        if !regular || flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32 {
            return not_needed;
        }
        // Refused now and not at the first write; and an overlay copies the file up while it has its name.
        let options = match self.tree.file(node, Access::Write) {
            Ok(_) if self.tree.sharing() == Sharing::Alone => return not_needed,
            // The guest says then when it has closed it.
            Ok(_) => OpenOptions::KEEP_CACHE,
            // What is appended must not wait in a cache: only the whole of a page could be written back.
            Err(Errno::PERM) if flags & libc::O_APPEND as u32 != 0 => {
                self.tree.file(node, Access::Append)?;
                OpenOptions::DIRECT_IO
            }
            Err(errno) => return Err(errno.into()),
        };
        self.tree.add_writer(node);
        Ok((None, options, None))
    }

    fn release(&self, _: &Context, node: u64, flags: u32, _: u64, _: bool, _: bool, _: Option<u64>) -> io::Result<()> {
        if self.tree.sharing() == Sharing::WithHost && flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 {
            self.tree.remove_writer(node);
        }
        Ok(())
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        component(name)?;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let writes = args.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        let created = self.create_open(parent, (context.uid, context.gid, args.umask), writes, |directory| {
            openat(directory, name, flags, mode)
        });
        let exclusive = args.flags & libc::O_EXCL as u32 != 0;
        let entry = match created {
            // It was there without the guest's knowledge, which therefore has checked nothing: it is to look it up.
            Err(Errno::EXIST) if !exclusive => return Err(Errno::STALE.into()),
            created => created?,
        };
        let cached = self.tree.sharing() == Sharing::Alone;
        let options = if cached { OpenOptions::KEEP_CACHE } else { OpenOptions::empty() };
        Ok((entry, None, options, None))
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let file = self.tree.file(node, Access::Read)?;
        let size = to.available_bytes().min(size as usize);
        let mut done = 0;
        // All of it: what is missing would be a hole for the guest, and an error in the middle is one.
        while done < size {
            match file.lend(|file| to.write_from(file, size - done, offset.saturating_add(done as u64)))? {
                0 => break,
                read => done += read,
            }
        }
        Ok(done)
    }

    fn write(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        // Elsewhere the guest knows where the file ends.
        let appends = !delayed && flags & libc::O_APPEND as u32 != 0;
        let file = match self.tree.file(node, Access::Write) {
            Err(Errno::PERM) if appends => self.tree.file(node, Access::Append),
            file => file,
        }?;
        let at_end = appends && (self.tree.sharing() == Sharing::WithHost || file.access == Access::Append);
        without_fsetid(fuse_flags & WRITE_KILL_PRIV != 0, || {
            if at_end {
                return append(&file, from, size as usize);
            }
            file.lend(|file| write_all(file, from, size as usize, offset, delayed))
        })?
    }

    fn lseek(&self, _: &Context, node: u64, _: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let file = self.tree.file(node, Access::Read)?;
        let place = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(seek(&**file, place)?)
    }

    fn getlk(&self, _: &Context, node: u64, _: u64, owner: u64, lock: FileLock, _: u32) -> io::Result<FileLock> {
        if self.tree.sharing() == Sharing::Alone {
            return Err(Errno::NOSYS.into());
        }
        self.tree.settle(node)?;
        let open = |write| self.tree.open_for_lock(node, write);
        Ok(self.tree.locks().get((node, owner), lock, open)?)
    }

    fn setlk(&self, _: &Context, node: u64, _: u64, owner: u64, lock: FileLock, flags: u32) -> io::Result<()> {
        if self.tree.sharing() == Sharing::Alone {
            return Err(Errno::NOSYS.into());
        }
        self.tree.settle(node)?;
        let open = |write| self.tree.open_for_lock(node, write);
        Ok(self.tree.locks().set((node, owner), lock, flags, open)?)
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, _: u64) -> io::Result<()> {
        let file = self.tree.file(node, Access::Read)?;
        let synced = if data_only { fdatasync(&**file) } else { fsync(&**file) };
        Ok(synced?)
    }

    fn fallocate(&self, _: &Context, node: u64, _: u64, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        let file = self.tree.file(node, Access::Write)?;
        // As with copies.
        Ok(without_fsetid(true, || fallocate(&**file, FallocateFlags::from_bits_retain(mode), offset, len))??)
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<statvfs64> {
        Ok(file_system(&*self.tree.node(node)?)?)
    }

    fn setxattr(&self, _: &Context, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        Ok(self.set_attribute(node, (name, value), flags, false)?)
    }

    fn getxattr(&self, _: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        check_name(name, Errno::NODATA)?;
        let node = self.tree.node(node)?;
        let path = DecInt::from_fd(&*node);
        if size == 0 {
            return Ok(GetxattrReply::Count(getxattr_query(path, name)? as u32));
        }
        let mut value = vec![0; (size as usize).min(MAX_XATTR)];
        let len = getxattr(path, name, &mut value[..])?;
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let node = self.tree.node(node)?;
        let path = || DecInt::from_fd(&*node);
        let mut all = vec![0u8; listxattr_query(path())?.min(MAX_XATTR)];
        let len = listxattr(path(), &mut all[..])?;
        all.truncate(len);
        let mut names = Vec::with_capacity(len);
        for name in all.split_inclusive(|byte| *byte == 0) {
            if CStr::from_bytes_with_nul(name).is_ok_and(is_guests) {
                names.extend_from_slice(name);
            }
        }
        match size as usize {
            0 => Ok(ListxattrReply::Count(names.len() as u32)),
            size if size < names.len() => Err(Errno::RANGE.into()),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        check_name(name, Errno::NODATA)?;
        let node = self.tree.node(node)?;
        Ok(self.tree.change(&node, || removexattr(DecInt::from_fd(&*node), name))?)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let node = self.tree.node(node)?;
        let handle = self.tree.open_directory(&node)?;
        let cached = OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE;
        let options = if self.tree.timeout(&node).is_zero() { OpenOptions::empty() } else { cached };
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        Ok(directory::list(&self.tree, node, handle, offset, add)?)
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        Ok(directory::list_plus(&self.tree, node, handle, offset, add)?)
    }

    fn fsyncdir(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let directory = self.tree.directory(node, handle)?;
        let synced = if data_only { fdatasync(&directory.file) } else { fsync(&directory.file) };
        Ok(synced?)
    }

    fn releasedir(&self, _: &Context, node: u64, _: u32, handle: u64) -> io::Result<()> {
        Ok(self.tree.close_directory(node, handle)?)
    }
}

/// Writes all of a request's data. What the guest writes back of its cache (`delayed`) must be written as a whole, or be an
/// error: Linux does not look at the count there. Otherwise a count that the disk has cut short is the answer.
fn write_all(
    file: &mut File,
    from: &mut dyn ZeroCopyReader,
    size: usize,
    offset: u64,
    delayed: bool,
) -> io::Result<usize> {
    let mut done = 0;
    while done < size {
        match from.read_to(file, size - done, offset.saturating_add(done as u64)) {
            Ok(0) if delayed => return Err(Errno::IO.into()),
            Ok(0) => break,
            Ok(written) => done += written,
            Err(_) if done > 0 && !delayed => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Appends a request's data wherever the file ends now: the guest's idea of its end is older than what the host's processes
/// have written.
fn append(file: &File, from: &mut dyn ZeroCopyReader, size: usize) -> io::Result<usize> {
    let mut data = vec![0; size.min(MAX_DATA)];
    from.read_exact(&mut data)?;
    Ok(pwritev2(file, &[IoSlice::new(&data)], 0, ReadWriteFlags::APPEND)?)
}

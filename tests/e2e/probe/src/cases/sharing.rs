//! One directory of the host at two places: what is done to a file by one name holds by the other.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        fs::{FileExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
};

use rustix::{
    fs::{CWD, FileType, FlockOperation, flock, mknodat},
    mm::{MapFlags, ProtFlags, mmap},
};

use super::{below, case, done, locks};

const PAGE: usize = 4096;

/// `one` and `other` are the same directory.
pub fn all(one: &Path, other: &Path) {
    let (one, other) = (below(one), below(other));
    case("a file", done(fs::write(one("file"), "content")));
    case("by the other name", fs::read_to_string(other("file")));
    let same = |name: &str| {
        let (one, other) = (fs::metadata(one(name))?, fs::metadata(other(name))?);
        Ok::<_, std::io::Error>((one.dev(), one.ino()) == (other.dev(), other.ino()))
    };
    case("the same file", same("file"));
    let open = |path: &Path| File::options().read(true).write(true).open(path).expect("it is there");
    let (first, second) = (open(&one("file")), open(&other("file")));

    case("flock", done(flock(&first, FlockOperation::NonBlockingLockExclusive)));
    case("flock by the other name", done(flock(&second, FlockOperation::NonBlockingLockExclusive)));
    case("flock given back", done(flock(&first, FlockOperation::Unlock)));
    case("flock by the other name afterwards", done(flock(&second, FlockOperation::NonBlockingLockExclusive)));
    case("OFD lock", done(locks::open_file(&first, false)));
    case("OFD lock by the other name", done(locks::open_file(&second, false)));

    let listener = UnixListener::bind(one("socket"));
    let heard = listener.map(|listener| {
        thread::spawn(move || {
            let mut text = String::new();
            listener.accept().and_then(|(mut stream, _)| stream.read_to_string(&mut text)).map(|_| text)
        })
    });
    match heard {
        Ok(heard) => {
            let said =
                UnixStream::connect(other("socket")).and_then(|mut stream| stream.write_all(b"through a socket"));
            let connected = said.is_ok();
            case("connect by the other name", done(said));
            if connected {
                case("heard", heard.join().expect("it does not panic"));
            }
        }
        Err(error) => case("bind", Err::<&str, _>(error)),
    }

    case("a FIFO", done(mknodat(CWD, one("fifo"), FileType::Fifo, 0o600.into(), 0)));
    let path = other("fifo");
    let reader = thread::spawn(move || fs::read_to_string(path));
    let written = File::options().write(true).open(one("fifo")).and_then(|mut fifo| fifo.write_all(b"through a FIFO"));
    case("written by the one name", done(written));
    case("read by the other name", reader.join().expect("it does not panic"));

    mappings(&first, &second);
    case("a link from one to the other", done(fs::hard_link(one("file"), other("link"))));
    case("a rename from one to the other", done(fs::rename(one("file"), other("renamed"))));
    case("unlinked by the other name", done(fs::remove_file(other("file"))));
    case("by the one name", done(fs::metadata(one("file"))));
}

fn mappings(first: &File, second: &File) {
    case("one page", done(first.set_len(PAGE as u64)));
    let map = |file: &File| {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        unsafe { mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) }
    };
    let (Ok(one), Ok(other)) = (map(first), map(second)) else {
        return case("MAP_SHARED", Ok::<_, std::io::Error>("refused"));
    };
    // SAFETY: both are mappings of a page, readable and writable, which stay as long as the process; the access is volatile,
    // because both may be the same memory.
    let (seen, back) = unsafe {
        one.cast::<u8>().write_volatile(b'x');
        let seen = other.cast::<u8>().read_volatile();
        other.cast::<u8>().add(1).write_volatile(b'y');
        (seen, one.cast::<u8>().add(1).read_volatile())
    };
    case("stored in one mapping", Ok::<_, std::io::Error>(char::from(seen)));
    case("stored in the other", Ok::<_, std::io::Error>(char::from(back)));
    let mut bytes = [0; 2];
    let read = second.read_exact_at(&mut bytes, 0).map(|()| String::from_utf8_lossy(&bytes).into_owned());
    case("read from the file", read);
}

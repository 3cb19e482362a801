//! Files without a name, renames with flags, and renames of what the image holds.

use caisson_e2e::{Host, Setup, host::Image};

use super::{holds, volume, with_volume};

caisson_e2e::for_each_runtime!(
    on_a_volume in Setup::default().image(Image::Probe).disk(64),
    on_the_root in Setup::default().image(Image::Probe).disk(64),
    of_the_image in Setup::default().image(Image::Probe).disk(64),
);

const UNNAMED: &str = "
    O_TMPFILE: done
    O_TMPFILE: links: 0
    O_TMPFILE: entries: 0
    linkat through /proc: done
    linkat through /proc: content: content
    linkat through /proc: mode: 640
    linkat through /proc: links: 1
    linkat over a file: EEXIST
    linkat with an empty path: done
    linkat after O_EXCL: ENOENT
    written after linkat: content and more
    read by its name: content and more";

const RENAMES: &str = "
    files and directories: done
    EXCHANGE of files: done
    EXCHANGE of files: contents: ba
    EXCHANGE of files: numbers: true
    EXCHANGE of a file and a directory: done
    EXCHANGE of a file and a directory: content: file
    EXCHANGE back: done
    EXCHANGE with nothing: ENOENT
    EXCHANGE of a directory and what is below: EINVAL
    NOREPLACE over a file: EEXIST
    NOREPLACE to a free name: done
    NOREPLACE and EXCHANGE: EINVAL";

const WHITEOUT: &str = "
    WHITEOUT: done
    WHITEOUT: left: true";

/// An overlay takes no such rename, and leaves the file where it is.
const NO_WHITEOUT: &str = "
    WHITEOUT: EINVAL
    WHITEOUT: left: false";

const DIRECTORIES: &str = "
    a directory over a full one: ENOTEMPTY
    a directory over an empty one: done
    a directory over an empty one: content: file
    a directory below itself: EINVAL
    a file over a directory: EISDIR
    a directory over a file: ENOTDIR
    to another mount: EXDEV";

fn on_a_volume(host: &Host) {
    let directory = volume(host);
    let container = with_volume(host, "volume", &directory).flag("--cap-add=CAP_DAC_READ_SEARCH");
    let output = container.run(&["probe", "cases", "names", "/v", "/"]).succeeded();
    holds(host, &output, &[UNNAMED, RENAMES, WHITEOUT, DIRECTORIES].join("\n"));
}

fn on_the_root(host: &Host) {
    let directory = volume(host);
    let container = with_volume(host, "root", &directory).flag("--cap-add=CAP_DAC_READ_SEARCH");
    let output = container.run(&["probe", "cases", "names", "/tmp", "/v"]).succeeded();
    // An overlay of the host's kernel (6.1) makes no files without a name.
    holds(host, &output, &["O_TMPFILE: EOPNOTSUPP", RENAMES, NO_WHITEOUT, DIRECTORIES].join("\n"));
}

fn of_the_image(host: &Host) {
    let output = host.container("image").run(&["probe", "cases", "image"]).succeeded();
    // Directories of a lower layer are not renamed: programs copy them instead.
    let table = "
        a directory of the image: EXDEV
        a directory of the image: content: 4
        a file of the image: done
        a file of the image: old name: ENOENT
        a file of the image: content: 4
        over a file of the image: done
        a new directory: done
        a file of the image into it: done
        the new directory: done
        a file of the image in it: true
        an empty directory of the image: EXDEV
        an empty directory of the image, made again: done
        and renamed: done
        EXCHANGE of directories of the image: EXDEV
        the root: bin dev etc newer proc root run sys tmp usr";
    holds(host, &output, table);
    // mv(1) does it by copying.
    let moved = host.container("moved").sh("mv /etc /elsewhere && ls /elsewhere && ls /etc 2> /dev/null || echo gone");
    assert_eq!(moved.succeeded(), "group\npasswd\ngone\n");
}

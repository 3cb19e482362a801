//! Holes, fallocate, copies inside the kernel, extents, and the time of birth.

use std::{fs, os::unix::fs::MetadataExt, time::UNIX_EPOCH};

use caisson_e2e::{Host, Setup, host::Image};

use super::{holds, volume, with_volume};

caisson_e2e::for_each_runtime!(
    of_files in Setup::default().image(Image::Probe).disk(64),
    copies_of_files_with_holes in Setup::default().image(Image::Debian),
);

const TABLE: &str = "
    a file with holes: done
    SEEK_DATA from the start: 128
    SEEK_HOLE from the start: 0
    SEEK_HOLE from the data: 129
    SEEK_DATA behind the data: ENXIO
    SEEK_HOLE behind the data: 200
    SEEK_DATA behind the end: ENXIO
    SEEK_DATA after another write: 130
    SEEK_HOLE at the end: 255
    fallocate, no flag: done
    fallocate, no flag: content: abcdefgh..
    fallocate, KEEP_SIZE: done
    fallocate, KEEP_SIZE: content: abcdefgh
    fallocate, PUNCH_HOLE: done
    fallocate, PUNCH_HOLE: content: ab....gh
    fallocate, PUNCH_HOLE alone: EOPNOTSUPP
    fallocate, PUNCH_HOLE alone: content: abcdefgh
    fallocate, ZERO_RANGE: done
    fallocate, ZERO_RANGE: content: abcdef....
    fallocate, ZERO_RANGE and KEEP_SIZE: done
    fallocate, ZERO_RANGE and KEEP_SIZE: content: abcdef..
    runc|fallocate, COLLAPSE_RANGE: done
    runc|fallocate, COLLAPSE_RANGE: content: abgh
    runc|fallocate, INSERT_RANGE: done
    runc|fallocate, INSERT_RANGE: content: ab....cdefgh
    caisson|fallocate, COLLAPSE_RANGE: EOPNOTSUPP
    caisson|fallocate, COLLAPSE_RANGE: content: abcdefgh
    caisson|fallocate, INSERT_RANGE: EOPNOTSUPP
    caisson|fallocate, INSERT_RANGE: content: abcdefgh
    fallocate, UNSHARE_RANGE: EOPNOTSUPP
    fallocate, UNSHARE_RANGE: content: abcdefgh
    a punched hole: 2
    data behind it: 6
    blocks beyond the end: true
    fallocate of more than there is: ENOSPC
    two files: done
    copy_file_range: 90000
    copy_file_range: offsets: 91000 92000
    copy_file_range: content: true
    copy_file_range onto itself: EINVAL
    copy_file_range from behind the end: 0
    FICLONE: EOPNOTSUPP
    a file to map: done
    runc|FIEMAP: 1 at 128
    caisson|FIEMAP: EOPNOTSUPP";

fn of_files(host: &Host) {
    let directory = volume(host);
    let pod = with_volume(host, "ranges", &directory).start_idle();
    for (name, place) in [("volume", "/v"), ("root", "/tmp")] {
        let output = pod.exec(name, &["probe", "cases", "ranges", place]);
        holds(host, &output.succeeded(), TABLE);
    }
    fs::write(directory.join("born"), "on the host").expect("it is written");
    let born = fs::metadata(directory.join("born")).and_then(|meta| meta.created()).expect("ext4 knows it");
    let born = born.duration_since(UNIX_EPOCH).expect("it is later");
    let output = pod.exec("born", &["probe", "cases", "born", "/v/born"]).succeeded();
    assert_eq!(output, format!("born: {}.{:09}\n", born.as_secs(), born.subsec_nanos()));
    pod.end();
}

/// cp(1) and tar(1), which ask for holes in different ways, keep them.
fn copies_of_files_with_holes(host: &Host) {
    let directory = volume(host);
    let script = "cd /v && truncate -s 8M sparse && printf data | dd of=sparse bs=1M seek=4 conv=notrunc status=none && \
        cp sparse copied && cp --sparse=never copied full && tar -cSf - sparse | tar -xOf - | cmp - sparse && \
        tar -cSf packed sparse && cmp sparse copied && cmp sparse full && du -k sparse copied full packed | sort -k2";
    let output = with_volume(host, "sparse", &directory).sh(script).succeeded();
    let sizes: Vec<u32> = output.lines().filter_map(|line| line.split('\t').next()?.parse().ok()).collect();
    let [copied, full, packed, sparse] = sizes[..] else { panic!("{output}") };
    assert!(copied < 100 && packed < 100 && sparse < 100 && full >= 8 << 10, "KiB in use: {output}");
    let blocks = fs::metadata(directory.join("copied")).expect("it is there").blocks();
    assert!(blocks < 200, "{blocks} blocks on the host");
}

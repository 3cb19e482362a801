//! So many files that a file server which kept something for each of them would need more than its pod's overhead.

use std::{fs, os::unix::fs::symlink};

use caisson_e2e::{Host, sizes, spec::Given};
use serde_json::json;

use super::holds;

caisson_e2e::for_each_runtime!(every_file_is_looked_at);

/// Files in each directory.
const EACH: usize = 500;

fn every_file_is_looked_at(host: &Host) {
    let directories = sizes::size(6, 104);
    let given = Given::new(host, "many");
    for directory in 0..directories {
        let directory = given.root.join(format!("files/{directory}"));
        fs::create_dir_all(&directory).expect("the test's directory takes files");
        // One inode on the host would be one in the guest, and a link is as good a file as any.
        for file in 0..EACH {
            symlink("target", directory.join(format!("file-{file}"))).expect("the test's directory takes links");
        }
    }
    let given = given
        .set("/linux/resources/memory", json!({ "limit": 64 << 20 }))
        .set("/process/args", json!(["/bin/probe", "cases", "walk", "/files"]));
    let ended = given.run().expect("it is a good specification");
    let count = directories * (EACH + 1);
    assert_eq!(ended.status, 0, "{ended:?}");
    holds(host, &ended.out, &format!("first walk: {count}\nsecond walk: {count}"));
}

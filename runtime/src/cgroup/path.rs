//! Where a pod's processes belong in the host's cgroup hierarchy, by the specification's `linux.cgroupsPath`:
//!
//! | cgroupsPath                     | directory below /sys/fs/cgroup                             |
//! |---------------------------------|------------------------------------------------------------|
//! | none                            | `<containerd's namespace>/<id>`, as containerd names it    |
//! | `/a/b`                          | `a/b`                                                      |
//! | `a/b`                           | beside the shim's own cgroup: `<its parent>/a/b`, as runc  |
//! | `a-b.slice:prefix:name`         | `a.slice/a-b.slice/prefix-name.scope`                      |
//! | `:prefix:name`                  | `system.slice/prefix-name.scope`                           |
//!
//! Pure: nothing is looked up. A name that could lead anywhere else than down is refused; runc would cut it to fit.

use std::path::PathBuf;

/// A cgroupsPath that names no place for a pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("linux.cgroupsPath {path:?}: {message}")]
pub struct PathError {
    path: String,
    message: &'static str,
}

/// The longest name of a cgroup, bytes (NAME_MAX).
const MAX_NAME: usize = 255;
/// Deepest place.
const MAX_DEPTH: usize = 32;

/// The directory for `path` relative to the hierarchy's root. `namespace` and `id` name the pod, `own` is the shim's
/// own cgroup as /proc/self/cgroup has it.
///
/// # Errors
/// [`PathError`] says what is wrong with the path.
pub fn directory(path: Option<&str>, namespace: &str, id: &str, own: &str) -> Result<PathBuf, PathError> {
    let Some(path) = path.filter(|path| !path.is_empty()) else {
        return Ok(PathBuf::from(namespace).join(id));
    };
    let wrong = |message| PathError { path: path.to_owned(), message };
    let names = match systemd(path) {
        Some((slice, prefix, name)) => {
            let mut names = slices(slice).map_err(wrong)?;
            names.push(unit(prefix, name));
            names
        }
        None => {
            let absolute = path.starts_with('/');
            let own = own.trim_end_matches('/').rsplit_once('/').map_or("", |(parent, _)| parent);
            let before = if absolute { "" } else { own };
            before.split('/').chain(path.split('/')).filter(|name| !name.is_empty()).map(str::to_owned).collect()
        }
    };
    if names.is_empty() {
        return Err(wrong("is the root of all cgroups, where no limit can be set"));
    }
    if names.len() > MAX_DEPTH {
        return Err(wrong("is nested more than 32 deep"));
    }
    for name in &names {
        check_name(name).map_err(wrong)?;
    }
    Ok(names.iter().collect())
}

fn check_name(name: &str) -> Result<(), &'static str> {
    match name {
        "." | ".." => Err("has the component . or .., which leads elsewhere"),
        _ if name.len() > MAX_NAME => Err("has a component of more than 255 bytes"),
        _ if name.contains(['/', '\0', '\n']) => Err("has a character that a cgroup's name cannot have"),
        // The kernel's own files in every cgroup.
        _ if name.starts_with("cgroup.") => Err("has a component that begins with \"cgroup.\", which is the kernel's"),
        _ => Ok(()),
    }
}

/// The three words of systemd's style. A path of the other style may have colons, too, but no slice in front.
fn systemd(path: &str) -> Option<(&str, &str, &str)> {
    let mut words = path.split(':');
    let (slice, prefix, name) = (words.next()?, words.next()?, words.next()?);
    let is_slice = slice.is_empty() || slice.ends_with(".slice") && !slice.starts_with('/');
    (words.next().is_none() && is_slice).then_some((slice, prefix, name))
}

/// The slices that `slice` lies in and itself: systemd nests them by the dashes of their names.
fn slices(slice: &str) -> Result<Vec<String>, &'static str> {
    if slice == "-.slice" {
        return Ok(Vec::new());
    }
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err("names a slice that systemd refuses");
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    Ok(ends.filter_map(|end| name.get(..end)).map(|part| format!("{part}.slice")).collect())
}

/// The pod's own unit.
fn unit(prefix: &str, name: &str) -> String {
    match prefix {
        _ if name.ends_with(".slice") => name.to_owned(),
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use proptest::prelude::*;

    use super::*;

    fn place(path: &str) -> Result<String, String> {
        let own = "/system.slice/containerd.service";
        let found = directory(Some(path), "ns", "one", own);
        found.map(|path| path.display().to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn both_styles_and_none() {
        for (path, expected) in [
            ("", "ns/one"),
            ("/default/one", "default/one"),
            ("/kubepods//burstable/pod1/", "kubepods/burstable/pod1"),
            ("mine/one", "system.slice/mine/one"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:one",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-one.scope",
            ),
            (":docker:one", "system.slice/docker-one.scope"),
            ("-.slice:p:one", "p-one.scope"),
            ("a.slice::one", "a.slice/one.scope"),
            ("a.slice:p:b.slice", "a.slice/b.slice"),
            ("/a.slice:p:one", "a.slice:p:one"),
            ("a:b", "system.slice/a:b"),
            ("x:p:one", "system.slice/x:p:one"),
        ] {
            assert_eq!(place(path).as_deref(), Ok(expected), "{path}");
        }
        assert_eq!(directory(None, "ns", "one", "/"), Ok("ns/one".into()));
        assert_eq!(directory(Some("x"), "ns", "one", "/"), Ok("x".into()));
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused_by_name() {
        for path in [
            "/",
            "//",
            "..",
            "/..",
            "/a/../..",
            "../x",
            "a/./b",
            "/a/cgroup.procs",
            "cgroup.kill",
            "/a\0b",
            "a\nb",
            "a.slice:p:../../x",
            "a.slice:../..:x",
            "../b.slice:p:x",
            "a--b.slice:p:x",
            "-a.slice:p:x",
            ".slice:p:x",
            "a.slice:p:x/y",
        ] {
            let refused = place(path).expect_err(path);
            assert!(refused.starts_with(&format!("linux.cgroupsPath {path:?}: ")), "{refused}");
        }
        assert!(place(&"x".repeat(256)).is_err() && place(&"x/".repeat(40)).is_err());
        assert!(directory(Some("x"), "ns", "one", "/../../y").is_err(), "outside of this cgroup namespace");
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_hierarchy(path in "[a-c./:\\-]{0,20}(\\.slice:)?[a-z./:]{0,10}", own in "(/[a-c.]{1,3}){0,4}") {
            if let Ok(found) = directory(Some(&path), "ns", "one", &own) {
                prop_assert!(found.components().count() > 0);
                prop_assert!(found.components().all(|part| matches!(part, Component::Normal(_))), "{}", found.display());
            }
        }
    }
}

//! `mounts`: where to mount what; the words of mount(8) are read in [`super::options`].

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::mount::MountPropagationFlags as Propagation;

use super::{
    Result, SpecError, absolute,
    namespaces::mappings,
    options::{self, Options},
    text,
};
use crate::{
    idmap::IdMaps,
    plan::{MountIds, MountPlan, MountSource, NamespacePlan},
};

/// The file systems that a container can ask for: specification's name, kernel's name. They hold nothing of the host,
/// nor of the guest beside what the container's own namespaces show.
const FILE_SYSTEMS: [(&str, &str); 10] = [
    ("proc", "proc"),
    ("sysfs", "sysfs"),
    ("tmpfs", "tmpfs"),
    ("devpts", "devpts"),
    ("mqueue", "mqueue"),
    // The guest has cgroup v2 alone; specifications say "cgroup" for whichever there is.
    ("cgroup", "cgroup2"),
    ("cgroup2", "cgroup2"),
    ("ramfs", "ramfs"),
    ("hugetlbfs", "hugetlbfs"),
    ("bpf", "bpf"),
];

/// Files of /proc that may be covered, by a file that tells a container about itself what the kernel tells about the
/// machine; everything else in /proc is what programs trust the kernel for.
pub const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// `binds` are the sources of bind mounts below the shared directory, by their place in the list.
pub(super) fn plan(
    mounts: &[Mount],
    binds: &BTreeMap<usize, PathBuf>,
    namespaces: &NamespacePlan,
    notes: &mut Vec<String>,
) -> Result<Vec<MountPlan>> {
    let plans = mounts.iter().enumerate().map(|(index, mount)| one(index, mount, binds.get(&index), namespaces, notes));
    let plans: Vec<MountPlan> = plans.collect::<Result<_>>()?;
    let bound = |index: usize| plans.get(index).is_some_and(|plan| matches!(plan.source, MountSource::Bind { .. }));
    match binds.keys().find(|index| !bound(**index)) {
        Some(index) => Err(SpecError::new(
            "mounts",
            format!("the request names a source for mount {index}, which is no bind mount"),
        )),
        None => Ok(plans),
    }
}

/// The kind of propagation that a word of mount(8) names, as MS_*.
pub(super) fn propagation(word: &str) -> Option<u32> {
    let (kind, recursive) = match word.strip_prefix('r') {
        Some(kind) => (kind, Propagation::REC),
        None => (word, Propagation::empty()),
    };
    let kind = match kind {
        "private" => Propagation::PRIVATE,
        "slave" => Propagation::DOWNSTREAM,
        "shared" => Propagation::SHARED,
        "unbindable" => Propagation::UNBINDABLE,
        _ => return None,
    };
    Some((kind | recursive).bits())
}

fn one(
    index: usize,
    mount: &Mount,
    bind: Option<&PathBuf>,
    namespaces: &NamespacePlan,
    notes: &mut Vec<String>,
) -> Result<MountPlan> {
    let field = format!("mounts[{index}] ({})", mount.destination().display());
    let typ = mount.typ().as_deref().unwrap_or("");
    let options = options::read(&format!("{field}.options"), mount.options().as_deref().unwrap_or_default())?;
    // As runc has it, "bind" is an option; the type is by habit the same word, "none", or missing.
    let is_bind = typ == "bind" || options.bind.is_some();
    let destination = destination(&format!("{field}.destination"), mount.destination(), notes)?;
    check_proc(&format!("{field}.destination"), &destination, typ, is_bind)?;
    let ids = ids(&field, mount, &options, is_bind, namespaces)?;
    let source = if is_bind { bound(&field, mount, &options, bind)? } else { made(&field, mount, typ, &options)? };
    if options.copy_up && typ != "tmpfs" {
        return Err(SpecError::new(
            format!("{field}.options"),
            format!("\"tmpcopyup\" goes with tmpfs, not with {typ:?}"),
        ));
    }
    let (attributes, recursive, read_only) = if is_bind {
        (options.of_bind(), options.recursive, false)
    } else {
        let (attributes, read_only) = options.of_new();
        (attributes, Default::default(), read_only)
    };
    Ok(MountPlan {
        index,
        destination,
        source,
        attributes,
        recursive,
        read_only,
        propagation: options.propagation,
        ids,
        copy_up: options.copy_up,
    })
}

fn destination(field: &str, path: &Path, notes: &mut Vec<String>) -> Result<PathBuf> {
    let path = if path.is_absolute() {
        absolute(field, path)?
    } else {
        // As runc does, which has warned of it for years.
        notes.push(format!("{field} is not an absolute path; taken from the root"));
        absolute(field, &Path::new("/").join(path))?
    };
    // "." and ".." mean what they say in the text: no link is followed before them.
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if plain.components().count() < 2 {
        return Err(SpecError::new(field, "cannot be the root itself"));
    }
    Ok(plain)
}

/// Only the kernel may speak in /proc.
fn check_proc(field: &str, destination: &Path, typ: &str, is_bind: bool) -> Result<()> {
    let proc = Path::new("/proc");
    let coverable = COVERABLE.iter().any(|path| destination == Path::new(path));
    if !destination.starts_with(proc) || coverable || (destination == proc && typ == "proc" && !is_bind) {
        return Ok(());
    }
    let problem = if destination == proc { "holds a proc file system and nothing else" } else { "cannot be covered" };
    Err(SpecError::new(field, problem))
}

fn made(field: &str, mount: &Mount, typ: &str, options: &Options) -> Result<MountSource> {
    let Some((_, fs_type)) = FILE_SYSTEMS.into_iter().find(|(name, _)| *name == typ) else {
        let known = FILE_SYSTEMS.map(|(name, _)| name).join(", ");
        return Err(SpecError::new(format!("{field}.type"), format!("{typ:?} is not one of bind, {known}")));
    };
    let name = mount.source().as_deref().map_or("none".into(), Path::to_string_lossy);
    Ok(MountSource::FileSystem {
        fs_type: fs_type.to_owned(),
        name: text(&format!("{field}.source"), &name)?,
        options: options.file_system.clone(),
    })
}

fn bound(field: &str, mount: &Mount, options: &Options, bind: Option<&PathBuf>) -> Result<MountSource> {
    if let Some((name, _)) = options.file_system.first() {
        let problem = format!("{name:?} is no option of a bind mount; the file system behind it has its own already");
        return Err(SpecError::new(format!("{field}.options"), problem));
    }
    let Some(path) = bind else {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let own = ["/proc", "/sys", "/dev"].iter().any(|top| source.starts_with(top));
        let problem = if own {
            "is the host's kernel, of which a container in a machine has nothing; mount proc, sysfs or cgroup by its type"
        } else {
            "is not served to this machine"
        };
        return Err(SpecError::new(format!("{field}.source"), format!("{source:?} {problem}")));
    };
    Ok(MountSource::Bind { path: path.clone(), recursive: options.bind.unwrap_or(false) })
}

fn ids(
    field: &str,
    mount: &Mount,
    options: &Options,
    is_bind: bool,
    namespaces: &NamespacePlan,
) -> Result<Option<MountIds>> {
    let maps = IdMaps {
        uids: mappings(&format!("{field}.uidMappings"), mount.uid_mappings().as_deref())?,
        gids: mappings(&format!("{field}.gidMappings"), mount.gid_mappings().as_deref())?,
    };
    if maps.is_empty() && options.id_map.is_none() {
        return Ok(None);
    }
    let wrong = |name: &str, problem: &str| Err(SpecError::new(format!("{field}.{name}"), problem));
    let asked = if maps.is_empty() { "options" } else { "uidMappings" };
    if !is_bind {
        return wrong(asked, "only a bind mount can have its ids mapped");
    }
    if maps.uids.is_empty() != maps.gids.is_empty() {
        let missing = if maps.uids.is_empty() { "uidMappings" } else { "gidMappings" };
        return wrong(missing, "is missing beside the other");
    }
    let maps = if maps.is_empty() { namespaces.ids.clone() } else { maps };
    if maps.is_empty() {
        return wrong(asked, "\"idmap\" needs uidMappings and gidMappings, or a user namespace of the container's own");
    }
    Ok(Some(MountIds { maps, recursive: options.id_map.unwrap_or(false) }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::mount::MountAttrFlags as Attr;
    use serde_json::{Value, json};

    use super::*;

    fn planned(mount: Value) -> Result<MountPlan> {
        let mount: Mount = serde_json::from_value(mount).unwrap();
        let binds = match mount.typ().as_deref() {
            Some("bind") => BTreeMap::from([(0, PathBuf::from("binds/0"))]),
            _ => BTreeMap::new(),
        };
        plan(&[mount], &binds, &NamespacePlan::default(), &mut Vec::new()).map(|mut plans| plans.remove(0))
    }

    #[test]
    fn a_bind_mount_is_where_the_request_says() {
        let plan =
            planned(json!({"destination": "/x/../y", "type": "bind", "source": "/h", "options": ["rbind", "ro"]}));
        let plan = plan.unwrap();
        assert_eq!(plan.destination, Path::new("/y"));
        assert_eq!(plan.source, MountSource::Bind { path: "binds/0".into(), recursive: true });
        assert_eq!(plan.attributes.set, Attr::MOUNT_ATTR_RDONLY.bits());
        assert!(!plan.read_only, "at once, not at the end");
    }

    #[test]
    fn each_mount_that_cannot_be_is_refused_by_name() {
        let map = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
        for (mount, field) in [
            (json!({"type": "tmpfs", "options": ["bind"]}), "source"),
            (json!({"type": "none", "source": "/sys/fs/cgroup", "options": ["rbind"]}), "source"),
            (json!({"type": "ext4"}), "type"),
            (json!({"type": "bind", "options": ["size=1"]}), "options"),
            (json!({"type": "proc", "options": ["tmpcopyup"]}), "options"),
            (json!({"type": "tmpfs", "options": ["idmap"]}), "options"),
            (json!({"type": "tmpfs", "uidMappings": map, "gidMappings": map}), "uidMappings"),
            (json!({"type": "bind", "uidMappings": map}), "gidMappings"),
            (json!({"type": "bind", "options": ["idmap"]}), "options"),
        ] {
            let mut with = json!({"destination": "/x", "source": "/h"});
            with.as_object_mut().unwrap().extend(mount.as_object().unwrap().clone());
            assert_eq!(planned(with).unwrap_err().field, format!("mounts[0] (/x).{field}"), "{mount}");
        }
    }

    #[test]
    fn only_the_kernel_speaks_in_proc() {
        for (destination, typ, good) in [
            ("/proc", "proc", true),
            ("/proc", "tmpfs", false),
            ("/proc", "bind", false),
            ("/proc/self/attr", "tmpfs", false),
            ("/x/../proc/sys", "bind", false),
            ("/proc/meminfo", "bind", true),
            ("/proc/meminfo/..", "bind", false),
            ("/process", "tmpfs", true),
        ] {
            let result = planned(json!({"destination": destination, "type": typ, "source": "x"}));
            assert_eq!(result.is_ok(), good, "{destination} {typ}: {result:?}");
        }
    }

    #[test]
    fn a_source_without_its_bind_mount_is_refused() {
        let mount: Mount = serde_json::from_value(json!({"destination": "/x", "type": "tmpfs"})).unwrap();
        for index in [0, 1] {
            let binds = BTreeMap::from([(index, PathBuf::from("b"))]);
            let error =
                plan(std::slice::from_ref(&mount), &binds, &NamespacePlan::default(), &mut Vec::new()).unwrap_err();
            assert!(error.problem.contains(&format!("mount {index}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_destination_is_plain_or_refused(path: String) {
            if let Ok(plain) = destination("d", Path::new(&path), &mut Vec::new()) {
                prop_assert!(plain.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_))));
                prop_assert!(plain.is_absolute() && plain != Path::new("/"));
            }
        }
    }
}

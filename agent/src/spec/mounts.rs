//! Mount options: from the words of mount(8) to what the kernel's mount calls take.

use oci_spec::runtime::Mount;
use rustix::mount::{MountAttrFlags as Attr, MountPropagationFlags as Propagation};

use super::{Result, SpecError, absolute, refuse, text};
use crate::plan::MountPlan;

/// The file systems that a container can ask for: specification's name, kernel's name. They hold nothing of the host.
const FILE_SYSTEMS: [(&str, &str); 7] = [
    ("proc", "proc"),
    ("sysfs", "sysfs"),
    ("tmpfs", "tmpfs"),
    ("devpts", "devpts"),
    ("mqueue", "mqueue"),
    // The guest has cgroup v2 alone; specifications say "cgroup" for whichever there is.
    ("cgroup", "cgroup2"),
    ("cgroup2", "cgroup2"),
];

pub(super) fn plan(mounts: &[Mount]) -> Result<Vec<MountPlan>> {
    mounts.iter().enumerate().map(|(index, mount)| one(index, mount)).collect()
}

fn one(index: usize, mount: &Mount) -> Result<MountPlan> {
    let field = format!("mounts[{index}] ({})", mount.destination().display());
    let options = mount.options().as_deref().unwrap_or_default();
    let typ = mount.typ().as_deref().unwrap_or("");
    let source = mount.source().as_deref().map_or("none".into(), |source| source.to_string_lossy());
    if typ == "bind" || options.iter().any(|option| option == "bind" || option == "rbind") {
        let problem =
            format!("bind mount of {source:?}: files and directories of the host are not served yet; remove it");
        return Err(SpecError::new(field, problem));
    }
    refuse(&format!("{field}.uidMappings"), mount.uid_mappings().as_ref().filter(|list| !list.is_empty()))?;
    refuse(&format!("{field}.gidMappings"), mount.gid_mappings().as_ref().filter(|list| !list.is_empty()))?;
    let Some((_, fs_type)) = FILE_SYSTEMS.into_iter().find(|(name, _)| *name == typ) else {
        let known = FILE_SYSTEMS.map(|(name, _)| name).join(", ");
        return Err(SpecError::new(format!("{field}.type"), format!("{typ:?} is not one of {known}")));
    };
    let destination = absolute(&format!("{field}.destination"), mount.destination())?;
    if destination.components().count() < 2 {
        return Err(SpecError::new(format!("{field}.destination"), "cannot be the root itself"));
    }
    let mut plan = MountPlan {
        index,
        destination,
        fs_type: fs_type.to_owned(),
        source: text(&format!("{field}.source"), &source)?,
        options: Vec::new(),
        attributes: 0,
        read_only: false,
        propagation: None,
    };
    for option in options {
        apply(&format!("{field}.options"), option, &mut plan)?;
    }
    Ok(plan)
}

/// What one word of mount(8) means.
enum Word {
    Set(Attr),
    Clear(Attr),
    /// The times of last access are a choice of three, not three flags.
    AccessTime(Attr),
    ReadOnly(bool),
    Propagation(Propagation),
    Nothing,
    Refused(&'static str),
    FileSystem,
}

fn word(option: &str) -> Word {
    use Word::{AccessTime, Clear, FileSystem, Nothing, ReadOnly, Refused, Set};
    let rec = Propagation::REC;
    // "rnosuid" means everything below as well; a file system that is new has nothing below.
    match option {
        "defaults" | "async" | "loud" | "silent" => Nothing,
        "ro" | "rro" => ReadOnly(true),
        "rw" | "rrw" => ReadOnly(false),
        "nosuid" | "rnosuid" => Set(Attr::MOUNT_ATTR_NOSUID),
        "suid" | "rsuid" => Clear(Attr::MOUNT_ATTR_NOSUID),
        "nodev" | "rnodev" => Set(Attr::MOUNT_ATTR_NODEV),
        "dev" | "rdev" => Clear(Attr::MOUNT_ATTR_NODEV),
        "noexec" | "rnoexec" => Set(Attr::MOUNT_ATTR_NOEXEC),
        "exec" | "rexec" => Clear(Attr::MOUNT_ATTR_NOEXEC),
        "nodiratime" | "rnodiratime" => Set(Attr::MOUNT_ATTR_NODIRATIME),
        "diratime" | "rdiratime" => Clear(Attr::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" | "rnosymfollow" => Set(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" | "rsymfollow" => Clear(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" | "rnoatime" => AccessTime(Attr::MOUNT_ATTR_NOATIME),
        "strictatime" | "rstrictatime" | "norelatime" | "rnorelatime" => AccessTime(Attr::MOUNT_ATTR_STRICTATIME),
        "relatime" | "rrelatime" | "atime" | "ratime" | "nostrictatime" | "rnostrictatime" => {
            AccessTime(Attr::MOUNT_ATTR_RELATIME)
        }
        "private" => Word::Propagation(Propagation::PRIVATE),
        "rprivate" => Word::Propagation(Propagation::PRIVATE | rec),
        "slave" => Word::Propagation(Propagation::DOWNSTREAM),
        "rslave" => Word::Propagation(Propagation::DOWNSTREAM | rec),
        "shared" => Word::Propagation(Propagation::SHARED),
        "rshared" => Word::Propagation(Propagation::SHARED | rec),
        "unbindable" => Word::Propagation(Propagation::UNBINDABLE),
        "runbindable" => Word::Propagation(Propagation::UNBINDABLE | rec),
        "tmpcopyup" | "idmap" | "ridmap" => Refused("is not supported yet; remove it"),
        "remount" => Refused("makes no sense for a new mount; remove it"),
        _ => FileSystem,
    }
}

fn apply(field: &str, option: &str, plan: &mut MountPlan) -> Result<()> {
    match word(option) {
        Word::Set(flag) => plan.attributes |= flag.bits(),
        Word::Clear(flag) => plan.attributes &= !flag.bits(),
        Word::AccessTime(flag) => {
            plan.attributes = (plan.attributes & !Attr::MOUNT_ATTR__ATIME.bits()) | flag.bits();
        }
        Word::ReadOnly(read_only) => plan.read_only = read_only,
        Word::Propagation(kind) => plan.propagation = Some(kind.bits()),
        Word::Nothing => {}
        Word::Refused(why) => return Err(SpecError::new(field, format!("{option:?} {why}"))),
        Word::FileSystem => {
            let option = text(field, option)?;
            plan.options.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option, None),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Result<MountPlan> {
        let mount = serde_json::json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": words});
        plan(&[serde_json::from_value(mount).unwrap()]).map(|plans| plans[0].clone())
    }

    #[test]
    fn the_last_word_counts() {
        let attributes = |words| options(words).unwrap().attributes;
        assert_eq!(attributes(&["nosuid", "suid"]), 0);
        assert_eq!(attributes(&["noatime", "strictatime"]), Attr::MOUNT_ATTR_STRICTATIME.bits());
        assert_eq!(attributes(&["strictatime", "relatime"]), 0);
        assert!(!options(&["ro", "rw"]).unwrap().read_only);
    }

    #[test]
    fn what_is_not_a_mount_option_goes_to_the_file_system() {
        let plan = options(&["mode=755", "newinstance", "nodev"]).unwrap();
        assert_eq!(plan.options, [("mode".into(), Some("755".into())), ("newinstance".into(), None)]);
        assert_eq!(plan.attributes, Attr::MOUNT_ATTR_NODEV.bits());
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let error = options(&["tmpcopyup"]).unwrap_err();
        assert_eq!(error.field, "mounts[0] (/x).options");
        assert!(error.problem.contains("tmpcopyup"), "{error}");
    }
}

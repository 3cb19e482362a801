//! Mount options: from the words of mount(8), and the ones that runc adds, to what the kernel's mount calls take.
//!
//! A word is about the mount alone (`nosuid`), about it and everything below (`rnosuid`), about how changes spread
//! (`rslave`), about the way of mounting (`rbind`, `tmpcopyup`, `idmap`), or an option of the file system.

use rustix::mount::MountAttrFlags as Attr;

use super::{Result, SpecError, mounts::propagation, text};
use crate::plan::Attributes;

/// What a list of words says.
#[derive(Debug, Default)]
pub(super) struct Options {
    /// `bind` (false) or `rbind` (true).
    pub bind: Option<bool>,
    /// `idmap` (false) or `ridmap` (true).
    pub id_map: Option<bool>,
    /// `tmpcopyup`.
    pub copy_up: bool,
    /// In the order of the words.
    pub propagation: Vec<u32>,
    /// Changes to everything below, too.
    pub recursive: Attributes,
    /// For the file system: a flag, or a key with a value.
    pub file_system: Vec<(String, Option<String>)>,
    /// Of the mount alone, without the times of last access: MOUNT_ATTR_*.
    flags: u32,
    /// Times of last access; as for mount(2), "strict" outdoes "no".
    no_access_time: bool,
    strict_access_time: bool,
    /// Any word about the mount alone.
    named: bool,
    /// Any word about times of last access.
    access_time_named: bool,
}

/// What a word about the mount alone changes.
enum Change {
    Set(Attr),
    Clear(Attr),
    NoAccessTime(bool),
    StrictAccessTime(bool),
    /// What a mount has that says nothing.
    RelativeAccessTime,
}

fn change(word: &str) -> Option<Change> {
    use Change::{Clear, NoAccessTime, RelativeAccessTime, Set, StrictAccessTime};
    Some(match word {
        "ro" => Set(Attr::MOUNT_ATTR_RDONLY),
        "rw" => Clear(Attr::MOUNT_ATTR_RDONLY),
        "nosuid" => Set(Attr::MOUNT_ATTR_NOSUID),
        "suid" => Clear(Attr::MOUNT_ATTR_NOSUID),
        "nodev" => Set(Attr::MOUNT_ATTR_NODEV),
        "dev" => Clear(Attr::MOUNT_ATTR_NODEV),
        "noexec" => Set(Attr::MOUNT_ATTR_NOEXEC),
        "exec" => Clear(Attr::MOUNT_ATTR_NOEXEC),
        "nodiratime" => Set(Attr::MOUNT_ATTR_NODIRATIME),
        "diratime" => Clear(Attr::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => Set(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => Clear(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => NoAccessTime(true),
        "atime" => NoAccessTime(false),
        "strictatime" => StrictAccessTime(true),
        "nostrictatime" => StrictAccessTime(false),
        "relatime" | "norelatime" => RelativeAccessTime,
        _ => return None,
    })
}

/// Reads the words.
pub(super) fn read(field: &str, words: &[String]) -> Result<Options> {
    let mut options = Options::default();
    for word in words {
        if let Some(change) = change(word) {
            options.apply(change);
            continue;
        }
        if let Some(kind) = propagation(word) {
            options.propagation.push(kind);
            continue;
        }
        if let Some(change) = word.strip_prefix('r').and_then(change) {
            options.apply_below(change);
            continue;
        }
        match word.as_str() {
            "bind" => options.bind = Some(options.bind.unwrap_or(false)),
            "rbind" => options.bind = Some(true),
            "idmap" => options.id_map = Some(false),
            "ridmap" => options.id_map = Some(true),
            "tmpcopyup" => options.copy_up = true,
            // Silence is about the kernel's log, and no file system here counts versions of its inodes.
            "defaults" | "loud" | "silent" | "iversion" | "noiversion" => {}
            "remount" => return Err(SpecError::new(field, "\"remount\" makes no sense for a new mount; remove it")),
            _ => {
                let word = text(field, word)?;
                options.file_system.push(match word.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (word, None),
                });
            }
        }
    }
    // As with mount(2), where these do no harm beside a bind.
    if options.bind.is_some() {
        options.file_system.retain(|(name, value)| value.is_some() || !is_general_flag(name));
    }
    Ok(options)
}

/// Flags of mount(2) that concern the file system as a whole; for a bind mount the kernel leaves them as they are.
fn is_general_flag(name: &str) -> bool {
    matches!(name, "sync" | "async" | "dirsync" | "lazytime" | "nolazytime" | "mand" | "nomand")
}

impl Options {
    fn apply(&mut self, change: Change) {
        self.named = true;
        match change {
            Change::Set(flag) => self.flags |= flag.bits(),
            Change::Clear(flag) => self.flags &= !flag.bits(),
            Change::NoAccessTime(set) => self.no_access_time = set,
            Change::StrictAccessTime(set) => self.strict_access_time = set,
            Change::RelativeAccessTime => {}
        }
        let times = matches!(&change, Change::Set(flag) if *flag == Attr::MOUNT_ATTR_NODIRATIME);
        let others = matches!(change, Change::Set(_) | Change::Clear(_));
        self.access_time_named |= times || !others;
    }

    fn apply_below(&mut self, change: Change) {
        let Attributes { set, clear } = &mut self.recursive;
        match change {
            Change::Set(flag) => {
                *set |= flag.bits();
                *clear &= !flag.bits();
            }
            Change::Clear(flag) => {
                *set &= !flag.bits();
                *clear |= flag.bits();
            }
            Change::NoAccessTime(_) | Change::StrictAccessTime(_) | Change::RelativeAccessTime => {
                let kind = match change {
                    Change::NoAccessTime(true) => Attr::MOUNT_ATTR_NOATIME,
                    Change::StrictAccessTime(true) => Attr::MOUNT_ATTR_STRICTATIME,
                    _ => Attr::MOUNT_ATTR_RELATIME,
                };
                // A choice of three, not three flags: the kernel wants the old one cleared.
                *set = (*set & !Attr::MOUNT_ATTR__ATIME.bits()) | kind.bits();
                *clear |= Attr::MOUNT_ATTR__ATIME.bits();
            }
        }
    }

    fn access_time(&self) -> Attr {
        match (self.strict_access_time, self.no_access_time) {
            (true, _) => Attr::MOUNT_ATTR_STRICTATIME,
            (false, true) => Attr::MOUNT_ATTR_NOATIME,
            (false, false) => Attr::MOUNT_ATTR_RELATIME,
        }
    }

    /// The attributes of a new file system, with nothing below it yet, and whether it is read-only in the end.
    pub(super) fn of_new(&self) -> (Attributes, bool) {
        let mut set = self.flags | self.access_time().bits();
        set = (set & !self.recursive.clear) | self.recursive.set;
        let read_only = Attr::MOUNT_ATTR_RDONLY.bits();
        (Attributes { set: set & !read_only, clear: 0 }, set & read_only != 0)
    }

    /// The changes to the copy of an existing mount: if any word is about it, then it has what the words say and
    /// nothing else.
    pub(super) fn of_bind(&self) -> Attributes {
        if !self.named {
            return Attributes::default();
        }
        let mut set = Attr::from_bits_retain(self.flags);
        let mut clear = Attr::MOUNT_ATTR_RDONLY
            | Attr::MOUNT_ATTR_NOSUID
            | Attr::MOUNT_ATTR_NODEV
            | Attr::MOUNT_ATTR_NOEXEC
            | Attr::MOUNT_ATTR_NOSYMFOLLOW;
        if self.access_time_named {
            set |= self.access_time();
            clear |= Attr::MOUNT_ATTR__ATIME | Attr::MOUNT_ATTR_NODIRATIME;
        }
        Attributes { set: set.bits(), clear: (clear - (set - Attr::MOUNT_ATTR__ATIME)).bits() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(words: &[&str]) -> Result<Options> {
        read("o", &words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn the_last_word_counts_and_strict_times_outdo_none() {
        let new = |words| options(words).unwrap().of_new();
        assert_eq!(new(&["nosuid", "suid"]), (Attributes::default(), false));
        assert_eq!(new(&["strictatime", "noatime"]).0.set, Attr::MOUNT_ATTR_STRICTATIME.bits());
        assert_eq!(new(&["noatime", "relatime"]).0.set, Attr::MOUNT_ATTR_NOATIME.bits());
        assert_eq!(new(&["noatime", "atime"]).0.set, 0);
        assert_eq!(new(&["norelatime"]).0.set, 0, "there is nothing else to fall back to");
        assert_eq!(new(&["ro", "rw"]), (Attributes::default(), false));
        assert_eq!(new(&["rro"]), (Attributes::default(), true));
        assert_eq!(new(&["ro", "rrw"]), (Attributes::default(), false));
    }

    #[test]
    fn a_bind_mount_without_a_word_about_it_stays_as_it_is() {
        assert_eq!(options(&["rbind", "rprivate", "rnosuid"]).unwrap().of_bind(), Attributes::default());
        let read_only = options(&["bind", "ro"]).unwrap().of_bind();
        assert_eq!(read_only.set, Attr::MOUNT_ATTR_RDONLY.bits());
        let cleared =
            Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NODEV | Attr::MOUNT_ATTR_NOEXEC | Attr::MOUNT_ATTR_NOSYMFOLLOW;
        assert_eq!(read_only.clear, cleared.bits());
        let times = options(&["bind", "noatime"]).unwrap().of_bind();
        assert_eq!(times.set, Attr::MOUNT_ATTR_NOATIME.bits());
        assert_eq!(times.clear & Attr::MOUNT_ATTR__ATIME.bits(), Attr::MOUNT_ATTR__ATIME.bits());
    }

    #[test]
    fn words_with_an_r_are_about_everything_below() {
        let below = options(&["rro", "rnoexec", "rexec", "rnoatime"]).unwrap().recursive;
        assert_eq!(below.set, (Attr::MOUNT_ATTR_RDONLY | Attr::MOUNT_ATTR_NOATIME).bits());
        assert_eq!(below.clear, (Attr::MOUNT_ATTR_NOEXEC | Attr::MOUNT_ATTR__ATIME).bits());
        let reset = options(&["rnoatime", "ratime"]).unwrap().recursive;
        assert_eq!(reset, Attributes { set: 0, clear: Attr::MOUNT_ATTR__ATIME.bits() });
    }

    #[test]
    fn ways_of_mounting_are_told_from_options_of_the_file_system() {
        let all = options(&["rbind", "bind", "ridmap", "tmpcopyup", "slave", "rshared", "sync"]).unwrap();
        assert_eq!((all.bind, all.id_map, all.copy_up), (Some(true), Some(true), true));
        assert_eq!(all.propagation, [0x8_0000, 0x10_4000]);
        assert_eq!(all.file_system, []);
        let own = options(&["mode=755", "newinstance", "sync", "defaults", "silent"]).unwrap().file_system;
        assert_eq!(own, [("mode".into(), Some("755".into())), ("newinstance".into(), None), ("sync".into(), None)]);
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        assert!(options(&["remount"]).unwrap_err().problem.contains("remount"));
        assert!(options(&["a\0b"]).is_err());
    }

    /// Every word that runc's `features` command lists, but for "remount".
    #[test]
    fn every_word_that_runc_knows_is_known() {
        let words = "async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev \
            nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rbind \
            rdev rdiratime relatime rexec rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid \
            rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared \
            silent slave strictatime suid symfollow sync tmpcopyup unbindable";
        for word in words.split_whitespace() {
            let left = options(&[word]).unwrap().file_system;
            assert!(left.is_empty() || is_general_flag(word), "{word} would be left to the file system");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_both_set_and_cleared(words in proptest::collection::vec(
            proptest::sample::select(vec!["ro", "rw", "nosuid", "suid", "noexec", "noatime", "strictatime", "nodiratime",
                "rro", "rrw", "rnosuid", "rsuid", "rnoatime", "ratime", "rnodiratime", "rdiratime"]), 0..8)
        ) {
            let options = options(&words).unwrap();
            // The kernel wants the old choice of access times cleared before the new one is set.
            let times = Attr::MOUNT_ATTR__ATIME.bits();
            for Attributes { set, clear } in [options.of_bind(), options.of_new().0, options.recursive] {
                prop_assert_eq!(set & clear & !times, 0);
                prop_assert!(set & times == 0 || clear & times == times || clear == 0);
            }
        }
    }
}

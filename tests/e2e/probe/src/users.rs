//! Ownership and permissions across user ids.

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::step;

const USER: u32 = 1000;

/// As root: prepares files of several owners, then tries them as another user in a process of its own.
pub fn check(directory: &Path) -> Result<()> {
    let path = |name: &str| directory.join(name);
    step("owners", || {
        fs::write(path("owned"), b"x")?;
        chown(path("owned"), Some(USER), Some(2000))?;
        let meta = fs::metadata(path("owned"))?;
        ensure!((meta.uid(), meta.gid()) == (USER, 2000), "owner {}:{}", meta.uid(), meta.gid());
        Ok(())
    })?;
    fs::create_dir(path("public"))?;
    fs::set_permissions(path("public"), fs::Permissions::from_mode(0o1777))?;
    fs::write(path("secret"), b"secret")?;
    fs::set_permissions(path("secret"), fs::Permissions::from_mode(0o600))?;
    fs::write(path("public/roots"), b"root's")?;
    fs::create_dir(path("group"))?;
    chown(path("group"), Some(0), Some(3000))?;
    fs::set_permissions(path("group"), fs::Permissions::from_mode(0o2777))?;
    step("another user", || {
        let status = Command::new("/proc/self/exe")
            .args(["as", &USER.to_string()])
            .arg(directory)
            .uid(USER)
            .gid(USER)
            .status()
            .context("run as another user")?;
        ensure!(status.success(), "as user {USER}: {status}");
        Ok(())
    })
}

/// As the user: what is allowed works, what is not is refused.
pub fn as_user(uid: u32, directory: &Path) -> Result<()> {
    let path = |name: &str| directory.join(name);
    let denied = |what: &str, result: std::io::Result<()>| {
        let kind = result.as_ref().map_err(std::io::Error::kind);
        ensure!(kind == Err(ErrorKind::PermissionDenied), "{what}: {result:?} instead of a refusal");
        Ok(())
    };
    fs::write(path("public/mine"), b"mine").context("a file in a directory for all")?;
    let meta = fs::metadata(path("public/mine"))?;
    ensure!(meta.uid() == uid && meta.gid() == uid, "the new file belongs to {}:{}", meta.uid(), meta.gid());
    fs::write(path("group/shared"), b"group's").context("a file in a set-group-id directory")?;
    ensure!(fs::metadata(path("group/shared"))?.gid() == 3000, "it did not take the directory's group");
    fs::write(path("owned"), b"written by its owner").context("a file that root has given to the user")?;
    denied("reading root's secret", fs::read(path("secret")).map(drop))?;
    denied("a file in root's directory", fs::write(path("intruder"), b""))?;
    // The sticky bit's refusal is EPERM, which std calls PermissionDenied as well.
    denied("removing root's file from a sticky directory", fs::remove_file(path("public/roots")))?;
    denied("giving a file away", std::os::unix::fs::chown(path("public/mine"), Some(0), None))
}

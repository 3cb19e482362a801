//! Kernel modules by name: which files to load, in which order, out of `modules.dep`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// What `modules.dep` and `modules.builtin` of one kernel say.
pub struct Modules {
    folder: PathBuf,
    dep: String,
    builtin: String,
}

impl Modules {
    /// Reads the lists of the kernel with this release.
    pub fn of(release: &str) -> anyhow::Result<Self> {
        let folder = Path::new("/lib/modules").join(release);
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))
        };
        Ok(Self { dep: read("modules.dep")?, builtin: read("modules.builtin").unwrap_or_default(), folder })
    }

    /// The files to load for these modules, dependencies first, each once. Built-in modules need none.
    pub fn files(&self, names: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in names {
            for file in self.chain(name)? {
                let file = self.folder.join(file);
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    /// One line of `modules.dep` lists what a module needs, the most basic last.
    fn chain(&self, name: &str) -> anyhow::Result<Vec<&str>> {
        for line in self.dep.lines() {
            let Some((file, needs)) = line.split_once(':') else { continue };
            if module_name(file) == name {
                let mut chain: Vec<&str> = needs.split_whitespace().collect();
                chain.reverse();
                chain.push(file);
                return Ok(chain);
            }
        }
        if self.builtin.lines().any(|file| module_name(file) == name) {
            return Ok(Vec::new());
        }
        bail!("no module {name} in {}", self.folder.display());
    }
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is the module `kvm_amd`.
pub fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Modules {
        Modules {
            folder: "/m".into(),
            dep: "k/virtio.ko: k/ring.ko\nk/ring.ko:\nk/kvm-amd.ko.xz: k/kvm.ko.xz k/irqbypass.ko.xz\n".into(),
            builtin: "kernel/fs/ext4.ko\n".into(),
        }
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let files = some().files(&["virtio", "ring", "kvm_amd", "ext4"]).unwrap();
        let expected =
            ["/m/k/ring.ko", "/m/k/virtio.ko", "/m/k/irqbypass.ko.xz", "/m/k/kvm.ko.xz", "/m/k/kvm-amd.ko.xz"];
        assert_eq!(files, expected.map(PathBuf::from));
    }

    #[test]
    fn an_unknown_module_is_named() {
        assert!(some().files(&["nonsense"]).unwrap_err().to_string().contains("nonsense"));
    }
}

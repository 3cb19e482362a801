//! The bundle's config.json, as far as the host must understand it: whether it is one at all, where the root file
//! system lies if containerd passes none, and whether it asks for something of the host that a machine of its own
//! cannot have. Everything else is the agent's to apply or refuse. Nothing in it is trusted: it comes with an image.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// The largest config.json, bytes; the agent takes no more.
pub const MAX_SIZE: u64 = 1 << 20;

/// A config.json that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too large.
    #[error("{0} is larger than {MAX_SIZE} bytes")]
    TooLarge(PathBuf),
    /// It is no OCI runtime specification.
    #[error("{path} is no OCI runtime specification: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where there is one.
        message: String,
    },
    /// A part that must be there is not, or cannot be what it is.
    #[error("{path}: {field}: {message}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Which.
        field: String,
        /// What is wrong with it.
        message: String,
    },
}

/// What the host needs of a config.json.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleSpec {
    /// The file as it is, for the agent.
    pub json: Vec<u8>,
    /// The bundle's own root directory.
    pub rootfs: PathBuf,
    /// How willingly the host may kill the pod when memory is short, -1000 (never) to 1000.
    pub oom_score_adj: i32,
}

impl BundleSpec {
    /// Reads and checks `bundle`/config.json.
    ///
    /// # Errors
    /// See [`SpecError`].
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        // Most are smaller than this, and then one read takes it all.
        let mut json = Vec::with_capacity(16 * 1024);
        File::open(&path)
            .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut json))
            .map_err(|source| SpecError::Read { path: path.clone(), source })?;
        if json.len() as u64 > MAX_SIZE {
            return Err(SpecError::TooLarge(path));
        }
        let spec: Spec = serde_json::from_slice(&json)
            .map_err(|error| SpecError::Malformed { path: path.clone(), message: error.to_string() })?;
        let rootfs = check(&spec, bundle).map_err(|(field, message)| SpecError::Field {
            path,
            field,
            message: message.into(),
        })?;
        let oom_score_adj = spec.process().as_ref().and_then(|process| process.oom_score_adj()).unwrap_or(0);
        Ok(Self { json, rootfs, oom_score_adj: oom_score_adj.clamp(-1000, 1000) })
    }
}

type Complaint = (String, &'static str);

fn check(spec: &Spec, bundle: &Path) -> Result<PathBuf, Complaint> {
    let complain = |field: &str, message| (field.to_owned(), message);
    if !spec.version().starts_with("1.") {
        return Err(complain("ociVersion", "must be 1.x"));
    }
    let process = spec.process().as_ref().ok_or_else(|| complain("process", "is missing"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(complain("process.args", "must name a program"));
    }
    if !process.cwd().is_absolute() {
        return Err(complain("process.cwd", "must be an absolute path"));
    }
    check_namespaces(spec)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let options = || mount.options().iter().flatten();
        let bind =
            mount.typ().as_deref() == Some("bind") || options().any(|option| option == "bind" || option == "rbind");
        if bind {
            let message = "binds a file or directory of the host into the container, which is not supported yet";
            return Err((format!("mounts[{index}] ({})", mount.destination().display()), message));
        }
        if !mount.destination().is_absolute() {
            return Err((format!("mounts[{index}].destination"), "must be an absolute path"));
        }
    }
    let root = spec.root().as_ref().ok_or_else(|| complain("root", "is missing"))?;
    Ok(bundle.join(root.path()))
}

/// A container shares its pod's kernel, never the host's: a namespace that is not listed would be the host's.
fn check_namespaces(spec: &Spec) -> Result<(), Complaint> {
    let linux = spec.linux().as_ref().ok_or_else(|| ("linux".to_owned(), "is missing"))?;
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    let wanted = [
        (LinuxNamespaceType::Mount, "mount"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Network, "network"),
        (LinuxNamespaceType::Ipc, "ipc"),
    ];
    for (kind, name) in wanted {
        let field = || format!("linux.namespaces[{name}]");
        let Some(namespace) = listed.iter().find(|namespace| namespace.typ() == kind) else {
            return Err((
                field(),
                "is not listed, which asks for the host's: a container in a machine of its own cannot have it",
            ));
        };
        if namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
            return Err((field(), "names a namespace of the host to join, which is not supported yet"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/", "oomScoreAdj": 4711 },
            "root": { "path": "rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "namespaces": [
                { "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }
            ] },
        })
    }

    fn read(json: &[u8]) -> Result<BundleSpec, SpecError> {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), json).unwrap();
        BundleSpec::read(bundle.path())
    }

    #[test]
    fn a_good_one_gives_its_root() {
        let read = read(spec().to_string().as_bytes()).unwrap();
        assert!(read.rootfs.ends_with("rootfs") && read.rootfs.is_absolute());
        assert_eq!(read.oom_score_adj, 1000);
    }

    #[test]
    fn each_fault_is_named() {
        type Fault = fn(&mut Value);
        let faults: [(Fault, &str); 9] = [
            (|spec| spec["ociVersion"] = json!("2.0"), "ociVersion"),
            (|spec| spec["process"]["args"] = json!([]), "process.args"),
            (|spec| spec["process"]["cwd"] = json!("here"), "process.cwd"),
            (|spec| drop(spec.as_object_mut().unwrap().remove("process")), "process"),
            (|spec| drop(spec.as_object_mut().unwrap().remove("root")), "root"),
            (|spec| spec["linux"]["namespaces"] = json!([{ "type": "mount" }]), "linux.namespaces[pid]"),
            (|spec| spec["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/net"), "linux.namespaces[network]"),
            (
                |spec| spec["mounts"][0] = json!({ "destination": "/x", "options": ["rbind"], "source": "/" }),
                "mounts[0] (/x)",
            ),
            (|spec| spec["process"]["args"] = json!("sh"), "invalid type"),
        ];
        for (fault, words) in faults {
            let mut spec = spec();
            fault(&mut spec);
            let told = read(spec.to_string().as_bytes()).unwrap_err().to_string();
            assert!(told.contains(words) && told.contains("config.json"), "{words}: {told}");
        }
        let told = read(b"{ \"ociVersion\": \"1.0\",\n oops }").unwrap_err().to_string();
        assert!(told.contains("line 2"), "{told}");
        assert!(matches!(read(&vec![b' '; (MAX_SIZE + 1) as usize]), Err(SpecError::TooLarge(_))));
        assert!(matches!(BundleSpec::read(Path::new("/no/such")), Err(SpecError::Read { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }
}

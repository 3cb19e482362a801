//! Makes an image of another: the same layers and one more with a single program in it.
//!
//! An OCI archive is a tar of `index.json`, which names a manifest by digest, which names a configuration and layers
//! by digest, each in `blobs/sha256/<digest>`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Writes to `out` the image of the archive `base` with the file `program` added as `path`, under the name `name`.
///
/// # Panics
/// If `base` is not an OCI archive of one image.
pub fn with_program(base: &Path, program: &Path, path: &str, name: &str, out: &Path) {
    let mut files = read(base);
    let index: Value = parse(&files, "index.json");
    let descriptor = &index["manifests"][0];
    let mut manifest: Value = parse(&files, &blob_of(descriptor));
    let mut config: Value = parse(&files, &blob_of(&manifest["config"]));

    let layer = layer(program, path);
    push(&mut config["rootfs"]["diff_ids"], json!(digest(&layer)));
    if let Some(history) = config.get_mut("history") {
        push(history, json!({ "created_by": "end-to-end tests" }));
    }
    let config = serde_json::to_vec(&config).expect("JSON can be written");
    manifest["config"]["digest"] = json!(digest(&config));
    manifest["config"]["size"] = json!(config.len());
    let media = "application/vnd.oci.image.layer.v1.tar";
    push(&mut manifest["layers"], json!({ "mediaType": media, "digest": digest(&layer), "size": layer.len() }));
    let manifest = serde_json::to_vec(&manifest).expect("JSON can be written");
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(&manifest),
            "size": manifest.len(),
            "platform": { "os": "linux", "architecture": "amd64" },
            "annotations": { "io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest" },
        }],
    });
    files.insert("index.json".to_owned(), serde_json::to_vec(&index).expect("JSON can be written"));
    for blob in [layer, config, manifest] {
        files.insert(format!("blobs/{}", digest(&blob).replace(':', "/")), blob);
    }
    write(&files, out);
}

/// Unpacks the layers of the archive `image` into `directory`.
///
/// # Panics
/// If `image` is not an OCI archive of one image.
pub fn unpack(image: &Path, directory: &Path) {
    let files = read(image);
    let index: Value = parse(&files, "index.json");
    let manifest: Value = parse(&files, &blob_of(&index["manifests"][0]));
    for layer in manifest["layers"].as_array().expect("the archive is an OCI image") {
        let layer = &files[&blob_of(layer)];
        tar::Archive::new(layer.as_slice()).unpack(directory).expect("the test's directory takes files");
    }
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().expect("the base is an OCI image").push(item);
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn blob_of(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().expect("an OCI descriptor has a digest");
    format!("blobs/{}", digest.replace(':', "/"))
}

fn parse(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Value {
    let bytes = files.get(name).unwrap_or_else(|| panic!("the base archive has no {name}"));
    serde_json::from_slice(bytes).unwrap_or_else(|error| panic!("{name} of the base archive: {error}"))
}

fn read(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = File::open(archive).unwrap_or_else(|error| panic!("cannot open {}: {error}", archive.display()));
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(file).entries().expect("it is a tar archive") {
        let mut entry = entry.expect("it is a tar archive");
        let name = entry.path().expect("names are paths").to_string_lossy().trim_start_matches("./").to_owned();
        if entry.header().entry_type().is_file() {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("the archive is whole");
            files.insert(name, bytes);
        }
    }
    files
}

fn layer(program: &Path, path: &str) -> Vec<u8> {
    let bytes = fs::read(program).unwrap_or_else(|error| panic!("cannot read {}: {error}", program.display()));
    let mut layer = tar::Builder::new(Vec::new());
    append(&mut layer, path, &bytes, 0o755);
    layer.into_inner().expect("memory takes it")
}

fn write(files: &BTreeMap<String, Vec<u8>>, out: &Path) {
    let mut archive = tar::Builder::new(File::create(out).expect("the test's directory takes files"));
    files.iter().for_each(|(name, bytes)| append(&mut archive, name, bytes, 0o644));
    archive.finish().expect("the test's directory takes files");
}

fn append<W: Write>(archive: &mut tar::Builder<W>, path: &str, bytes: &[u8], mode: u32) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, path, bytes).expect("the entry fits");
}

//! What the probe must be asked, so that a specification can be held against its answers.

use serde_json::Value;

use super::{resources, texts};

/// Words for `probe report`.
pub fn questions(spec: &Value) -> Vec<String> {
    let linux = &spec["linux"];
    let mut words = Vec::new();
    words.extend(texts(&linux["maskedPaths"]).iter().map(|path| format!("look={path}")));
    for path in texts(&linux["readonlyPaths"]) {
        words.extend([format!("look={path}"), format!("write={path}")]);
    }
    for key in linux["sysctl"].as_object().into_iter().flat_map(|map| map.keys()) {
        words.push(format!("look={}", sysctl_path(key)));
    }
    words.extend(resources::files(&linux["resources"]).iter().map(|file| format!("look={}", file.path)));
    words.push("write=/".to_owned());
    words
}

/// Where a setting lies.
pub(super) fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}

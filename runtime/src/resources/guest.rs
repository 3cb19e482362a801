//! What of `linux.resources` goes on to the agent, whose cgroups hold inside the machine: everything but what only
//! means something on the host. Processors and memory nodes are the host's numbers: the pod's processes are held to
//! them there, and the guest gets as many of its own. Block devices, too, are the host's.

use caisson_oci::{Limits, cpus::CpuList, resources::is_io_file};
use serde_json::{Map, Value};

use super::size::MachineSize;

/// Changes a specification's `linux.resources` object in place for a guest of this size; `asked` is what that object
/// asks for. True if anything was changed.
pub fn translate(resources: &mut Map<String, Value>, asked: &Limits, size: MachineSize) -> bool {
    let mut changed = resources.remove("blockIO").is_some();
    let cpus = asked.cpus.as_ref().map(|cpus| guest_list(cpus, size.vcpus.into()));
    let mems = asked.mems.as_ref().map(|mems| guest_list(mems, 1));
    let mut replace = |map: &mut Map<String, Value>, key: &str, list: &Option<CpuList>| {
        let Some(list) = list else { return };
        if let Some(value) = map.get_mut(key) {
            let text = Value::String(list.to_string());
            changed |= *value != text;
            *value = text;
        }
    };
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        replace(cpu, "cpus", &cpus);
        replace(cpu, "mems", &mems);
    }
    if let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) {
        replace(unified, "cpuset.cpus", &cpus);
        replace(unified, "cpuset.mems", &mems);
        let before = unified.len();
        unified.retain(|file, _| !is_io_file(file));
        changed |= unified.len() != before;
    }
    changed
}

/// The guest's own for a list of the host's: the same numbers if the guest has them all, or else its first ones, as
/// many.
fn guest_list(list: &CpuList, have: u32) -> CpuList {
    if list.highest() < have { list.clone() } else { CpuList::first(list.count().min(have).max(1)) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn translated(json: Value, vcpus: u8) -> (Value, bool) {
        let asked = Limits::of(&serde_json::from_value(json.clone()).unwrap()).unwrap();
        let Value::Object(mut map) = json else { panic!("an object") };
        let changed = translate(&mut map, &asked, MachineSize { vcpus, memory: 1 << 28 });
        (Value::Object(map), changed)
    }

    #[test]
    fn numbers_of_the_host_become_the_guests() {
        let json = json!({ "cpu": { "cpus": "4-5,9", "mems": "1", "shares": 2 }, "blockIO": { "weight": 10 }, "pids": { "limit": 3 } });
        let expected = json!({ "cpu": { "cpus": "0-2", "mems": "0", "shares": 2 }, "pids": { "limit": 3 } });
        assert_eq!(translated(json, 3), (expected, true));
        let json = json!({ "unified": { "cpuset.cpus": "7", "io.max": "8:0 rbps=1", "memory.high": "9" } });
        let expected = json!({ "unified": { "cpuset.cpus": "0", "memory.high": "9" } });
        assert_eq!(translated(json, 1), (expected, true));
    }

    #[test]
    fn what_the_guest_has_stays_as_it_is() {
        for json in [
            json!({ "cpu": { "cpus": "0-1", "mems": "0" }, "memory": { "limit": 5 } }),
            json!({}),
            json!({ "cpu": { "cpus": "" } }),
        ] {
            assert_eq!(translated(json.clone(), 2), (json, false));
        }
    }
}

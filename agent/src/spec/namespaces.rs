//! `linux.namespaces`, and what its user and time namespaces need: id mappings and clock offsets.
//!
//! A container has its own mount, pid, ipc and uts namespaces, or joins those of another container of its pod; its
//! network is the pod's. What it would share with the host under runc it cannot share from inside a machine.

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType as Type};

use super::{Result, SpecError, text};
use crate::{
    idmap::{IdMapping, IdMaps},
    plan::{NamespaceKind as Kind, NamespacePlan},
};

const FIELD: &str = "linux.namespaces";

/// The word for a kind of namespace in the specification and in agent.proto.
pub fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Pid => "pid",
        Kind::Network => "network",
        Kind::Ipc => "ipc",
        Kind::Uts => "uts",
        Kind::Mount => "mount",
        Kind::Cgroup => "cgroup",
        Kind::User => "user",
        Kind::Time => "time",
    }
}

/// All kinds, in the order of joining: what the stage may join with the rights that it has before it enters a user
/// namespace, then that.
pub const KINDS: [Kind; 8] =
    [Kind::Network, Kind::Ipc, Kind::Uts, Kind::Pid, Kind::Cgroup, Kind::Time, Kind::User, Kind::Mount];

fn kind(typ: Type) -> Kind {
    match typ {
        Type::Pid => Kind::Pid,
        Type::Network => Kind::Network,
        Type::Ipc => Kind::Ipc,
        Type::Uts => Kind::Uts,
        Type::Mount => Kind::Mount,
        Type::Cgroup => Kind::Cgroup,
        Type::User => Kind::User,
        Type::Time => Kind::Time,
    }
}

/// `joined` are the kinds that the request joins, `their_ids` what the users of a joined user namespace are.
pub(super) fn plan(
    linux: &Linux,
    joined: &[Kind],
    their_ids: &IdMaps,
    notes: &mut Vec<String>,
) -> Result<NamespacePlan> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut seen: Vec<(Kind, bool)> = Vec::new();
    for namespace in namespaces {
        let kind = kind(namespace.typ());
        if seen.iter().any(|(earlier, _)| *earlier == kind) {
            return Err(SpecError::new(FIELD, format!("{:?} is there twice", name(kind))));
        }
        seen.push((kind, joins(namespace, kind, joined)?));
    }
    if let Some(stray) = joined.iter().find(|kind| !seen.contains(&(**kind, true))) {
        let problem = format!("the request joins a {:?} namespace, which has no path there", name(*stray));
        return Err(SpecError::new(FIELD, problem));
    }
    for required in [Kind::Mount, Kind::Pid, Kind::Ipc, Kind::Uts, Kind::Network] {
        if seen.iter().any(|(kind, _)| *kind == required) {
            continue;
        }
        let problem = match required {
            Kind::Network => {
                "\"network\" is missing: a pod cannot share the host's network; use a network namespace".into()
            }
            other => format!(
                "{:?} is missing: a container cannot share the host's, which is outside its machine",
                name(other)
            ),
        };
        return Err(SpecError::new(FIELD, problem));
    }
    if !seen.iter().any(|(kind, _)| *kind == Kind::Cgroup) {
        notes.push("linux.namespaces has no \"cgroup\": the container gets its own all the same".into());
        seen.push((Kind::Cgroup, false));
    }
    let mut plan = NamespacePlan {
        new: seen.iter().filter(|(kind, join)| !join && *kind != Kind::Network).map(|(kind, _)| *kind).collect(),
        joined: KINDS.into_iter().filter(|kind| seen.contains(&(*kind, true))).collect(),
        ids: IdMaps {
            uids: mappings("linux.uidMappings", linux.uid_mappings().as_deref())?,
            gids: mappings("linux.gidMappings", linux.gid_mappings().as_deref())?,
        },
        time_offsets: time_offsets(linux)?,
    };
    if plan.makes(Kind::User) && plan.joins(Kind::Pid) {
        let problem = "\"pid\" with a path: a pid namespace is joined with its user namespace; give \"user\" the same container's path";
        return Err(SpecError::new(FIELD, problem));
    }
    check_ids(&plan, their_ids)?;
    if plan.joins(Kind::User) {
        plan.ids = their_ids.clone();
    }
    if !plan.time_offsets.is_empty() && !plan.makes(Kind::Time) {
        return Err(SpecError::new("linux.timeOffsets", "needs a time namespace of the container's own"));
    }
    Ok(plan)
}

/// Whether a namespace is to be joined: it has a path, and the request says whose it is.
fn joins(namespace: &LinuxNamespace, kind: Kind, joined: &[Kind]) -> Result<bool> {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else { return Ok(false) };
    let refused =
        |problem: String| Err(SpecError::new(FIELD, format!("{:?} with path {path:?}: {problem}", name(kind))));
    if kind == Kind::Mount {
        return refused("a container has file systems of its own; remove the path".into());
    }
    if !joined.contains(&kind) {
        return refused("it is not the namespace of another container of the pod; remove the path".into());
    }
    Ok(true)
}

fn check_ids(plan: &NamespacePlan, theirs: &IdMaps) -> Result<()> {
    for (field, list, theirs) in
        [("linux.uidMappings", &plan.ids.uids, &theirs.uids), ("linux.gidMappings", &plan.ids.gids, &theirs.gids)]
    {
        if !plan.has_users() && !list.is_empty() {
            return Err(SpecError::new(field, "needs a user namespace"));
        }
        if plan.joins(Kind::User) && !list.is_empty() && list != theirs {
            return Err(SpecError::new(field, "is not what the joined user namespace has; remove it"));
        }
        if plan.makes(Kind::User) && !list.iter().any(|mapping| mapping.inside == 0) {
            return Err(SpecError::new(field, "maps no id to 0, the user namespace's root"));
        }
    }
    Ok(())
}

pub(super) fn mappings(field: &str, list: Option<&[LinuxIdMapping]>) -> Result<Vec<IdMapping>> {
    let one = |mapping: &LinuxIdMapping| {
        let (inside, outside, count) = (mapping.container_id(), mapping.host_id(), mapping.size());
        // u32::MAX is nobody's id.
        if count == 0 || inside.checked_add(count).is_none() || outside.checked_add(count).is_none() {
            let problem = format!("containerID {inside}, hostID {outside}, size {count} is no range of ids");
            return Err(SpecError::new(field, problem));
        }
        Ok(IdMapping { inside, outside, count })
    };
    list.unwrap_or_default().iter().map(one).collect()
}

fn time_offsets(linux: &Linux) -> Result<Vec<(String, i64, u32)>> {
    let mut offsets = Vec::new();
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let field = format!("linux.timeOffsets[{clock:?}]");
        if clock != "monotonic" && clock != "boottime" {
            return Err(SpecError::new(field, "is not \"monotonic\" or \"boottime\""));
        }
        let nanos = offset.nanosecs().unwrap_or(0);
        if nanos >= 1_000_000_000 {
            return Err(SpecError::new(field, format!("{nanos} nanoseconds are a second or more")));
        }
        offsets.push((text(&field, clock)?, offset.secs().unwrap_or(0), nanos));
    }
    offsets.sort();
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn planned(extra: &[Value], linux: Value, joined: &[Kind]) -> Result<NamespacePlan> {
        let mut list = vec![
            json!({"type": "mount"}),
            json!({"type": "network"}),
            json!({"type": "uts"}),
            json!({"type": "ipc"}),
            json!({"type": "cgroup"}),
        ];
        list.extend_from_slice(extra);
        let mut linux = linux;
        linux["namespaces"] = list.into();
        let theirs = IdMaps { uids: vec![IdMapping { inside: 0, outside: 7, count: 9 }], gids: Vec::new() };
        plan(&serde_json::from_value(linux).unwrap(), joined, &theirs, &mut Vec::new())
    }

    #[test]
    fn what_has_a_path_and_an_answer_is_joined_in_order() {
        let user = json!({"type": "user", "path": "/proc/7/ns/user"});
        let pid = json!({"type": "pid", "path": "/proc/7/ns/pid"});
        let plan = planned(&[user.clone(), pid.clone()], json!({}), &[Kind::User, Kind::Pid]).unwrap();
        assert_eq!(plan.joined, [Kind::Pid, Kind::User]);
        assert_eq!(plan.ids.uid(1), Some(8), "the other container's users");
        let mapping = json!({"uidMappings": [{"containerID": 0, "hostID": 7, "size": 8}]});
        let error = planned(&[user.clone(), pid.clone()], mapping, &[Kind::User, Kind::Pid]).unwrap_err();
        assert_eq!(error.field, "linux.uidMappings");
        assert_eq!(plan.new, [Kind::Mount, Kind::Uts, Kind::Ipc, Kind::Cgroup]);
        assert!(planned(&[user, pid], json!({}), &[Kind::User]).unwrap_err().problem.contains("pid"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let pid = json!({"type": "pid"});
        let map = |id: u32, size: u32| json!([{"containerID": id, "hostID": 5, "size": size}]);
        let cases = [
            (vec![], json!({}), vec![], FIELD, "pid"),
            (vec![pid.clone(), pid.clone()], json!({}), vec![], FIELD, "twice"),
            (vec![pid.clone()], json!({}), vec![Kind::Ipc], FIELD, "ipc"),
            (vec![pid.clone(), json!({"type": "user"})], json!({}), vec![], "linux.uidMappings", "root"),
            (
                vec![pid.clone(), json!({"type": "user"})],
                json!({"uidMappings": map(0, 1), "gidMappings": map(1, 1)}),
                vec![],
                "linux.gidMappings",
                "root",
            ),
            (vec![pid.clone()], json!({"uidMappings": map(0, 1)}), vec![], "linux.uidMappings", "user namespace"),
            (vec![pid.clone()], json!({"uidMappings": map(0, 0)}), vec![], "linux.uidMappings", "no range"),
            (vec![pid.clone()], json!({"uidMappings": map(9, u32::MAX)}), vec![], "linux.uidMappings", "no range"),
            (
                vec![json!({"type": "pid", "path": "/proc/7/ns/pid"}), json!({"type": "user"})],
                json!({"uidMappings": map(0, 1), "gidMappings": map(0, 1)}),
                vec![Kind::Pid],
                FIELD,
                "user namespace",
            ),
            (
                vec![pid.clone()],
                json!({"timeOffsets": {"monotonic": {"secs": 1}}}),
                vec![],
                "linux.timeOffsets",
                "time",
            ),
            (
                vec![pid.clone(), json!({"type": "time"})],
                json!({"timeOffsets": {"realtime": {"secs": 1}}}),
                vec![],
                "linux.timeOffsets[\"realtime\"]",
                "monotonic",
            ),
        ];
        for (extra, linux, joined, field, problem) in cases {
            let error = planned(&extra, linux.clone(), &joined).unwrap_err();
            assert_eq!(error.field, field, "{extra:?} {linux}");
            assert!(error.problem.contains(problem), "{error}");
        }
    }

    #[test]
    fn another_mount_namespace_is_not_joined() {
        let mut linux = json!({});
        linux["namespaces"] = json!([{"type": "mount", "path": "/proc/1/ns/mnt"}]);
        let linux = serde_json::from_value(linux).unwrap();
        let error = plan(&linux, &[Kind::Mount], &IdMaps::default(), &mut Vec::new()).unwrap_err();
        assert!(error.problem.contains("mount"), "{error}");
    }
}

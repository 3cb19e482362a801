//! A pod's resources on the host: how large its machine is ([`size`]), and what of `linux.resources` is left for the
//! agent ([`guest`]). What the object says is read by caisson-oci, for both sides; the limits of the pod's processes are
//! [`crate::cgroup::limits`]. Pure.

pub mod guest;
pub mod size;

#[cfg(test)]
pub(crate) mod tests {
    use caisson_oci::{FieldError, Limits};
    use serde_json::json;

    pub(crate) fn asked(json: serde_json::Value) -> Result<Limits, FieldError> {
        Limits::of(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn what_the_guest_would_refuse_is_refused_before_there_is_a_machine() {
        for (json, field) in [
            (json!({ "network": { "classID": 1 } }), "linux.resources.network"),
            (json!({ "cpu": { "realtimePeriod": 1 } }), "linux.resources.cpu.realtimePeriod"),
            (json!({ "blockIO": { "weight": 9 } }), "linux.resources.blockIO.weight"),
            (json!({ "unified": { "cgroup.kill": "1" } }), "linux.resources.unified[\"cgroup.kill\"]"),
        ] {
            assert_eq!(asked(json).unwrap_err().field, field);
        }
    }
}

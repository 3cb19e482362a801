//! `linux.resources.devices`: rules in order, then what every container may use.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::super::{Result, SpecError};
use crate::cgroup::devices::{ALWAYS, Access, Devices, Kind, Pattern, Rule};

pub(super) fn plan(rules: &[LinuxDeviceCgroup]) -> Result<Devices> {
    let mut devices = Devices::default();
    for (index, rule) in rules.iter().enumerate() {
        let field = format!("linux.resources.devices[{index}]");
        let rule = one(&field, rule)?;
        devices.add(&rule).map_err(|hole| SpecError::new(field, hole.to_string()))?;
    }
    for rule in &ALWAYS {
        let hole = |hole| SpecError::new("linux.resources.devices", format!("{hole} ({rule:?} must stay allowed)"));
        devices.add(rule).map_err(hole)?;
    }
    Ok(devices)
}

fn one(field: &str, rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let text = rule.access().as_deref().unwrap_or_default();
    let access = Access::parse(text).ok_or_else(|| {
        SpecError::new(format!("{field}.access"), format!("{text:?} is not made of the letters r, w and m"))
    })?;
    let kind = match rule.typ() {
        // It stands for every device and every access, whatever else the rule says; as with runc.
        None | Some(LinuxDeviceType::A) => return Ok(Rule { allow: rule.allow(), devices: None, access: Access::ALL }),
        Some(LinuxDeviceType::B) => Kind::Block,
        Some(LinuxDeviceType::C) => Kind::Char,
        Some(other) => {
            let problem = format!("{:?} is neither \"a\", \"b\" nor \"c\"", other.as_str());
            return Err(SpecError::new(format!("{field}.type"), problem));
        }
    };
    let number = |name: &str, number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| SpecError::new(format!("{field}.{name}"), format!("{number} is no device number"))),
    };
    let pattern = Pattern { kind, major: number("major", rule.major())?, minor: number("minor", rule.minor())? };
    Ok(Rule { allow: rule.allow(), devices: Some(pattern), access })
}

//! The rules of a profile for one architecture, by number.

use std::collections::BTreeMap;

use super::{Action, Comparison, Condition, Profile, Rule, arch::Architecture, compile::CompileError};

/// Conditions that must all hold, and what happens then.
pub(super) type Check = (Vec<Condition>, Action);

/// What happens to one number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    /// Whatever the arguments are.
    Always(Action),
    /// The first check that holds; the default if none does. The strictest comes first.
    Checks(Vec<Check>),
}

/// One architecture's part of a filter.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Every number that is not left to the default.
    pub outcomes: BTreeMap<u32, Outcome>,
    /// The highest number that any rule names, also one that says no more than the default.
    pub last: Option<u32>,
}

pub(super) fn table(profile: &Profile, arch: Architecture) -> Result<Table, CompileError> {
    let mut table = Table::default();
    for rule in &profile.rules {
        let (number, other) = (arch.number(&rule.name), arch.multiplexed(&rule.name));
        table.last = table.last.max(number).max(other.map(|other| other.number));
        if rule.action == profile.default {
            continue;
        }
        if let Some(number) = number {
            table.add(number, rule, rule.conditions.clone())?;
        }
        if let Some(other) = other {
            // Arguments lie behind a pointer there, where a filter cannot look. Whatever the conditions are, the
            // stricter reading is taken: refused altogether, or left to the default.
            if rule.conditions.is_empty() || !rule.action.is_lenient() {
                let call = Condition { argument: 0, comparison: Comparison::Equal, value: other.call.into() };
                table.add(other.number, rule, vec![call])?;
            }
        }
    }
    for outcome in table.outcomes.values_mut() {
        if let Outcome::Checks(checks) = outcome {
            checks.sort_by_key(|(_, action)| action.strictness());
        }
    }
    Ok(table)
}

impl Table {
    fn add(&mut self, number: u32, rule: &Rule, conditions: Vec<Condition>) -> Result<(), CompileError> {
        let outcome = self.outcomes.entry(number).or_insert_with(|| Outcome::Checks(Vec::new()));
        let Outcome::Checks(checks) = outcome else { return Ok(()) };
        if conditions.is_empty() {
            *outcome = Outcome::Always(rule.action);
            return Ok(());
        }
        match checks.iter().find(|(known, _)| *known == conditions) {
            None => checks.push((conditions, rule.action)),
            Some((_, action)) if *action == rule.action => {}
            // One that came from a multiplexed call may meet another rule's there; the stricter one counts.
            Some(_) if conditions != rule.conditions => checks.push((conditions, rule.action)),
            Some(_) => return Err(CompileError::Contradiction { name: rule.name.clone() }),
        }
        Ok(())
    }
}

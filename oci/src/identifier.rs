//! Names of containers and execs, as containerd's `identifiers` package allows them.

/// The longest.
pub const MAX_LENGTH: usize = 76;

/// Whether `name` is 1 to 76 characters of `[A-Za-z0-9._-]` beginning with a letter or digit.
pub fn is_valid(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= MAX_LENGTH && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_containerd_has_them() {
        for good in ["a", "A.b_c-9", &"x".repeat(76)] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "..", "ä", &"x".repeat(77)] {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}

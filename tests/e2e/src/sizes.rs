//! How much a test does: a size for every day, and the full size when `CAISSON_FULL=1` (`make soak`).

/// Whether full sizes are asked for.
pub fn full() -> bool {
    std::env::var_os("CAISSON_FULL").is_some_and(|value| value == "1")
}

/// `everyday`, or `full` when full sizes are asked for.
pub fn size(everyday: usize, full_size: usize) -> usize {
    if full() { full_size } else { everyday }
}

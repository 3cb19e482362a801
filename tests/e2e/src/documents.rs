//! The tables of docs/ that name tests: each named test must be there, so that no table outlives what proves it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The documents with such tables, below docs/.
const DOCUMENTS: [&str; 3] = ["spec.md", "task-api.md", "differences.md"];

fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(str::trim).collect())
}

/// The rows of every table in a document: line number and cells.
fn rows(document: &str) -> Vec<(usize, Vec<&str>)> {
    let numbered = document.lines().zip(1..).filter_map(|(line, number)| Some((number, cells(line)?)));
    let rule =
        |cells: &[&str]| cells.iter().all(|cell| !cell.is_empty() && cell.chars().all(|letter| "-:".contains(letter)));
    let all: Vec<_> = numbered.collect();
    // The line above a rule is the heading.
    let heading = |index: usize| all.get(index + 1).is_some_and(|(_, next)| rule(next));
    let is_row = |index: usize, cells: &[&str]| !rule(cells) && !heading(index);
    all.iter().enumerate().filter(|(index, (_, cells))| is_row(*index, cells)).map(|(_, row)| row.clone()).collect()
}

/// The names of tests in a cell: what stands in backquotes and has `::` in it.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).collect()
}

/// Every Rust source of the workspace: path and text.
fn sources(root: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = ["agent", "guest-image", "hypervisor", "oci", "protos", "runtime", "tests"]
        .iter()
        .map(|part| root.join(part))
        .collect();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.clone(), fs::read_to_string(&path).unwrap_or_default()));
            }
        }
    }
    found
}

/// Whether `crate::module::function` (or only its end) is in one of the sources: a function of the last name, in the
/// module of the name before it.
fn exists(name: &str, sources: &[(PathBuf, String)]) -> bool {
    let mut parts = name.rsplit("::");
    let (function, module) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let defined = format!("fn {function}(");
    sources.iter().any(|(path, text)| {
        let of_module =
            path.components().any(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs") == module)
                || text.contains(&format!("mod {module} {{"));
        of_module && text.contains(&defined)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read() {
        let heading = "# Title\n\n| Field | How | Proof |\n|---|:-:|---|\n";
        let text = &format!("{heading}| `a` | honoured | `spec::x::y`, `not a test` |\nNo row.\n");
        let rows = rows(text);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].0, 5);
        assert_eq!(names(rows[0].1[2]), ["spec::x::y"]);
    }

    #[test]
    fn a_name_must_be_a_function_of_its_module() {
        let sources = [(PathBuf::from("agent/tests/agent/view.rs"), "#[test]\nfn masked_paths_hold() {}\n".to_owned())];
        assert!(exists("agent::view::masked_paths_hold", &sources));
        assert!(!exists("agent::view::masked_paths", &sources));
        assert!(!exists("agent::process::masked_paths_hold", &sources));
    }

    #[test]
    fn every_row_has_a_proof_that_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let sources = sources(&root);
        let mut wrong = Vec::new();
        for document in DOCUMENTS {
            let path = root.join("docs").join(document);
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let rows = rows(&text);
            assert!(!rows.is_empty(), "{document} has no table");
            for (line, cells) in rows {
                let named: Vec<&str> = cells.iter().flat_map(|cell| names(cell)).collect();
                if named.is_empty() {
                    wrong.push(format!("{document}:{line}: no test is named"));
                }
                let missing = named.iter().filter(|name| !exists(name, &sources));
                wrong.extend(missing.map(|name| format!("{document}:{line}: there is no test {name}")));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

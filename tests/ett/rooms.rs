//! Each room of `src/` imports exactly the rooms listed in the table in ARCHITECTURE.md, all of them below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::common::Outcome;

/// The rooms from top to bottom, each with the rooms that it imports.
type Table = Vec<(String, BTreeSet<String>)>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of the table with the columns "room" and "imports".
fn table(text: &str) -> Table {
    let rows = text.lines().skip_while(|l| !l.starts_with("| room |")).skip(2);
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(String::from).collect::<Vec<_>>();
    rows.take_while(|l| l.starts_with('|'))
        .filter_map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
            let room = names(cells.first()?).into_iter().next()?;
            Some((room, names(cells.last()?).into_iter().collect()))
        })
        .collect()
}

/// The rooms that a source file refers to outside of its tests.
fn imports(source: &str) -> BTreeSet<String> {
    let code: String = source
        .split("#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or_default()
        .lines()
        .filter(|l| !l.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let paths = code.split("crate::").skip(1);
    let name = |path: &str| path.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(String::from);
    paths.filter_map(name).filter(|n| n.starts_with(char::is_lowercase)).collect()
}

/// Collects the imports of each room. Modules that are compiled only for tests are skipped.
fn found(folder: &Path, room: Option<&str>, all: &mut BTreeMap<String, BTreeSet<String>>) -> Outcome {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(|e| e.file_name());
    let tests_only = |stem: &str| -> Result<bool, std::io::Error> {
        let parent = fs::read_to_string(folder.join("mod.rs")).unwrap_or_default();
        Ok(parent.contains(&format!("#[cfg(test)]\nmod {stem};")))
    };
    for entry in entries {
        let path = entry.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if room.is_none() && (stem == "lib" || stem == "bin") || tests_only(&stem)? {
            continue;
        }
        let of = room.unwrap_or(&stem);
        if path.is_dir() {
            found(&path, Some(of), all)?;
        } else {
            let mut these = imports(&fs::read_to_string(&path)?);
            these.remove(of);
            all.entry(of.into()).or_default().extend(these);
        }
    }
    Ok(())
}

/// Differences between the table and the code, and imports of rooms that lie above.
fn problems(table: &Table, found: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut all = Vec::new();
    let place = |room: &str| table.iter().position(|(name, _)| name == room);
    for (room, imports) in found {
        let Some(at) = place(room) else {
            all.push(format!("the table has no row for `{room}`"));
            continue;
        };
        for name in imports.symmetric_difference(&table[at].1) {
            let what = if imports.contains(name) { "imports" } else { "does not import" };
            all.push(format!("`{room}` {what} `{name}`"));
        }
        let up = imports.iter().filter(|name| place(name).is_some_and(|there| there <= at));
        all.extend(up.map(|name| format!("`{room}` imports `{name}`, which lies above it")));
    }
    let gone = table.iter().filter(|(room, _)| !found.contains_key(room));
    all.extend(gone.map(|(room, _)| format!("there is no room `{room}`")));
    all
}

#[test]
fn rooms_import_only_what_lies_below_them() -> Outcome {
    let table = table(&fs::read_to_string(root().join("ARCHITECTURE.md"))?);
    let mut all = BTreeMap::new();
    found(&root().join("src"), None, &mut all)?;
    let problems = problems(&table, &all);
    assert!(problems.is_empty(), "ARCHITECTURE.md and the code differ:\n{}", problems.join("\n"));
    Ok(())
}

#[test]
fn an_import_that_the_table_lacks_or_that_goes_upwards_is_found() {
    let table = table(
        "| room | what | imports |\n| --- | --- | --- |\n| `a` | top | `b` |\n| `b` | bottom | |\n\nend",
    );
    let code = |a: &str, b: &str| BTreeMap::from([("a".into(), imports(a)), ("b".into(), imports(b))]);
    assert!(problems(&table, &code("use crate::b::X;", "// crate::a\nfn f() {}")).is_empty());
    for (a, b, want) in [
        ("use crate::b;", "fn f() { crate::a::g() }", "which lies above"),
        ("use crate::b;\nuse crate::c;", "", "imports `c`"),
        ("", "", "does not import `b`"),
    ] {
        let got = problems(&table, &code(a, b)).join("\n");
        assert!(got.contains(want), "{got}");
    }
    let mut more = code("use crate::b;", "");
    more.insert("c".into(), BTreeSet::new());
    assert!(problems(&table, &more).join("\n").contains("no row for `c`"));
}

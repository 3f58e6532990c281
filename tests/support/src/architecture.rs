//! The rooms and arrows of ARCHITECTURE.md, compared with the manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Arrows = BTreeMap<String, BTreeSet<String>>;

fn root() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Returns the arrows in the table of rooms.
fn by_the_page() -> Arrows {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix('|'));
    let rooms = rows.filter(|row| row.starts_with("shim/") || row.starts_with("runtime-hooks/"));
    rooms
        .filter_map(|row| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let [room, _, arrows] = cells[..] else { return None };
            let arrows = arrows.split(',').map(str::trim).filter(|arrow| !arrow.is_empty());
            Some((room.trim_end_matches('`').to_owned(), arrows.map(str::to_owned).collect()))
        })
        .collect()
}

/// Returns the arrows in the crates' manifests.
fn by_the_manifests() -> Arrows {
    let mut manifests = BTreeMap::new();
    for folder in ["shim", "runtime-hooks"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if let Ok(text) = std::fs::read_to_string(entry.path().join("Cargo.toml")) {
                manifests.insert(name.clone(), (format!("{folder}/{name}"), text));
            }
        }
    }
    let arrows = |text: &str| {
        let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        let names = dependencies.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
        names.filter(|name| manifests.contains_key(*name)).map(str::to_owned).collect()
    };
    manifests.values().map(|(room, text)| (room.clone(), arrows(text))).collect()
}

#[test]
fn the_page_shows_the_rooms_and_arrows_that_there_are() {
    assert_eq!(by_the_page(), by_the_manifests());
}

#[test]
fn arrows_make_no_circle() {
    let arrows = by_the_manifests();
    let of = |name: &str| arrows.iter().find(|(room, _)| room.ends_with(&format!("/{name}"))).map(|(_, to)| to);
    fn visit<'a>(name: &'a str, path: &mut Vec<&'a str>, of: &dyn Fn(&str) -> Option<&'a BTreeSet<String>>) {
        assert!(!path.contains(&name), "{path:?} leads to {name}");
        path.push(name);
        for next in of(name).into_iter().flatten() {
            visit(next, path, of);
        }
        path.pop();
    }
    for room in arrows.keys() {
        let name = room.rsplit('/').next().unwrap();
        visit(name, &mut Vec::new(), &of);
    }
}

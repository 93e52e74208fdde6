//! The floors of the code: what may import what, and which modules stay pure. ARCHITECTURE.md tells them to people, with a map of all
//! folders. And what the image's build says of the crate's files.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

/// From the ground up. A module imports from its own floor and those below, and never in a circle.
const FLOORS: [&[&str]; 4] = [
    &[
        "blocking",
        "config",
        "event",
        "http1",
        "http2",
        "intern",
        "keys",
        "memory",
        "redirect",
        "telemetry",
    ],
    &["clock", "heartbeat", "inject", "net", "policy"],
    &["admin", "audit", "plan", "store", "upstream"],
    &["background", "cli", "proxy"],
];

/// No I/O, no clock, no randomness.
const PURE: [&str; 6] = ["event", "http1", "http2", "inject", "policy", "redirect"];

const IMPURE: [&str; 16] = [
    "tokio",
    "hyper",
    "redis::",
    "rusqlite",
    "socket2",
    "tracing",
    "fastrand",
    "getrandom",
    "::clock",
    "Instant::now",
    "SystemTime",
    "std::env",
    "std::fs",
    "std::io",
    "std::process",
    "std::thread",
];

#[test]
fn imports_point_down_or_stay_on_their_floor() {
    for (module, imports) in imports() {
        for import in imports {
            assert!(
                floor(&import) <= floor(&module),
                "{module} is on floor {} and imports {import} from floor {}",
                floor(&module),
                floor(&import)
            );
        }
    }
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let mut left = imports();
    while !left.is_empty() {
        let free = left
            .iter()
            .find(|(_, imports)| !imports.iter().any(|import| left.contains_key(import)))
            .map(|(module, _)| module.clone());
        let free = free.unwrap_or_else(|| panic!("a circle within {left:#?}"));
        left.remove(&free);
    }
}

#[test]
fn the_pure_modules_name_nothing_that_acts() {
    for source in sources() {
        for word in IMPURE {
            assert!(
                !PURE.contains(&source.module.as_str()) || !source.code.contains(word),
                "{} names {word}",
                source.path.display()
            );
        }
    }
}

#[test]
fn crates_are_named_where_they_belong_alone() {
    const OF: [(&str, &[&str]); 5] = [
        ("rusqlite", &["src/store/sqlite"]),
        ("hickory_resolver", &["src/net/resolve.rs"]),
        ("tokio_postgres", &["src/store/postgres"]),
        ("deadpool_postgres", &["src/store/postgres"]),
        (
            "opentelemetry",
            &["src/telemetry/spans.rs", "src/telemetry/traces.rs"],
        ),
    ];
    for source in sources() {
        for (name, paths) in OF {
            let may = paths.iter().any(|path| source.path.starts_with(path));
            assert!(
                may || !source.code.contains(name),
                "{} names {name}",
                source.path.display()
            );
        }
    }
}

#[test]
fn one_module_knows_redis() {
    for source in sources() {
        // The configuration has a module of that name.
        let may = ["src/store/redis", "src/config"].map(|path| source.path.starts_with(path));
        assert!(
            may.contains(&true) || !names_redis_crate(&source.code),
            "{} names the Redis crate",
            source.path.display()
        );
    }
}

/// A path that begins with `redis`, unless one of weir's modules of that name is imported as such.
fn names_redis_crate(code: &str) -> bool {
    let is_ours = code.contains("config::redis::{self");
    let is_head = |at: usize| {
        let before = &code[..at];
        let goes_on = |c: char| c.is_alphanumeric() || c == '_';
        // `::redis` is the crate's own path.
        let path = before.strip_suffix("::").unwrap_or_default();
        !before.ends_with(goes_on) && !path.ends_with(goes_on)
    };
    let mut heads = code
        .match_indices("redis")
        .map(|(at, _)| at)
        .filter(|at| is_head(*at));
    heads.any(|at| {
        let rest = &code[at + "redis".len()..];
        let from_root = code[..at].ends_with("::");
        let imported = ["use ", "extern crate "]
            .iter()
            .any(|word| code[..at].ends_with(word));
        (rest.starts_with("::") && (from_root || !is_ours))
            || (imported && rest.starts_with([';', ' ']))
    })
}

#[test]
fn the_redis_crate_is_seen_in_every_form() {
    for code in [
        "use redis::Cmd;",
        "pub use redis::Cmd;",
        "use redis;",
        "use redis as r;",
        "use ::redis::Cmd;",
        "let ping = redis::cmd(\"PING\");",
        "fn f(x: &redis::Value)",
    ] {
        assert!(names_redis_crate(code), "{code}");
    }
    for code in [
        "use crate::store::redis::Connections;",
        "use super::redis::{Arg, Script};",
        "mod redis;",
        "use crate::config::redis::{self, Client};\nfn new(config: &redis::Redis)",
    ] {
        assert!(!names_redis_crate(code), "{code}");
    }
}

#[test]
fn the_architecture_tells_the_same_floors() {
    let told = fs::read_to_string("ARCHITECTURE.md").unwrap();
    for (floor, modules) in FLOORS.iter().enumerate() {
        let modules: Vec<_> = modules.iter().map(|module| format!("`{module}`")).collect();
        let row = format!("| {floor} | {} |", modules.join(", "));
        assert!(told.contains(&row), "ARCHITECTURE.md lacks {row}");
    }
}

/// What each file owns is said at its head.
#[test]
fn the_code_map_has_each_folder_and_no_other() {
    let (rows, folders) = (rows(), folders());
    let lacking: Vec<_> = folders.difference(&rows).collect();
    assert!(
        lacking.is_empty(),
        "the code map of ARCHITECTURE.md has no row for {lacking:?}"
    );
    let gone: Vec<_> = rows.difference(&folders).collect();
    assert!(
        gone.is_empty(),
        "the code map of ARCHITECTURE.md has a row for {gone:?}: no folder of src, and no file at its top"
    );
}

#[test]
fn what_newcomers_are_sent_to_is_there() {
    let told = fs::read_to_string("ARCHITECTURE.md").unwrap();
    let (_, table) = told.split_once("\n## Where to begin\n").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let named: Vec<_> = table.split('`').skip(1).step_by(2).collect();
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        let is_there = match name.contains('/') {
            true => PathBuf::from(name).exists(),
            false => is_module(name) || is_function(name),
        };
        assert!(is_there, "ARCHITECTURE.md sends people to {name}");
    }
}

/// The file of a module by its path, as `a::b`.
fn file_of(module: &str) -> Option<PathBuf> {
    let path = module.replace("::", "/");
    let files = [format!("src/{path}.rs"), format!("src/{path}/mod.rs")];
    files
        .map(PathBuf::from)
        .into_iter()
        .find(|file| file.exists())
}

fn is_module(name: &str) -> bool {
    file_of(name).is_some()
}

fn is_function(name: &str) -> bool {
    let Some((module, function)) = name.rsplit_once("::") else {
        return false;
    };
    let code = file_of(module).map(|file| fs::read_to_string(file).unwrap());
    let begins = ['(', '<'].map(|end| format!("fn {function}{end}"));
    code.is_some_and(|code| begins.iter().any(|begin| code.contains(begin)))
}

#[test]
fn each_file_says_at_its_head_what_it_owns() {
    for path in paths() {
        assert!(
            fs::read_to_string(&path).unwrap().starts_with("//! "),
            "{} does not begin with //!",
            path.display()
        );
    }
}

/// What the first column of the code map names.
fn rows() -> BTreeSet<String> {
    let told = fs::read_to_string("ARCHITECTURE.md").unwrap();
    let (_, map) = told.split_once("\n## Code map\n").unwrap();
    let (map, _) = map.split_once("\n## ").unwrap();
    let rows = map.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split('`').next())
        .map(str::to_owned)
        .collect()
}

/// The files at the top of `src` and the folders below it, as `a::b`. One that has only tests is no more than its module's.
fn folders() -> BTreeSet<String> {
    let name = |source: Source| {
        let path = source.path.with_extension("");
        let parts = path.iter().skip(1).map(|part| part.to_str().unwrap());
        let parts: Vec<_> = parts.filter(|part| *part != "mod").collect();
        let above = &parts[..parts.len().max(2) - 1];
        (!parts.contains(&"tests")).then(|| above.join("::"))
    };
    let mut folders: BTreeSet<_> = sources().into_iter().filter_map(name).collect();
    folders.insert("main".to_owned());
    folders
}

fn floor(module: &str) -> usize {
    let floor = FLOORS.iter().position(|floor| floor.contains(&module));
    floor.unwrap_or_else(|| {
        panic!("{module} has no floor: put it on one, here and in ARCHITECTURE.md")
    })
}

/// A file of `src` without comments and tests.
struct Source {
    path: PathBuf,
    /// The module of the crate that it is in.
    module: String,
    code: String,
}

fn sources() -> Vec<Source> {
    paths().into_iter().filter_map(source).collect()
}

fn paths() -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut folders = vec![PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                paths.push(path);
            }
        }
    }
    assert!(paths.len() > 20, "the test runs in the crate's folder");
    paths
}

/// `None` for the roots of the two crates, which name every module, and for tests.
fn source(path: PathBuf) -> Option<Source> {
    let module = path
        .iter()
        .nth(1)?
        .to_str()?
        .trim_end_matches(".rs")
        .to_owned();
    let are_tests = path.ends_with("tests.rs") || path.iter().any(|part| part == "tests");
    if ["lib", "main"].contains(&module.as_str()) || are_tests {
        return None;
    }
    let text = fs::read_to_string(&path).unwrap();
    let code = text
        .split("\n#[cfg(test)]\nmod ")
        .next()
        .unwrap_or_default();
    let code: Vec<_> = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    let code = code.join("\n");
    // A path by `super` to the root would import unseen.
    let is_folder = path.ends_with("mod.rs");
    let to_root = "super::".repeat(path.iter().count() - 1 - usize::from(is_folder));
    assert!(
        !code.contains(&to_root),
        "{} reaches the root by {to_root}",
        path.display()
    );
    Some(Source { path, module, code })
}

/// The other modules that each module imports.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let mut imports = BTreeMap::<_, BTreeSet<_>>::new();
    for source in sources() {
        let of_module = imports.entry(source.module.clone()).or_default();
        for (at, root) in source.code.match_indices("crate::") {
            of_module.extend(heads(&source.code[at + root.len()..]));
        }
        of_module.remove(&source.module);
    }
    imports
}

/// The first names of what follows `crate::`: one, or those of a group.
fn heads(path: &str) -> Vec<String> {
    let Some(group) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let mut heads = vec![name(group.trim_start())];
    let mut depth = 0;
    for (at, byte) in group.char_indices() {
        match byte {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(name(group[at + 1..].trim_start())),
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn name(path: &str) -> String {
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
    path[..end.unwrap_or(path.len())].to_owned()
}

#[test]
fn imports_are_read_from_every_form() {
    assert_eq!(heads("clock;"), ["clock"]);
    assert_eq!(heads("config::{a, b::{c, d}};"), ["config"]);
    assert_eq!(
        heads("{\n    clock,\n    config::{a, b},\n    plan::Plan,\n};"),
        ["clock", "config", "plan"]
    );
}

/// The image builds what weir depends on before weir's sources are there: cargo wants a file for each benchmark.
#[test]
fn the_image_has_a_file_for_each_benchmark() {
    let image = fs::read_to_string("Dockerfile.production").unwrap();
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    let benches = manifest.split("[[bench]]\nname = \"").skip(1);
    for bench in benches.map(|rest| rest.split('"').next().unwrap()) {
        assert!(image.contains(&format!("benches/{bench}.rs ")), "{bench}");
    }
}

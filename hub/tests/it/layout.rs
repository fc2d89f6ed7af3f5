//! Structure of `hub/src` and `agent/src`: imports follow the table of folders, files do not import each other in
//! cycles, files and types are small.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Folders of `hub/src`. One imports only folders on lines below its own.
const HUB: &[&[&str]] = &[
    &["app"],
    &["fields_command", "status"],
    &["manager"],
    &["serve", "pipeline", "source"],
    &["bundle", "projection", "args"],
    &["spec"],
    &["snapshot", "fields", "store", "k8s"],
    &["policy", "health"],
    &["model", "json", "backoff", "logging"],
];

/// Folders of `agent/src`.
const AGENT: &[&[&str]] = &[
    &["app"],
    &["args"],
    &["sync"],
    &["server", "hub", "state"],
    &["opa", "status"],
    &["archive", "config", "http", "backoff"],
];

/// Lines of code in one file, tests and comments aside.
const FILE_LINES_MAX: usize = 400;
/// Fields of one type.
const FIELDS_MAX: usize = 10;
/// Configuration and flags, which have as many fields as there are options.
const OPTIONS: &[&str] = &["Args", "Config"];

/// One source file without its tests.
struct Source {
    /// Segments below `crate`.
    module: Vec<String>,
    code: String,
}

fn sources(root: &Path) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
                sources.push(Source { module: module(root, &path), code: code(&path) });
            }
        }
    }
    sources
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests")
        || path.file_stem().is_some_and(|stem| stem == "tests" || stem.to_string_lossy().starts_with("fake_"))
}

fn module(root: &Path, path: &Path) -> Vec<String> {
    let relative = path.strip_prefix(root).unwrap().with_extension("");
    let segments = relative.iter().map(|segment| segment.to_string_lossy().into_owned());
    segments.filter(|segment| !["mod", "lib", "main"].contains(&segment.as_str())).collect()
}

/// The lines of code before the unit tests, without comments.
fn code(path: &PathBuf) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with("//"));
    lines
        .flat_map(|line| {
            [
                line, "
",
            ]
        })
        .collect()
}

/// Paths that `code` names below `crate`, `super` or `self`, with whether the path is re-exported.
fn paths(source: &Source) -> Vec<(Vec<String>, bool)> {
    let mut paths = Vec::new();
    let mut rest = source.code.as_str();
    while let Some(at) = ["crate::", "super::", "self::"].iter().filter_map(|root| rest.find(root)).min() {
        let line = rest[..at].rsplit('\n').next().unwrap_or_default();
        let is_export = line.trim_start().starts_with("pub") && line.contains("use ");
        let is_path =
            !rest[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':');
        let end = rest[at..].find([';', '(', ')', '<', '>', ' ', '!', '\n', ',']).unwrap_or(rest.len() - at);
        let end = if line.contains("use ") { rest[at..].find(';').unwrap_or(end) } else { end };
        let tree: String = rest[at..at + end].split_whitespace().collect();
        if is_path {
            expand(&mut Vec::new(), &tree, &mut |segments| {
                paths.push((absolute(source, segments), is_export));
            });
        }
        rest = &rest[at + end.max(1)..];
    }
    paths
}

/// Calls `found` with each path of a tree like `a::{b, c::{self, d}}`.
fn expand(prefix: &mut Vec<String>, tree: &str, found: &mut dyn FnMut(&[String])) {
    let (head, inner) = match tree.find('{') {
        Some(open) => (&tree[..open], Some(tree[open + 1..].strip_suffix('}').unwrap_or(&tree[open + 1..]))),
        None => (tree, None),
    };
    let before = prefix.len();
    prefix.extend(head.split("::").filter(|segment| !segment.is_empty()).map(str::to_owned));
    match inner {
        None => found(prefix),
        Some(inner) => {
            let (mut depth, mut start) = (0, 0);
            for (at, letter) in inner.char_indices().chain([(inner.len(), ',')]) {
                match letter {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        if start < at {
                            expand(prefix, &inner[start..at], found);
                        }
                        start = at + 1;
                    }
                    _ => {}
                }
            }
        }
    }
    prefix.truncate(before);
}

/// A path below `crate`.
fn absolute(source: &Source, segments: &[String]) -> Vec<String> {
    let mut base = source.module.clone();
    let mut rest = segments;
    while let Some((first, tail)) = rest.split_first() {
        match first.as_str() {
            "crate" => base.clear(),
            "super" => _ = base.pop(),
            "self" => {}
            _ => break,
        }
        rest = tail;
    }
    base.extend(rest.iter().cloned());
    base
}

/// Files that each file imports, by module. A folder's re-exports of its own files are its table of contents.
fn imports(sources: &[Source]) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let modules: BTreeSet<_> = sources.iter().map(|source| &source.module).collect();
    let file_of = |path: Vec<String>| {
        (1..=path.len()).rev().map(|end| path[..end].to_vec()).find(|path| modules.contains(path))
    };
    let of = |source: &Source| {
        let used = paths(source).into_iter().filter_map(|(path, is_export)| {
            let file = file_of(path)?;
            let is_content = is_export && file.starts_with(&source.module);
            (file != source.module && !is_content).then_some(file)
        });
        (source.module.clone(), used.collect())
    };
    sources.iter().filter(|source| !source.module.is_empty()).map(of).collect()
}

fn check(root: &str, folders: &[&[&str]]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let sources = sources(&root);
    assert!(!sources.is_empty(), "{}", root.display());
    let imports = imports(&sources);
    let mut wrong = Vec::new();
    let line = |folder: &str| folders.iter().position(|line| line.contains(&folder));
    for (from, used) in &imports {
        for to in used.iter().filter(|to| to[0] != from[0]) {
            match (line(&from[0]), line(&to[0])) {
                (Some(from), Some(to)) if from < to => {}
                _ => wrong.push(format!("{} imports {}", from.join("::"), to.join("::"))),
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", root.display(), wrong.join("\n"));
}

/// Checks that files import each other without cycles and that files and types are small.
fn check_sizes(root: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let sources = sources(&root);
    let imports = imports(&sources);
    let mut wrong = Vec::new();
    // Files that import nothing but what is left out already; what stays is in a cycle or leads to one.
    let mut left = imports.clone();
    loop {
        let before = left.len();
        let files: BTreeSet<_> = left.keys().cloned().collect();
        left.retain(|_, used| used.iter().any(|used| files.contains(used)));
        if left.len() == before {
            break;
        }
    }
    let in_cycles: Vec<_> = left.keys().map(|file| file.join("::")).collect();
    if !in_cycles.is_empty() {
        wrong.push(format!("in import cycles, or above one: {}", in_cycles.join(", ")));
    }
    for source in &sources {
        let lines = source.code.lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!("{} has {lines} lines of code", source.module.join("::")));
        }
        for (name, fields) in types(&source.code) {
            if fields > FIELDS_MAX && !OPTIONS.contains(&name) {
                wrong.push(format!("{}::{name} has {fields} fields", source.module.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", root.display(), wrong.join("\n"));
}

/// Structs with the number of their fields.
fn types(code: &str) -> impl Iterator<Item = (&str, usize)> {
    code.match_indices("struct ").filter_map(|(at, word)| {
        let rest = &code[at + word.len()..];
        let name = rest.split(|letter: char| !letter.is_alphanumeric()).next()?;
        let (header, body) = rest.split_once('{')?;
        let body = body.split("\n}").next()?;
        let is_field =
            |line: &&str| line.starts_with("    ") && !line.starts_with("     ") && line.contains(": ");
        (!header.contains(';')).then(|| (name, body.lines().filter(is_field).count()))
    })
}

#[test]
fn hub_imports_follow_the_table() {
    check("src", HUB);
}

#[test]
fn agent_imports_follow_the_table() {
    check("../agent/src", AGENT);
    check_sizes("../agent/src");
}

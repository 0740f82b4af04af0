//! Which crate may depend on which, and inside the engine which module may use which.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use quire_tests::{complain, files, is_test_file, root, without_tests};

/// Our crates by folder, each with those of ours that it may depend on. All that is allowed is listed: who needs another edge has to
/// say so here.
fn allowed_crates() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("ann-index", &[][..]),
        ("chunk-cache", &[]),
        ("engine", &["ann-index"]),
        ("eval", &["ann-index", "chunk-cache", "engine"]),
        (
            "eval/bench",
            &["ann-index", "chunk-cache", "documents", "engine", "eval", "http-api", "quire", "service", "settings"],
        ),
        ("server", &["chunk-cache", "ann-index", "documents", "engine", "http-api", "hub", "service", "settings"]),
        ("server/documents", &[]),
        ("server/http", &["documents", "engine", "service", "settings"]),
        ("server/hub", &["engine"]),
        ("server/service", &["chunk-cache", "documents", "engine", "settings"]),
        ("server/settings", &["ann-index", "chunk-cache", "documents", "engine", "hub"]),
    ])
}

/// The words between quotation marks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('"').skip(1).step_by(2).collect()
}

#[test]
fn crates_depend_in_one_direction() {
    let workspace = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = workspace.lines().find_map(|line| line.strip_prefix("members = ")).unwrap();
    let manifests: Vec<(&str, String)> = quoted(members)
        .into_iter()
        // It tests all of them, and nothing depends on it.
        .filter(|folder| *folder != "tests")
        .map(|folder| (folder, std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap()))
        .collect();
    let name = |manifest: &str| {
        manifest.lines().find_map(|l| l.strip_prefix("name = ").map(|n| n.trim_matches('"').to_string()))
    };
    let ours: BTreeSet<String> = manifests.iter().map(|(_, manifest)| name(manifest).unwrap()).collect();
    let allowed = allowed_crates();
    let mut offences = Vec::new();
    for (folder, manifest) in &manifests {
        let Some(allowed) = allowed.get(folder) else {
            offences.push(format!("{folder} is in no row of the table"));
            continue;
        };
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap();
        let used: BTreeSet<&str> = dependencies
            .lines()
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .filter(|name| ours.contains(*name))
            .collect();
        offences.extend(used.iter().filter(|name| !allowed.contains(name)).map(|name| format!("{folder} -> {name}")));
        offences.extend(
            allowed.iter().filter(|name| !used.contains(*name)).map(|name| format!("{folder} no longer needs {name}")),
        );
    }
    complain(&offences, "edges between crates that the table does not have, or no longer needs");
}

/// Modules of the engine from the bottom up: each uses those of its own layer and of layers that stand before it here. A module
/// that is not named belongs to the one that contains it.
const LAYERS: &[&[&str]] = &[
    // Words that everything uses, and plain decisions without tensors.
    &["error", "memory", "stop", "unwind", "divergence", "prefix_cache", "scheduler"],
    // What a model's folder says.
    &["weights", "sampler", "model/spec", "model/config", "model/generation", "model/rope"],
    // Arithmetic on the CPU.
    &["backend/cpu", "backend/cores"],
    // What KV is made of.
    &["kv", "kv/page", "kv/dense", "numerics"],
    // Exact attention over it.
    &["attention", "attention/state", "attention/dense", "attention/paid", "attention/within"],
    // What is set, and what is said.
    &["config", "tokenizer", "chat"],
    // Attention over cold tokens.
    &["attention/cold"],
    // Whose KV it is, and where.
    &["kv/sequence", "kv/building", "kv/prefix", "kv/device"],
    // The forward pass.
    &["model", "model/layer", "model/transformer"],
    // What is asked of it.
    &["chunk", "tiers", "request", "logprobs", "answer_text"],
    &["blend"],
    // The same on a GPU, which fuses all of the above.
    &["backend", "backend/cuda"],
    // Many requests.
    &["sequence", "job", "runner"],
    &["engine"],
];

/// Uses against the layers, as (who, whom). This list only becomes shorter.
const AGAINST_THE_LAYERS: &[(&str, &str)] = &[
    // Two backends are cut where whole passes are called: the transformer and the stages of blending choose by an enum.
    ("blend", "backend/cuda"),
    ("config", "backend/cuda"),
    ("kv/device", "backend/cuda"),
    ("model/transformer", "backend/cuda"),
    // Memory of the GPU's, as `kv/device` has it.
    ("tiers", "backend/cuda"),
    // `SequenceKv` and what it is made of take the model's shape.
    ("kv/building", "model/transformer"),
    ("kv/prefix", "model/transformer"),
    ("kv/sequence", "model/transformer"),
];

/// The layer of a module, and the name in the table that says so.
fn layer(module: &str) -> Option<(usize, &'static str)> {
    let mut name = module;
    loop {
        let found =
            LAYERS.iter().enumerate().find_map(|(at, layer)| Some((at, *layer.iter().find(|known| **known == name)?)));
        match (found, name.rsplit_once('/')) {
            (Some(found), _) => return Some(found),
            (None, Some((parent, _))) => name = parent,
            (None, None) => return None,
        }
    }
}

/// The modules that a file names by `crate::` or `super::`, as far as paths go; `module` is its own.
fn named_modules(module: &str, text: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    let code = text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            // `super::super::` is read from its first word.
            if code[..at].ends_with("::") || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let path: String =
                code[at..].chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect();
            let mut base: Vec<&str> = module.split('/').collect();
            let mut words = path.split("::").peekable();
            if words.next_if_eq(&"crate").is_some() {
                base.clear();
            }
            while words.next_if_eq(&"super").is_some() {
                base.pop();
            }
            base.extend(words.filter(|word| !word.is_empty()));
            named.insert(base.join("/"));
        }
    }
    named
}

#[test]
fn modules_of_the_engine_use_what_lies_below_them() {
    let mut offences = Vec::new();
    let mut against = BTreeSet::new();
    for (path, text) in files("engine/src", ".rs") {
        let module = path.strip_prefix("engine/src/").unwrap().trim_end_matches(".rs").trim_end_matches("/mod");
        if is_test_file(&path) || path.ends_with("parity.rs") || path.contains("/parity/") || module == "lib" {
            continue;
        }
        let Some((own, who)) = layer(module) else {
            offences.push(format!("{path} is in no layer"));
            continue;
        };
        for named in named_modules(module, without_tests(&text)) {
            let Some((other, whom)) = layer(&named) else { continue };
            if other > own && !against.contains(&(who, whom)) {
                against.insert((who, whom));
                if !AGAINST_THE_LAYERS.contains(&(who, whom)) {
                    offences.push(format!("{path}: {who} uses {whom}"));
                }
            }
        }
    }
    let mended = AGAINST_THE_LAYERS.iter().filter(|edge| !against.contains(edge));
    offences.extend(mended.map(|(who, whom)| format!("{who} no longer uses {whom}: take it out of the list")));
    complain(&offences, "uses against the layers of the engine");
}

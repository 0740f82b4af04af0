//! What a machine can check of the house rules.

#![allow(clippy::unwrap_used)]

use quire_tests::{complain, files, is_test_file, root, without_tests};

/// Lines of a Rust file without its tests, at most.
const FILE_LINES: usize = 600;

fn rust_sources() -> Vec<(String, String)> {
    ["ann-index/src", "chunk-cache/src", "engine/src", "eval/src", "eval/bench/src", "server"]
        .iter()
        .flat_map(|dir| files(dir, ".rs"))
        .collect()
}

#[test]
fn files_are_short() {
    let long = rust_sources().into_iter().filter(|(path, _)| !is_test_file(path)).filter_map(|(path, text)| {
        let lines = without_tests(&text).lines().count();
        (lines > FILE_LINES).then(|| format!("{path}: {lines} lines"))
    });
    complain(&long.collect::<Vec<_>>(), "files of more than 600 lines without tests");
}

#[test]
fn the_environment_is_read_in_one_file() {
    let reads = rust_sources().into_iter().filter(|(path, text)| {
        path != "server/settings/src/config.rs" && !is_test_file(path) && without_tests(text).contains("env::var")
    });
    complain(&reads.map(|(path, _)| path).collect::<Vec<_>>(), "files that read the environment");
}

/// The kind `ivf` is there or not: faiss is C++ of minutes, and nothing that a machine has at run time.
const FEATURE_SWITCH: &str = "ann-index/src/ivf.rs";

#[test]
fn no_feature_switches_but_one() {
    let mut offences = Vec::new();
    for (path, text) in rust_sources() {
        for (i, line) in text.lines().enumerate() {
            let switch = line.contains("cfg") && line.contains("feature = ");
            if switch && path != FEATURE_SWITCH {
                offences.push(format!("{path}:{}", i + 1));
            }
        }
    }
    complain(&offences, "cfg(feature): what a machine has is found at run time");
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut offences = Vec::new();
    for (path, text) in rust_sources() {
        let excused = text.contains("// SAFETY (all blocks of this impl)") || text.contains("// SAFETY (both impls)");
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            let block = code.contains("unsafe {") || code.contains("unsafe impl");
            let reasoned = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY"));
            if block && !reasoned && !excused {
                offences.push(format!("{path}:{}", i + 1));
            }
        }
    }
    complain(&offences, "unsafe without a SAFETY comment");
}

#[test]
fn every_kernel_names_its_cpu_operation() {
    let unnamed = files("engine/kernels", ".cu").into_iter().filter(|(_, text)| {
        let mut comment = text.lines().take_while(|line| line.starts_with("//"));
        !comment.any(|line| line.starts_with("// CPU: "))
    });
    complain(
        &unnamed.map(|(path, _)| path).collect::<Vec<_>>(),
        "kernels whose top comment has no line \"// CPU: <operation>\"",
    );
}

#[test]
fn every_kernel_is_compared_with_the_cpu() {
    let suite = std::fs::read_to_string(root().join("engine/src/backend/cuda/parity.rs")).unwrap();
    let named = |path: &str| path.rsplit('/').next().is_some_and(|name| suite.contains(name));
    let absent = files("engine/kernels", ".cu").into_iter().map(|(path, _)| path).filter(|path| !named(path));
    complain(&absent.collect::<Vec<_>>(), "kernels that the parity suite does not name");
}

#[test]
fn nothing_is_left_unfinished() {
    let marks = [concat!("todo", "!("), concat!("unimple", "mented!("), concat!("FIX", "ME"), concat!("#[ign", "ore")];
    let mut offences = Vec::new();
    for (path, text) in rust_sources().into_iter().chain(files("tests/tests", ".rs")) {
        // Tests for machines that not everybody has are asked for by name, and then fail where the machine lacks.
        let excused = ["a GPU", "NVRTC"].map(|what| format!("{} = \"needs {what}\"]", marks[3]));
        let text = excused.iter().fold(text, |text, excused| text.replace(excused, ""));
        for mark in marks {
            if text.contains(mark) {
                offences.push(format!("{path}: {mark}"));
            }
        }
    }
    complain(&offences, "placeholders and switched-off tests");
}

#[test]
fn paths_named_in_the_architecture_exist() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let quoted = text.split('`').skip(1).step_by(2);
    let missing = quoted.filter(|q| q.contains('/') && !q.contains([' ', '<', '{', '*', ':']) && !q.starts_with('/'));
    let missing = missing.filter(|q| !root().join(q).exists()).map(ToString::to_string);
    complain(&missing.collect::<Vec<_>>(), "paths in ARCHITECTURE.md that do not exist");
}

#[test]
fn the_repository_stays_small_enough_to_travel() {
    let listed = std::process::Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    let sizes = listed.stdout.split(|b| *b == 0).filter(|p| !p.is_empty()).filter_map(|path| {
        std::fs::metadata(root().join(String::from_utf8_lossy(path).as_ref())).ok().map(|m| m.len())
    });
    let total: u64 = sizes.sum();
    assert!(total < 30 << 20, "tracked files come to {total} bytes; 30 MiB is the limit");
}

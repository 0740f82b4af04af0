//! What the README says of the program holds: its commands are taken, its settings and routes are there, its files exist.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use quire::cli::parse;
use quire_bench::check;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn readme() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

/// The words of a shell's line, quotes taken off, up to a comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '#' if !quoted && word.is_none() => break,
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn its_commands_are_taken() {
    let text = readme();
    let commands = |program: &str| text.lines().filter(|line| line.starts_with(program)).collect::<Vec<&str>>();
    let (quire, bench) = (commands("quire "), commands("quire-bench "));
    assert!(quire.len() > 10 && bench.len() > 10, "{} and {}", quire.len(), bench.len());
    let taken = quire.iter().map(|line| (line, parse(words(line).into_iter().map(Into::into)).map(|_| ())));
    let taken = taken.chain(bench.iter().map(|line| (line, check(words(line).into_iter().map(Into::into)))));
    for (command, outcome) in taken {
        if let Err(error) = outcome {
            panic!("{command}\n{error}");
        }
    }
}

#[test]
fn its_flags_are_flags_of_some_command() {
    let text = readme();
    let help: String = ["serve", "ask", "chat", "ingest", "rm", "cache evict", "cache verify", "config show"]
        .iter()
        .map(|command| {
            let words = std::iter::once("quire").chain(command.split(' ')).chain(["--help"]);
            parse(words.map(Into::into)).unwrap_err().to_string()
        })
        .collect();
    // Of cargo, pip and the server's own flags.
    let others = ["--release", "--features", "--skip", "--lib", "--test", "--ignored"];
    let mut missing = Vec::new();
    for flag in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(|word| word.starts_with("--")) {
        let known = help.contains(flag) || help.contains(&flag.replacen("--no-", "--", 1)) || others.contains(&flag);
        // Flags of benches stand in their commands, which are parsed above.
        let of_bench = text.lines().any(|line| line.starts_with("quire-bench ") && line.contains(flag));
        let is_rule = flag.trim_matches('-').is_empty();
        if !known && !of_bench && !is_rule {
            missing.push(flag);
        }
    }
    assert!(missing.is_empty(), "no command knows {missing:?}");
}

#[test]
fn its_links_lead_to_files() {
    for file in ["README.md", "ARCHITECTURE.md"] {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap();
            let local = !target.is_empty() && !target.contains("://");
            assert!(!local || root().join(target).exists(), "{file} links to {target}");
        }
    }
}

/// The decode strategies and indexes that are told of are those that can be chosen, and none more.
#[test]
fn its_table_of_settings_names_what_can_be_chosen() {
    let text = readme();
    let row = |name: &str| {
        let row = text.lines().find(|line| line.starts_with(&format!("| {name} |"))).unwrap();
        let values = row.split('|').nth(2).unwrap();
        values.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<String>>()
    };
    let chosen = |flag: &str, value: &str| parse(["quire", "ask", flag, value, "Who?"].map(Into::into)).is_ok();
    for (name, flag) in [("blend mode", "--blend"), ("strategy", "--strategy"), ("index", "--index")] {
        let values = row(name);
        assert!(values.len() >= 3);
        for value in values {
            assert!(chosen(flag, &value), "{flag} {value}");
        }
        assert!(!chosen(flag, "nonsense"), "{flag} takes anything");
    }
}

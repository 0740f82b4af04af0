//! From words to a parsed command line: settings are flags of every command, and help shows those that it uses.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};

use super::args::Cli;
use super::unused;
use settings::{SETTINGS, Setting, setting};

/// Settings with a short flag. The short help shows these, where they are used.
const SHORT: &[(&str, char)] = &[("model", 'm'), ("collection", 'c'), ("data_dir", 'd'), ("port", 'p')];

/// The grammar of `quire`, with everything that help shows.
pub(super) fn command() -> Command {
    grammar::<Cli>(str::to_string)
}

/// The grammar of a program that takes settings as flags, with everything that help shows. `setting_name` says what the table
/// of settings calls the command with these words.
#[must_use]
pub fn grammar<C: CommandFactory>(setting_name: fn(&str) -> String) -> Command {
    let mut root = C::command();
    for (key, short) in SHORT {
        root = root.mut_arg(key, |arg| arg.short(*short).hide_short_help(false));
    }
    for setting in SETTINGS.iter().filter(|setting| setting.switch) {
        root = root.mut_arg(setting.key, as_switch);
        let on = root.get_arguments().find(|arg| arg.get_id() == setting.key).cloned();
        root = root.args(on.map(|on| negative(&on, setting)));
    }
    let settings: Vec<Arg> = root.get_arguments().filter(|arg| of_setting(arg).is_some()).cloned().collect();
    // What the commands show, the root need not repeat.
    root = root.mut_args(|arg| if of_setting(&arg).is_some() { arg.hide(true) } else { arg });
    show_used(root, "", setting_name, &settings)
}

/// Parses a command line of `quire`, the program's name first.
///
/// # Errors
/// Wrong usage (also of a setting that the command does not use), help and version, as clap tells them.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    parse_as(words, str::to_string).map_err(name_the_measuring_program)
}

/// Parses a command line of the program with this [`grammar`], the program's name first.
///
/// # Errors
/// Wrong usage (also of a setting that the command does not use), help and version, as clap tells them.
pub fn parse_as<C: CommandFactory + FromArgMatches>(
    words: impl IntoIterator<Item = OsString>,
    setting_name: fn(&str) -> String,
) -> Result<C, clap::Error> {
    let mut grammar = grammar::<C>(setting_name);
    let matches = grammar.try_get_matches_from_mut(with_values(words))?;
    unused::refuse(&mut grammar, setting_name, &matches)?;
    C::from_arg_matches(&matches)
}

/// `bench` and `eval` were commands of `quire` and are those of another program, which has to be told.
fn name_the_measuring_program(error: clap::Error) -> clap::Error {
    let now = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(word)) if word == "bench" => "`quire-bench COMMAND` instead of `quire bench COMMAND`",
        Some(ContextValue::String(word)) if word == "eval" => "`quire-bench eval` instead of `quire eval`",
        _ => return error,
    };
    let message = format!(
        "measuring is done by another program, with the same arguments: run {now}. If you do not have it, build it in the \
         source tree: cargo build --release -p quire-bench"
    );
    command().error(ErrorKind::InvalidSubcommand, message)
}

/// `--prefix-cache`, also with a value.
fn as_switch(arg: Arg) -> Arg {
    arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("true|false")
}

/// `--no-prefix-cache`, for help and completions: [`with_values`] has it rewritten before it is parsed.
fn negative(on: &Arg, setting: &Setting) -> Arg {
    let flag = setting.key.replace('_', "-");
    let heading = on.get_help_heading().unwrap_or_default().to_string();
    Arg::new(format!("no_{}", setting.key))
        .long(format!("no-{flag}"))
        .help(format!("The same as --{flag}=false"))
        .help_heading(heading)
        .hide_short_help(true)
        .global(true)
        .action(ArgAction::SetTrue)
}

/// The setting that a flag sets.
fn of_setting(arg: &Arg) -> Option<&'static Setting> {
    let id = arg.get_id().as_str();
    setting(id).or_else(|| id.strip_prefix("no_").and_then(setting).filter(|setting| setting.switch))
}

/// Gives every subcommand the settings as its own flags, visible where it uses them.
fn show_used(command: Command, path: &str, setting_name: fn(&str) -> String, settings: &[Arg]) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
    names.into_iter().fold(command, |command, name| {
        let path = format!("{path} {name}").trim_start().to_string();
        command.mut_subcommand(name, |sub| {
            let group = sub.has_subcommands();
            let shown =
                |arg: &Arg| !group && of_setting(arg).is_some_and(|setting| setting.is_used_by(&setting_name(&path)));
            // A flag of its own comes before a setting of the same name, which keeps a place of its own: else the root's would be
            // handed down beside it.
            let taken: Vec<String> = sub.get_arguments().filter_map(|own| own.get_long()).map(str::to_string).collect();
            let beside = |arg: &Arg| match arg.get_long().filter(|long| taken.iter().any(|own| own == long)) {
                Some(long) => arg.clone().long(format!("{long}-setting")).hide(true),
                None => arg.clone().hide(!shown(arg)),
            };
            let own: Vec<Arg> = settings.iter().map(beside).collect();
            show_used(sub.args(own), &path, setting_name, settings)
        })
    })
}

/// The words with every switch in one piece: `--no-key` and `--key false` become `--key=false`, so that what follows
/// a bare `--key` is never taken for its value, unless it is `true` or `false`.
fn with_values(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let is_switch = |flag: &str| setting(&flag.replace('-', "_")).is_some_and(|setting| setting.switch);
    let mut words = words.into_iter().peekable();
    let mut out = Vec::new();
    while let Some(word) = words.next() {
        if word == "--" {
            out.push(word);
            out.extend(words);
            return out;
        }
        let flag = word.to_str().and_then(|text| text.strip_prefix("--"));
        match flag {
            Some(flag) if flag.strip_prefix("no-").is_some_and(is_switch) => {
                out.push(format!("--{}=false", &flag[3..]).into());
            }
            Some(flag) if is_switch(flag) => match words.next_if(|next| next == "true" || next == "false") {
                Some(value) => out.push(format!("--{flag}={}", value.to_string_lossy()).into()),
                None => out.push(word),
            },
            _ => out.push(word),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::args::Command as Quire;
    use super::*;

    fn words(line: &str) -> Result<Cli, clap::Error> {
        parse(line.split(' ').map(OsString::from))
    }

    fn help(line: &str) -> String {
        words(line).unwrap_err().to_string()
    }

    #[test]
    fn the_grammar_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn help_shows_what_a_command_uses() {
        let ask = help("quire ask --help");
        assert!(ask.contains("--top-chunks") && ask.contains("--temperature") && !ask.contains("--host <"), "{ask}");
        assert!(ask.contains("--no-prefix-cache"), "{ask}");
        let search = help("quire search --help");
        assert!(search.contains("--top-chunks") && search.contains("--data-dir"), "{search}");
        assert!(!search.contains("--temperature") && !search.contains("--prefix-cache"), "{search}");
        assert!(!help("quire pull --help").contains("--top-chunks"));
        assert!(!help("quire --help").contains("--temperature") && help("quire serve --help").contains("--host <"));
    }

    #[test]
    fn short_help_is_short_and_names_the_short_flags() {
        for line in ["quire ask -h", "quire search -h", "quire -h", "quire serve -h"] {
            let text = help(line);
            assert!(text.lines().count() < 40, "{line}: {text}");
        }
        let ask = help("quire ask -h");
        assert!(
            ask.contains("-c, --collection") && ask.contains("-m, --model") && !ask.contains("--top-chunks"),
            "{ask}"
        );
    }

    #[test]
    fn every_setting_names_commands_that_there_are() {
        let root = command();
        // Those of `quire-bench` are looked at there.
        let known: Vec<&str> = root.get_subcommands().map(Command::get_name).chain(["bench", "eval"]).collect();
        for setting in SETTINGS {
            for name in setting.commands {
                assert!(known.contains(&name.split(' ').next().unwrap()), "{}: {name}", setting.key);
            }
        }
    }

    #[test]
    fn switches_are_written_in_every_usual_way() {
        let value = |line: &str| words(line).unwrap().common.settings.prefix_cache;
        for on in ["quire serve --prefix-cache", "quire --prefix-cache serve", "quire serve --prefix-cache=true"] {
            assert_eq!(value(on), Some(true), "{on}");
        }
        for off in [
            "quire serve --no-prefix-cache",
            "quire --no-prefix-cache serve",
            "quire --prefix-cache false serve",
            "quire serve --prefix-cache=false",
        ] {
            assert_eq!(value(off), Some(false), "{off}");
        }
        assert_eq!(value("quire serve"), None);
        assert!(words("quire serve --prefix-cache=maybe").is_err());
        let cli = words("quire ask --fast-prefill why").unwrap();
        assert!(matches!(cli.command, Quire::Ask { question, .. } if question == ["why"]));
        let cli = words("quire search -- --no-prefix-cache").unwrap();
        assert!(matches!(cli.command, Quire::Search { query } if query == ["--no-prefix-cache"]));
    }

    #[test]
    fn who_measures_by_habit_is_sent_to_the_other_program() {
        for line in ["quire bench decode --batch 1", "quire --json bench", "quire eval --limit 3 -m x"] {
            let error = words(line).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("run `quire-bench "), "{line}: {error}");
        }
        assert!(!words("quire benhc").unwrap_err().to_string().contains("quire-bench"));
    }

    #[test]
    fn several_words_are_one_question() {
        let cli = words("quire search -c notes spare key -j").unwrap();
        assert!(cli.common.json && cli.common.settings.collection.as_deref() == Some("notes"));
        assert!(matches!(cli.command, Quire::Search { query } if query == ["spare", "key"]));
        assert_eq!(words("quire search").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn sizes_have_units() {
        let cli = words("quire serve --cache-bytes 1.5GiB --kv-budget-bytes 512M").unwrap();
        assert_eq!(cli.common.settings.cache_bytes.unwrap().0, 3 << 29);
        let error = words("quire serve --cache-bytes 8X").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("8G or 1.5GiB"), "{error}");
    }
}

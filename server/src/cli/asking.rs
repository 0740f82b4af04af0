//! Commands that are executed where the data folder is owned: by a running server, or here. What is printed is the same.

use indicatif::ProgressBar;

use super::output::Out;
use service::control::{Cancel, Command, Event, Link, Need};
use settings::{Config, Result};

/// Has a command executed to its end. `name`: how the user called it, as in help; `on_event` prints what happens.
///
/// # Errors
/// What the command failed with.
pub(super) fn run(
    config: &Config,
    name: &str,
    command: &Command,
    out: &Out,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let link = open(config, name, command.need(), out)?;
    let outcome = hear(&link, command, out, on_event);
    link.close();
    outcome
}

/// Finds the server of the data folder, or opens here what commands of this `need` want.
///
/// # Errors
/// See [`Link::open`].
pub(super) fn open(config: &Config, name: &str, need: Need, out: &Out) -> Result<Link> {
    let loads = !matches!(need, Need::Look | Need::Write);
    let spinner = loads.then(|| out.spinner("loading the model")).flatten();
    let link = Link::open(config, name, need, &mut |note| out.note(note));
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    link
}

/// Has a command executed; remarks are printed here, everything else is left to `on_event`.
///
/// # Errors
/// What the command failed with.
pub(super) fn hear(link: &Link, command: &Command, out: &Out, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    let mut aside = Aside::new(out);
    let outcome = link.run(command, &Cancel::never(), &mut |event| {
        if let Some(event) = aside.hear(event) {
            on_event(event);
        }
    });
    aside.clear();
    outcome
}

/// What is said beside the results of a command.
pub(super) struct Aside<'a> {
    out: &'a Out,
    spinner: Option<ProgressBar>,
}

impl<'a> Aside<'a> {
    pub(super) fn new(out: &'a Out) -> Aside<'a> {
        Aside { out, spinner: None }
    }

    /// Says what is to be said beside the results, and gives back everything else.
    pub(super) fn hear(&mut self, event: Event) -> Option<Event> {
        self.clear();
        match event {
            Event::Loading => self.spinner = self.out.spinner("the running server is loading the model"),
            Event::Note(note) => self.out.note(&note),
            event => return Some(event),
        }
        None
    }

    /// Takes the sign of life off the terminal.
    pub(super) fn clear(&mut self) {
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}

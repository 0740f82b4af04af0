//! Where a command of the command line is executed: by the server that has the data folder, or in this process.

use std::path::Path;

use super::cancel::Cancel;
use super::command::{Command, Need};
use super::event::Event;
use super::execute::execute;
use super::holder;
use super::host::Host;
use super::owned;
use super::remote::Remote;
use settings::{Config, QuireError, Result};

/// Who executes commands.
pub enum Link {
    /// A running server.
    Server(Box<Remote>),
    /// This process.
    Alone(Box<Host>),
}

impl Link {
    /// Finds the server of the data folder, or opens here what commands of this `need` want. `command` is how the user
    /// called it; `on_note` is told what the user should know.
    ///
    /// # Errors
    /// A server that has the folder and cannot be asked, where nothing can be done beside it; settings that the server
    /// does not have; what keeps model and folder from being opened.
    pub fn open(config: &Config, command: &str, need: Need, on_note: &mut dyn FnMut(&str)) -> Result<Link> {
        let settings = &config.settings;
        let alone = |need| Ok(Link::Alone(Box::new(Host::alone(settings, need)?)));
        let Some(holder) = holder::find(&settings.data_dir)? else { return alone(need) };
        let beside = matches!(need, Need::Look | Need::Model);
        if !settings.server {
            return match beside {
                true => alone(need),
                false => Err(holder::in_use(
                    &settings.data_dir,
                    &holder,
                    "--no-server keeps it from being asked; leave that out".into(),
                )),
            };
        }
        let met = Remote::meet(&settings.data_dir, holder).and_then(|remote| {
            owned::check(config, command, &remote, on_note)?;
            Ok(remote)
        });
        match met {
            Ok(remote) => Ok(Link::Server(Box::new(remote))),
            // Another model than the server's needs nothing of the folder.
            Err(QuireError::Config { .. }) if need == Need::Model => alone(need),
            Err(error) if beside => {
                on_note(&format!("{}; this is done without it", error.full_message()));
                alone(need)
            }
            Err(error) => Err(error),
        }
    }

    /// Executes a command. What it needs must have been asked of [`open`](Self::open).
    ///
    /// # Errors
    /// What the command failed with.
    pub fn run(&self, command: &Command, cancel: &Cancel, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        match self {
            Link::Server(remote) => remote.run(command, cancel, on_event),
            Link::Alone(host) => execute(host, command, cancel, on_event),
        }
    }

    /// Whether a server executes.
    #[must_use]
    pub fn is_server(&self) -> bool {
        matches!(self, Link::Server(_))
    }

    /// Ends what was opened here.
    pub fn close(&self) {
        if let Link::Alone(host) = self {
            host.close();
        }
    }
}

/// The server of a data folder, as `quire doctor` shows it: nobody, who it is, or why it cannot be asked.
#[must_use]
pub fn look(data_dir: &Path) -> Option<Result<Remote>> {
    match holder::find(data_dir) {
        Ok(None) => None,
        Ok(Some(holder)) => Some(Remote::meet(data_dir, holder)),
        Err(error) => Some(Err(error)),
    }
}

//! Giving a command up: whoever asked tells whoever works.

use tokio::sync::watch;

/// Gives a command up. Dropping it gives nothing up.
#[derive(Debug)]
pub struct Canceller(watch::Sender<bool>);

impl Canceller {
    /// Nobody waits for the command any more.
    pub fn cancel(&self) {
        let _ = self.0.send(true);
    }
}

/// Whether a command was given up, as those see it who work for it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cancel(watch::Receiver<bool>);

impl Cancel {
    /// Both ends.
    #[must_use]
    pub fn new() -> (Canceller, Cancel) {
        let (sender, receiver) = watch::channel(false);
        (Canceller(sender), Cancel(receiver))
    }

    /// For a command that is never given up: it ends with its process.
    #[must_use]
    pub fn never() -> Cancel {
        Cancel::new().1
    }

    /// Whether it was given up.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it is given up.
    pub async fn cancelled(&self) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|cancelled| *cancelled).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

//! What commands are executed on, by the side that owns the data folder.

use std::path::Path;
use std::sync::Arc;

use chunk_cache::{Access, ChunkStore, StoreError};
use documents::{Found, Library, data_dir};
use engine::Engine;

use super::command::{Command, Need, Retrieval, WriteAccess};
use crate::metrics::Metrics;
use crate::store::store_dir;
use crate::{DocumentsCommand, DocumentsEvent, Purpose, Service, manage_documents};
use settings::{QuireError, Result, Settings};

/// What is open, with the settings of whoever opened it.
pub struct Host {
    settings: Settings,
    open: Open,
}

/// What commands find.
enum Open {
    /// The folder; what is needed of it is opened by each command.
    Folder,
    /// The model alone.
    Model { engine: Engine, metrics: Arc<Metrics> },
    /// Everything.
    Service(Arc<Service>),
}

/// A chunk store that a command works on.
pub(super) enum Chunks {
    /// Of a service, which others use meanwhile.
    Shared(Arc<ChunkStore>),
    /// Opened for this command.
    Own(Box<ChunkStore>),
}

impl std::ops::Deref for Chunks {
    type Target = ChunkStore;
    fn deref(&self) -> &ChunkStore {
        match self {
            Chunks::Shared(store) => store,
            Chunks::Own(store) => store,
        }
    }
}

impl Host {
    /// Opens in this process what commands of this `need` want. `collection` is looked for before the model is loaded:
    /// that it is missing is the commoner mistake.
    ///
    /// # Errors
    /// Everything that can be wrong with the model, the data folder or the store, each named.
    pub fn alone(settings: &Settings, need: Need) -> Result<Host> {
        let open = match need {
            Need::Purge if store_dir(&settings.data_dir).is_dir() => {
                data_dir::check(&settings.data_dir)?;
                Open::Service(Arc::new(Service::open(settings, Purpose::Ask)?))
            }
            Need::Look | Need::Write | Need::Purge => {
                data_dir::check(&settings.data_dir)?;
                Open::Folder
            }
            Need::Model => {
                let config = settings.engine()?;
                let name = settings.served_name(&config.model_dir);
                let metrics = Arc::new(Metrics::new(&settings.metrics_prefix, &name));
                Open::Model { engine: Engine::load(config)?, metrics }
            }
            Need::Answers => {
                data_dir::check(&settings.data_dir)?;
                Library::new(&settings.data_dir).collection(&settings.collection)?;
                Open::Service(Arc::new(Service::open(settings, Purpose::Ask)?))
            }
            Need::Ingest => Open::Service(Arc::new(Service::open(settings, Purpose::Ingest)?)),
        };
        Ok(Host { settings: settings.clone(), open })
    }

    /// A running server's.
    #[must_use]
    pub fn serving(settings: &Settings, service: Arc<Service>) -> Host {
        Host { settings: settings.clone(), open: Open::Service(service) }
    }

    /// What a command writes of documents; `None`: nothing.
    ///
    /// # Errors
    /// A catalog that cannot be read.
    pub fn write_access(&self, command: &Command) -> Result<Option<WriteAccess>> {
        command.write_access(|name| {
            let catalog = self.service()?.library().catalog()?;
            let info = catalog.map(|catalog| catalog.collection(name)).transpose()?.flatten();
            Ok(info.map(|info| info.language))
        })
    }

    /// Ends what was opened in this process.
    pub fn close(&self) {
        match &self.open {
            Open::Folder => {}
            Open::Model { engine, .. } => engine.shutdown(),
            Open::Service(service) => service.engine().shutdown(),
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn service(&self) -> Result<&Service> {
        match &self.open {
            Open::Service(service) => Ok(service),
            Open::Folder | Open::Model { .. } => Err(not_open("the data folder with its model")),
        }
    }

    /// Who answers without documents.
    pub(super) fn model(&self) -> Result<(&Engine, &Arc<Metrics>)> {
        match &self.open {
            Open::Model { engine, metrics } => Ok((engine, metrics)),
            Open::Service(service) => Ok((service.engine(), service.metrics())),
            Open::Folder => Err(not_open("the model")),
        }
    }

    pub(super) fn search(&self, passages: &Retrieval, query: &str) -> Result<Vec<Found>> {
        let (collection, limit) = (&passages.collection, passages.top_chunks);
        match &self.open {
            Open::Service(service) => service.search(collection, query, limit),
            _ => Ok(Library::new(&self.settings.data_dir).search(collection, query, limit)?),
        }
    }

    pub(super) fn manage_documents(
        &self,
        command: &DocumentsCommand,
        on_event: &mut dyn FnMut(DocumentsEvent),
    ) -> Result<()> {
        match &self.open {
            Open::Service(service) => service.manage_documents(command, on_event),
            _ => manage_documents(&Library::new(&self.settings.data_dir), command, &|| Ok(0), on_event),
        }
    }

    /// Does something with the library that commands work on.
    pub(super) fn with_library<T>(&self, work: impl FnOnce(&Library) -> documents::Result<T>) -> Result<T> {
        match &self.open {
            Open::Service(service) => {
                let done = work(service.library())?;
                service.release_chunks()?;
                Ok(done)
            }
            _ => Ok(work(&Library::new(self.data_dir()))?),
        }
    }

    pub(super) fn data_dir(&self) -> &Path {
        &self.settings.data_dir
    }

    /// The chunk store; `None` where there is none.
    pub(super) fn chunks(&self, access: Access) -> Result<Option<Chunks>> {
        if let Open::Service(service) = &self.open {
            if access == Access::Write {
                service.store().mend();
            }
            return Ok(service.store().chunks().map(Chunks::Shared));
        }
        let opened = ChunkStore::open_existing(&self.chunks_dir(), access, self.settings.store_bytes())?;
        if let Some(store) = &opened {
            store.set_policy(self.settings.cache_policy.0);
        }
        Ok(opened.map(|store| Chunks::Own(Box::new(store))))
    }

    pub(super) fn chunks_dir(&self) -> std::path::PathBuf {
        store_dir(&self.settings.data_dir)
    }

    /// Whether another process has the chunk store open.
    pub(super) fn has_others(&self, dir: &Path) -> Result<bool> {
        match &self.open {
            Open::Service(_) => Ok(false),
            _ => Ok(ChunkStore::is_in_use(dir)?),
        }
    }

    pub(super) fn is_serving(&self) -> bool {
        matches!(self.open, Open::Service(_))
    }

    /// Removes all chunks, also where the disk is full, and whatever model they are of.
    pub(super) fn clear_chunks(&self) -> Result<u64> {
        if let Open::Service(service) = &self.open {
            return service.store().clear();
        }
        let dir = self.chunks_dir();
        Ok(if dir.is_dir() { ChunkStore::clear(&dir)? } else { 0 })
    }

    /// The error of a store that others have open.
    pub(super) fn locked(dir: &Path) -> QuireError {
        StoreError::Locked { path: dir.into() }.into()
    }
}

fn not_open(what: &str) -> QuireError {
    QuireError::Internal(format!("a command needs {what}, which is not open"))
}

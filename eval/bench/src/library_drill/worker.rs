//! The process that works on a library until it is killed. What it prints are its acknowledgements.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::COLLECTION;
use super::world::{Step, World, marker, text};
use crate::crash::Random;
use crate::error::Result;
use service::{DocumentName, DocumentsCommand, IngestEvent, IngestOptions, Purpose, Service};
use settings::{QuireError, Settings};

/// What the worker is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Orders {
    /// Where the documents' files lie, which are those of `world`.
    pub(super) documents: PathBuf,
    pub(super) world: World,
    pub(super) seed: u64,
    pub(super) steps: usize,
}

/// A line of the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line {
    /// The library is open.
    Ready,
    /// A step begins.
    Begin(Step),
    /// This chunk is stored.
    Chunk(String),
    /// The step is done.
    Done,
}

fn say(line: &Line) -> Result<()> {
    let text = serde_json::to_string(line).map_err(|e| QuireError::Internal(e.to_string()))?;
    let mut out = std::io::stdout().lock();
    let said = writeln!(out, "{text}").and_then(|()| out.flush());
    Ok(said.map_err(|source| QuireError::Io { action: "write", path: "standard output".into(), source })?)
}

/// Works as the file of orders says.
pub(crate) fn work(settings: &Settings, orders: &Path) -> Result<()> {
    let read =
        std::fs::read(orders).map_err(|source| QuireError::Io { action: "read", path: orders.into(), source })?;
    let orders: Orders = serde_json::from_slice(&read).map_err(|e| QuireError::Internal(e.to_string()))?;
    let service = Service::open(settings, Purpose::Ingest)?;
    service.library().collection_or_new(COLLECTION)?;
    say(&Line::Ready)?;
    let (mut world, mut random) = (orders.world, Random(orders.seed));
    for _ in 0..orders.steps {
        let step = world.step(&mut random);
        say(&Line::Begin(step.clone()))?;
        let after = world.after(&step);
        do_step(&service, &orders.documents, &step, &after)?;
        world = after;
        say(&Line::Done)?;
    }
    service.engine().shutdown();
    Ok(())
}

fn do_step(service: &Service, dir: &Path, step: &Step, after: &World) -> Result<()> {
    match step {
        Step::Put(put) => {
            let paths: Vec<PathBuf> = put.iter().map(|(name, _)| dir.join(name)).collect();
            for ((_, content), path) in put.iter().zip(&paths) {
                std::fs::write(path, text(*content)).map_err(|e| QuireError::writing(path, e))?;
            }
            ingest(service, &paths, false)
        }
        Step::Remove(names) => {
            let collection = service.library().collection(COLLECTION)?;
            collection.writer()?.change(|transaction, info| {
                names
                    .iter()
                    .try_for_each(|name| transaction.remove_name(info, &dir.join(name).to_string_lossy()).map(|_| ()))
            })?;
            after.write_files(dir)
        }
        Step::Rename(old, new) => {
            let (old, new) = (dir.join(old), dir.join(new));
            std::fs::rename(&old, &new).map_err(|e| QuireError::writing(&new, e))?;
            ingest(service, &[new], false)
        }
        Step::Sync { .. } => {
            after.write_files(dir)?;
            ingest(service, &[dir.into()], true)
        }
        Step::Purge(names) => {
            let names = names.iter().map(|name| DocumentName::here(&dir.join(name).to_string_lossy())).collect();
            let remove = DocumentsCommand::Remove { collection: COLLECTION.into(), names, now: true };
            service.manage_documents(&remove, &mut |_| {})?;
            after.write_files(dir)
        }
        Step::Undo(names) => {
            let names = names.iter().map(|name| DocumentName::here(&dir.join(name).to_string_lossy())).collect();
            let restore = DocumentsCommand::Restore { collection: COLLECTION.into(), names };
            service.manage_documents(&restore, &mut |_| {})?;
            after.write_files(dir)
        }
        Step::Expire(content) => {
            let mut upload = service.begin_upload(u64::MAX)?;
            upload.write(text(*content).as_bytes())?;
            service.finish_upload(upload, &format!("{}.md", marker(*content)), "assistants", Some(0))?;
            service.remove_expired();
            Ok(())
        }
        Step::Repair => Ok(service.library().repair(false).map(|_| ())?),
        Step::Reclaim => Ok(service.manage_documents(&DocumentsCommand::Reclaim, &mut |_| {})?),
        Step::Evict => {
            let Some(stats) = service.store().stats() else { return Ok(()) };
            service.store().set_budget((stats.payload_bytes / 2).max(1))?;
            Ok(service.store().set_budget(stats.byte_budget)?)
        }
    }
}

fn ingest(service: &Service, paths: &[PathBuf], sync: bool) -> Result<()> {
    let options = IngestOptions { sync, ..IngestOptions::default() };
    let mut said = Ok(());
    let report = service.ingest_while(COLLECTION, paths, &options, &|| true, &mut |event| {
        if let IngestEvent::Chunk { key, .. } = event
            && said.is_ok()
        {
            said = say(&Line::Chunk(key.to_string()));
        }
    })?;
    said?;
    Ok(report.check()?)
}

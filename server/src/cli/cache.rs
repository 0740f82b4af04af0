//! `quire cache`: looking into the chunk store, which changes nothing, and removing chunks from it.
//!
//! None of this needs the model: a store says itself what its chunks belong to.

use std::path::Path;

use chunk_cache::{Access, ChunkStore, StoreError};
use serde::Serialize;
use serde_json::json;

use super::args::CacheCommand;
use super::output::{Out, bytes, count, grouped};
use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::store::store_dir;
use documents::data_dir;

pub(super) fn run(settings: &Settings, command: &CacheCommand, out: &Out) -> Result<()> {
    data_dir::check(&settings.data_dir)?;
    let dir = store_dir(&settings.data_dir);
    if let CacheCommand::Evict { all: true, .. } = command {
        return clear(&dir, out);
    }
    let access = match command {
        CacheCommand::Stats | CacheCommand::Ls | CacheCommand::Verify { repair: false } => Access::Read,
        CacheCommand::Verify { repair: true } | CacheCommand::Evict { .. } => Access::Write,
    };
    let opened = ChunkStore::open_existing(&dir, access, settings.store_bytes());
    if let Err(StoreError::OutOfSpace { .. }) = &opened {
        out.note("`quire cache evict --all` removes all chunks, and needs no space for that");
    }
    let Some(store) = opened? else {
        if out.json {
            out.value(&json!({"chunks": 0, "store": dir}));
        } else {
            out.line(format!("no chunk store yet at {}", dir.display()));
        }
        return Ok(());
    };
    if let Some(sentence) = &store.open_report().dropped {
        out.note(sentence);
    }
    match command {
        CacheCommand::Stats => stats(&store, &dir, out),
        CacheCommand::Ls => ls(&store, out),
        CacheCommand::Verify { repair } => verify(&store, &dir, *repair, out),
        CacheCommand::Evict { key, to_bytes, .. } => {
            let removed = match to_bytes {
                Some(bytes) => store.evict_to(bytes.0)?,
                None => {
                    for absent in key.iter().filter(|key| !store.contains(key)) {
                        out.note(&format!("not stored: {absent}"));
                    }
                    store.remove_all(key)?
                }
            };
            evicted(&store, removed, out)
        }
    }
}

fn stats(store: &ChunkStore, dir: &Path, out: &Out) -> Result<()> {
    let stats = store.stats();
    let models = models(store);
    let in_use = ChunkStore::is_in_use(dir)?;
    if out.json {
        out.value(&json!({
            "chunks": stats.chunks, "tokens": stats.tokens, "payload_bytes": stats.payload_bytes,
            "byte_budget": stats.byte_budget, "disk_bytes": stats.disk_bytes, "hits": stats.hits,
            "dead_bytes": stats.dead_bytes, "damaged": stats.damaged, "evicted": stats.evicted, "models": models,
            "in_use": in_use,
        }));
        return Ok(());
    }
    out.line(format!("chunks    {}", grouped(stats.chunks)));
    out.line(format!("tokens    {}", grouped(stats.tokens)));
    out.line(format!("payload   {} of {}", bytes(stats.payload_bytes), bytes(stats.byte_budget)));
    out.line(format!("on disk   {}", bytes(stats.disk_bytes)));
    out.line(format!("hits      {}", grouped(stats.hits)));
    out.line(format!("damaged   {}", stats.damaged));
    for model in &models {
        let (name, chunks, held) = (&model.name, model.chunks as usize, model.payload_bytes);
        out.line(format!("model     {name}: {} with {}", count(chunks, "chunk"), bytes(held)));
    }
    if in_use {
        out.note("a running quire has this store open: these figures are of one moment");
    }
    Ok(())
}

/// What the store holds of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct ModelShare {
    name: String,
    layout: String,
    chunks: u64,
    payload_bytes: u64,
}

/// One a model whose chunks are or were stored.
fn models(store: &ChunkStore) -> Vec<ModelShare> {
    let known = store.models().into_iter();
    let share = |model: chunk_cache::ModelInfo| ModelShare {
        name: model.name,
        layout: model.shape.to_string(),
        chunks: 0,
        payload_bytes: 0,
    };
    let mut shares: Vec<ModelShare> = known.map(share).collect();
    for (_, meta) in store.list() {
        shares[meta.model].chunks += 1;
        shares[meta.model].payload_bytes += meta.payload_bytes;
    }
    shares
}

fn ls(store: &ChunkStore, out: &Out) -> Result<()> {
    let models = store.models();
    for (key, meta) in store.list() {
        let model = &models[meta.model].name;
        if out.json {
            out.value(&json!({
                "key": key.to_string(), "tokens": meta.tokens, "payload_bytes": meta.payload_bytes,
                "created_unix": meta.created_unix, "last_used_unix": meta.last_used_unix, "hits": meta.hits,
                "demoted": meta.demoted, "model": model,
            }));
        } else {
            let (tokens, held, hits) = (meta.tokens, bytes(meta.payload_bytes), meta.hits);
            let demoted = if meta.demoted { "  no document" } else { "" };
            out.line(format!("{key}  {tokens:5} tokens  {held:>10}  {hits} hits  {model}{demoted}"));
        }
    }
    Ok(())
}

fn verify(store: &ChunkStore, dir: &Path, repair: bool, out: &Out) -> Result<()> {
    // Whoever writes removes files while they are read here, which would look like damage.
    if !repair && ChunkStore::is_in_use(dir)? {
        return Err(StoreError::Locked { path: dir.into() }.into());
    }
    let report = store.verify()?;
    for chunk in &report.damaged {
        out.failed(&format!("damaged: {}: expected {}, found {}", chunk.key, chunk.expected, chunk.found));
    }
    if repair {
        // What is damaged would never be served; gone, it is computed and stored anew when it is ingested or needed.
        store.repair()?;
    }
    for place in &report.unreadable {
        out.failed(&format!("unreadable: {place}"));
    }
    let sound = report.damaged.is_empty() && report.unreadable.is_empty();
    if out.json {
        out.value(&json!({
            "chunks": report.chunks, "bytes": report.bytes,
            "damaged": report.damaged.iter().map(|c| c.key.to_string()).collect::<Vec<_>>(),
            "unreadable": report.unreadable, "clean": sound, "repaired": repair,
        }));
    } else {
        out.line(format!("read {} and {}", count(report.chunks as usize, "chunk"), bytes(report.bytes)));
    }
    if sound {
        if !out.json {
            out.line("everything matches its checksums");
        }
        return Ok(());
    }
    let then = match repair {
        true => "damaged chunks were removed",
        false => "damaged chunks are never used; `quire cache verify --repair` removes them",
    };
    Err(QuireError::CheckFailed(format!(
        "the chunk store has {} and {}; {then}, and they are computed again when they are needed",
        count(report.damaged.len(), "damaged chunk"),
        count(report.unreadable.len(), "unreadable part")
    )))
}

/// Removes everything, also where the disk is full, and whatever model the chunks are of.
fn clear(dir: &Path, out: &Out) -> Result<()> {
    let removed = if dir.is_dir() { ChunkStore::clear(dir)? } else { 0 };
    if out.json {
        out.value(&json!({"removed": removed, "chunks": 0, "payload_bytes": 0}));
    } else {
        out.line(format!("removed {}; none is left", count(removed as usize, "chunk")));
    }
    Ok(())
}

fn evicted(store: &ChunkStore, removed: u64, out: &Out) -> Result<()> {
    // The chunks are gone in any case: a disk too full to rewrite a file keeps some of their space for now.
    if let Err(error) = store.compact() {
        out.note(&format!("not all of the space is free yet: {error}"));
    }
    let left = store.stats();
    if out.json {
        out.value(&json!({"removed": removed, "chunks": left.chunks, "payload_bytes": left.payload_bytes}));
    } else {
        out.line(format!(
            "removed {}; {} with {} are left",
            count(removed as usize, "chunk"),
            count(left.chunks as usize, "chunk"),
            bytes(left.payload_bytes)
        ));
    }
    Ok(())
}

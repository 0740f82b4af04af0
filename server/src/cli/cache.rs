//! `quire cache`: looking into the chunk store, which changes nothing, and removing chunks from it.
//!
//! None of this needs the model: a store says itself what it belongs to.

use std::path::Path;

use chunk_cache::{Access, ChunkKey, ChunkMeta, ChunkStore, StoreError};
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
    match command {
        CacheCommand::Stats => stats(&store, &dir, out),
        CacheCommand::Ls => ls(&store, out),
        CacheCommand::Verify { repair } => verify(&store, &dir, *repair, out),
        CacheCommand::Evict { key, to_bytes, .. } => {
            let victims = victims(store.list()?, key, to_bytes.map(|bytes| bytes.0));
            evict(&store, &victims, out)
        }
    }
}

fn stats(store: &ChunkStore, dir: &Path, out: &Out) -> Result<()> {
    let stats = store.stats()?;
    let in_use = ChunkStore::is_in_use(dir)?;
    if out.json {
        out.value(&json!({
            "chunks": stats.chunks, "tokens": stats.tokens, "payload_bytes": stats.payload_bytes,
            "byte_budget": stats.byte_budget, "disk_bytes": stats.disk_bytes, "hits": stats.hits,
            "damaged": stats.damaged, "evicted": stats.evicted, "model": store.model_name(), "in_use": in_use,
        }));
        return Ok(());
    }
    out.line(format!("chunks    {}", grouped(stats.chunks)));
    out.line(format!("tokens    {}", grouped(stats.tokens)));
    out.line(format!("payload   {} of {}", bytes(stats.payload_bytes), bytes(stats.byte_budget)));
    out.line(format!("on disk   {}", bytes(stats.disk_bytes)));
    out.line(format!("hits      {}", grouped(stats.hits)));
    out.line(format!("damaged   {}", stats.damaged));
    out.line(format!("model     {}", store.model_name()));
    if in_use {
        out.note("a running quire has this store open: these figures are of one moment");
    }
    Ok(())
}

fn ls(store: &ChunkStore, out: &Out) -> Result<()> {
    for (key, meta) in store.list()? {
        if out.json {
            out.value(&json!({
                "key": key.to_string(), "tokens": meta.tokens, "payload_bytes": meta.payload_bytes,
                "created_unix": meta.created_unix, "last_used_unix": meta.last_used_unix, "hits": meta.hits,
            }));
        } else {
            out.line(format!("{key}  {:5} tokens  {:>10}  {} hits", meta.tokens, bytes(meta.payload_bytes), meta.hits));
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
        if repair {
            // It would never be served; gone, it is computed and stored anew when it is ingested or needed.
            store.remove(&chunk.key)?;
        }
    }
    for place in &report.unreadable {
        out.failed(&format!("unreadable: {place}"));
    }
    let sound = report.damaged.is_empty() && report.unreadable.is_empty();
    if out.json {
        out.value(&json!({
            "chunks": report.chunks, "bytes": report.bytes, "orphans": report.orphans.len(),
            "damaged": report.damaged.iter().map(|c| c.key.to_string()).collect::<Vec<_>>(),
            "unreadable": report.unreadable, "clean": sound, "repaired": repair,
        }));
    } else {
        out.line(format!("read {} and {}", count(report.chunks as usize, "chunk"), bytes(report.bytes)));
    }
    if !report.orphans.is_empty() {
        let orphans = count(report.orphans.len(), "unfinished write");
        out.note(&format!("{orphans} lie there unseen; whoever stores chunks next removes them"));
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

fn victims(mut list: Vec<(ChunkKey, ChunkMeta)>, keys: &[ChunkKey], to_bytes: Option<u64>) -> Vec<ChunkKey> {
    let Some(target) = to_bytes else {
        return keys.to_vec();
    };
    list.sort_by_key(|(key, meta)| (meta.last_used_unix, *key));
    let mut left: u64 = list.iter().map(|(_, meta)| meta.payload_bytes).sum();
    list.into_iter()
        .take_while(|(_, meta)| {
            let above = left > target;
            left -= if above { meta.payload_bytes } else { 0 };
            above
        })
        .map(|(key, _)| key)
        .collect()
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

fn evict(store: &ChunkStore, victims: &[ChunkKey], out: &Out) -> Result<()> {
    let mut removed = 0;
    for key in victims {
        if store.remove(key)? {
            removed += 1;
        } else {
            out.note(&format!("not stored: {key}"));
        }
    }
    // The space of removed chunks is free once the files are merged.
    store.compact();
    let left = store.stats()?;
    if out.json {
        out.value(&json!({"removed": removed, "chunks": left.chunks, "payload_bytes": left.payload_bytes}));
    } else {
        out.line(format!(
            "removed {}; {} with {} are left",
            count(removed, "chunk"),
            count(left.chunks as usize, "chunk"),
            bytes(left.payload_bytes)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_chunks_go_first_and_no_more_than_needed() {
        let chunk = |id: u8, used| {
            let meta = ChunkMeta { tokens: 1, payload_bytes: 10, created_unix: 0, last_used_unix: used, hits: 0 };
            (ChunkKey([id; 32]), meta)
        };
        let list = vec![chunk(1, 30), chunk(2, 10), chunk(3, 20)];
        assert_eq!(victims(list.clone(), &[], Some(15)), [ChunkKey([2; 32]), ChunkKey([3; 32])]);
        assert_eq!(victims(list.clone(), &[], Some(30)), []);
        assert_eq!(victims(list.clone(), &[], Some(0)).len(), 3);
        assert_eq!(victims(list, &[ChunkKey([9; 32])], None), [ChunkKey([9; 32])]);
    }
}

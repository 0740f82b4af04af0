//! `quire cache`.

use chunk_cache::{ChunkKey, ChunkMeta, ChunkStore};
use engine::Engine;
use serde_json::json;

use super::args::CacheCommand;
use super::output::{Out, bytes, count, grouped};
use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::store::{KvStore, store_dir};

pub(super) fn run(settings: &Settings, command: &CacheCommand, out: &Out) -> Result<()> {
    if !store_dir(&settings.data_dir).is_dir() {
        if out.json {
            out.value(&json!({"chunks": 0, "store": store_dir(&settings.data_dir)}));
        } else {
            out.line(format!("no chunk store yet at {}", store_dir(&settings.data_dir).display()));
        }
        return Ok(());
    }
    // A store belongs to a model: opening it needs the model's identity.
    let config = settings.engine()?;
    let name = settings.served_name(&config.model_dir);
    let engine = Engine::load(config)?;
    let store = KvStore::open(&engine, &settings.data_dir, &name, settings.cache_bytes, &settings.tenant)?;
    let chunks = store.chunks();
    match command {
        CacheCommand::Stats => stats(chunks, out),
        CacheCommand::Ls => ls(chunks, out),
        CacheCommand::Verify => verify(chunks, out),
        CacheCommand::Evict { key, to_bytes, all } => {
            let list = chunks.list()?;
            let victims = victims(list, key, *to_bytes, *all);
            evict(chunks, &victims, out)
        }
    }
}

fn stats(store: &ChunkStore, out: &Out) -> Result<()> {
    let stats = store.stats()?;
    if out.json {
        out.value(&json!({
            "chunks": stats.chunks, "tokens": stats.tokens, "payload_bytes": stats.payload_bytes,
            "byte_budget": stats.byte_budget, "disk_bytes": stats.disk_bytes, "hits": stats.hits,
            "damaged": stats.damaged, "evicted": stats.evicted,
        }));
        return Ok(());
    }
    out.line(format!("chunks    {}", grouped(stats.chunks)));
    out.line(format!("tokens    {}", grouped(stats.tokens)));
    out.line(format!("payload   {} of {}", bytes(stats.payload_bytes), bytes(stats.byte_budget)));
    out.line(format!("on disk   {}", bytes(stats.disk_bytes)));
    out.line(format!("hits      {}", grouped(stats.hits)));
    out.line(format!("damaged   {}", stats.damaged));
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

fn verify(store: &ChunkStore, out: &Out) -> Result<()> {
    let report = store.verify()?;
    for chunk in &report.damaged {
        out.note(&format!("damaged: {}: expected {}, found {}", chunk.key, chunk.expected, chunk.found));
        // It would never be served; gone, it is computed and stored anew when it is ingested or needed.
        store.remove(&chunk.key)?;
    }
    for place in &report.unreadable {
        out.note(&format!("unreadable: {place}"));
    }
    if out.json {
        out.value(&json!({
            "chunks": report.chunks, "bytes": report.bytes, "orphans": report.orphans.len(),
            "damaged": report.damaged.iter().map(|c| c.key.to_string()).collect::<Vec<_>>(),
            "unreadable": report.unreadable, "clean": report.is_clean(),
        }));
    } else {
        out.line(format!("read {} and {}", count(report.chunks as usize, "chunk"), bytes(report.bytes)));
    }
    if report.is_clean() {
        if !out.json {
            out.line("everything matches its checksums");
        }
        return Ok(());
    }
    Err(QuireError::CheckFailed(format!(
        "the chunk store has {}, {} and {}; damaged chunks were removed and are computed again when they are needed",
        count(report.damaged.len(), "damaged chunk"),
        count(report.orphans.len(), "orphan"),
        count(report.unreadable.len(), "unreadable part")
    )))
}

fn victims(mut list: Vec<(ChunkKey, ChunkMeta)>, keys: &[ChunkKey], to_bytes: Option<u64>, all: bool) -> Vec<ChunkKey> {
    let Some(target) = to_bytes.or(all.then_some(0)) else {
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

fn evict(store: &ChunkStore, victims: &[ChunkKey], out: &Out) -> Result<()> {
    let mut removed = 0;
    for key in victims {
        if store.remove(key)? {
            removed += 1;
        } else {
            out.note(&format!("not stored: {key}"));
        }
    }
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
        assert_eq!(victims(list.clone(), &[], Some(15), false), [ChunkKey([2; 32]), ChunkKey([3; 32])]);
        assert_eq!(victims(list.clone(), &[], Some(30), false), []);
        assert_eq!(victims(list.clone(), &[], None, true).len(), 3);
        assert_eq!(victims(list, &[ChunkKey([9; 32])], None, false), [ChunkKey([9; 32])]);
    }
}

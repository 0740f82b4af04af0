//! The chunk store, looked into and made smaller. None of this needs the model: a store says itself what it belongs to.

use chunk_cache::{Access, ChunkKey, StoreError};

use super::super::command::CacheCommand;
use super::super::event::{CacheEvent, CacheTotals, Event, ListedChunk, ModelShare};
use super::super::host::{Chunks, Host};
use settings::{QuireError, Result};

pub(super) fn execute(host: &Host, command: &CacheCommand, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    if *command == CacheCommand::Clear {
        let removed = host.clear_chunks()?;
        on_event(Event::Cache(CacheEvent::Cleared { removed }));
        return Ok(());
    }
    let access = match command {
        CacheCommand::Stats | CacheCommand::List | CacheCommand::Verify { repair: false } => Access::Read,
        _ => Access::Write,
    };
    let opened = host.chunks(access);
    if let Err(QuireError::Store(StoreError::OutOfSpace { .. })) = &opened {
        on_event(Event::Note("`quire cache evict --all` removes all chunks, and needs no space for that".into()));
    }
    let Some(store) = opened? else {
        on_event(Event::Cache(CacheEvent::Absent { dir: host.chunks_dir().to_string_lossy().into() }));
        return Ok(());
    };
    if let Some(sentence) = &store.open_report().dropped {
        on_event(Event::Note(sentence.clone()));
    }
    match command {
        CacheCommand::Stats => on_event(Event::Cache(CacheEvent::Stats(totals(host, &store)?))),
        CacheCommand::List => list(&store, on_event),
        CacheCommand::Verify { repair } => verify(host, &store, *repair, on_event)?,
        CacheCommand::Remove { keys } => {
            let keys = parse(keys)?;
            for absent in keys.iter().filter(|key| !store.contains(key)) {
                on_event(Event::Note(format!("not stored: {absent}")));
            }
            evicted(&store, store.remove_all(&keys)?, on_event);
        }
        CacheCommand::Shrink { to_bytes } => evicted(&store, store.evict_to(*to_bytes)?, on_event),
        CacheCommand::Clear => {}
    }
    Ok(())
}

fn totals(host: &Host, store: &Chunks) -> Result<CacheTotals> {
    let stats = store.stats();
    Ok(CacheTotals {
        chunks: stats.chunks,
        tokens: stats.tokens,
        payload_bytes: stats.payload_bytes,
        byte_budget: stats.byte_budget,
        disk_bytes: stats.disk_bytes,
        hits: stats.hits,
        damaged: stats.damaged,
        dead_bytes: stats.dead_bytes,
        evicted: stats.evicted,
        models: models(store),
        in_use: host.is_serving() || host.has_others(&host.chunks_dir())?,
    })
}

/// One a model whose chunks are or were stored.
fn models(store: &Chunks) -> Vec<ModelShare> {
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

fn list(store: &Chunks, on_event: &mut dyn FnMut(Event)) {
    let models = store.models();
    for (key, meta) in store.list() {
        on_event(Event::Cache(CacheEvent::Chunk(ListedChunk {
            key: key.to_string(),
            tokens: meta.tokens,
            payload_bytes: meta.payload_bytes,
            created_unix: meta.created_unix,
            last_used_unix: meta.last_used_unix,
            hits: meta.hits,
            demoted: meta.demoted,
            model: models[meta.model].name.clone(),
        })));
    }
}

fn verify(host: &Host, store: &Chunks, repair: bool, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    // Whoever writes removes files while they are read here, which would look like damage.
    if !repair && host.has_others(&host.chunks_dir())? {
        return Err(Host::locked(&host.chunks_dir()));
    }
    let report = store.verify()?;
    for chunk in &report.damaged {
        on_event(Event::Cache(CacheEvent::Damaged {
            key: chunk.key.to_string(),
            expected: chunk.expected.to_string(),
            found: chunk.found.to_string(),
        }));
    }
    if repair {
        // What is damaged would never be served; gone, it is computed and stored anew when it is ingested or needed.
        store.repair()?;
    }
    on_event(Event::Cache(CacheEvent::Verified {
        chunks: report.chunks,
        bytes: report.bytes,
        damaged: report.damaged.iter().map(|chunk| chunk.key.to_string()).collect(),
        unreadable: report.unreadable,
        repaired: repair,
    }));
    Ok(())
}

fn evicted(store: &Chunks, removed: u64, on_event: &mut dyn FnMut(Event)) {
    // The chunks are gone in any case: a disk too full to rewrite a file keeps some of their space for now.
    if let Err(error) = store.compact() {
        on_event(Event::Note(format!("not all of the space is free yet: {error}")));
    }
    let left = store.stats();
    let (chunks, payload_bytes) = (left.chunks, left.payload_bytes);
    on_event(Event::Cache(CacheEvent::Removed { removed, chunks, payload_bytes }));
}

fn parse(keys: &[String]) -> Result<Vec<ChunkKey>> {
    let wrong = |found: &String, problem: String| QuireError::InvalidParameter {
        param: "key".into(),
        problem: format!("{problem}, found `{found}`"),
    };
    keys.iter()
        .map(|key| key.parse().map_err(|e: <ChunkKey as std::str::FromStr>::Err| wrong(key, e.to_string())))
        .collect()
}

//! `quire cache`: looking into the chunk store, which changes nothing, and removing chunks from it.

use serde_json::json;

use super::args::CacheCommand as Called;
use super::asking;
use super::output::{Out, bytes, count, grouped};
use service::control::{CacheCommand, CacheEvent, CacheTotals, Command, Event, ListedChunk};
use settings::{Config, QuireError, Result};

pub(super) fn run(config: &Config, called: &Called, out: &Out) -> Result<()> {
    let (name, command) = command(called);
    // What was damaged is an error of the command, which is told last.
    let mut damage = Ok(());
    asking::run(config, name, &Command::Cache(command), out, &mut |event| {
        if let Event::Cache(event) = event {
            let outcome = print(event, out);
            damage = std::mem::replace(&mut damage, Ok(())).and(outcome);
        }
    })?;
    damage
}

fn command(called: &Called) -> (&'static str, CacheCommand) {
    match called {
        Called::Stats => ("cache stats", CacheCommand::Stats),
        Called::Ls => ("cache ls", CacheCommand::List),
        Called::Verify { repair } => ("cache verify", CacheCommand::Verify { repair: *repair }),
        Called::Evict { all: true, .. } => ("cache evict", CacheCommand::Clear),
        Called::Evict { to_bytes: Some(bytes), .. } => ("cache evict", CacheCommand::Shrink { to_bytes: bytes.0 }),
        Called::Evict { key, .. } => {
            ("cache evict", CacheCommand::Remove { keys: key.iter().map(ToString::to_string).collect() })
        }
    }
}

fn print(event: CacheEvent, out: &Out) -> Result<()> {
    match event {
        CacheEvent::Absent { dir } if out.json => out.value(&json!({"chunks": 0, "store": dir})),
        CacheEvent::Absent { dir } => out.line(format!("no chunk store yet at {dir}")),
        CacheEvent::Stats(totals) => stats(&totals, out),
        CacheEvent::Chunk(chunk) if out.json => out.value(&chunk),
        CacheEvent::Chunk(ListedChunk { key, tokens, payload_bytes, hits, demoted, model, .. }) => {
            let (held, demoted) = (bytes(payload_bytes), if demoted { "  no document" } else { "" });
            out.line(format!("{key}  {tokens:5} tokens  {held:>10}  {hits} hits  {model}{demoted}"));
        }
        CacheEvent::Damaged { key, expected, found } => {
            out.failed(&format!("damaged: {key}: expected {expected}, found {found}"));
        }
        CacheEvent::Verified { chunks, bytes, damaged, unreadable, repaired } => {
            return verified((chunks, bytes), &damaged, &unreadable, repaired, out);
        }
        CacheEvent::Removed { removed, chunks, payload_bytes } if out.json => {
            out.value(&json!({"removed": removed, "chunks": chunks, "payload_bytes": payload_bytes}));
        }
        CacheEvent::Removed { removed, chunks, payload_bytes } => out.line(format!(
            "removed {}; {} with {} are left",
            count(removed as usize, "chunk"),
            count(chunks as usize, "chunk"),
            bytes(payload_bytes)
        )),
        CacheEvent::Cleared { removed } if out.json => {
            out.value(&json!({"removed": removed, "chunks": 0, "payload_bytes": 0}));
        }
        CacheEvent::Cleared { removed } => {
            out.line(format!("removed {}; none is left", count(removed as usize, "chunk")));
        }
    }
    Ok(())
}

fn stats(totals: &CacheTotals, out: &Out) {
    if out.json {
        return out.value(totals);
    }
    out.line(format!("chunks    {}", grouped(totals.chunks)));
    out.line(format!("tokens    {}", grouped(totals.tokens)));
    out.line(format!("payload   {} of {}", bytes(totals.payload_bytes), bytes(totals.byte_budget)));
    out.line(format!("on disk   {}", bytes(totals.disk_bytes)));
    out.line(format!("hits      {}", grouped(totals.hits)));
    out.line(format!("damaged   {}", totals.damaged));
    for model in &totals.models {
        let (name, chunks, held) = (&model.name, model.chunks as usize, model.payload_bytes);
        out.line(format!("model     {name}: {} with {}", count(chunks, "chunk"), bytes(held)));
    }
    if totals.in_use {
        out.note("a running quire has this store open: these figures are of one moment");
    }
}

fn verified(
    (chunks, read): (u64, u64),
    damaged: &[String],
    unreadable: &[String],
    repaired: bool,
    out: &Out,
) -> Result<()> {
    for place in unreadable {
        out.failed(&format!("unreadable: {place}"));
    }
    let sound = damaged.is_empty() && unreadable.is_empty();
    if out.json {
        out.value(&json!({
            "chunks": chunks, "bytes": read, "damaged": damaged, "unreadable": unreadable,
            "clean": sound, "repaired": repaired,
        }));
    } else {
        out.line(format!("read {} and {}", count(chunks as usize, "chunk"), bytes(read)));
    }
    if sound {
        if !out.json {
            out.line("everything matches its checksums");
        }
        return Ok(());
    }
    let found = format!("{} and {}", count(damaged.len(), "damaged chunk"), count(unreadable.len(), "unreadable part"));
    let later = "they are computed again when they are needed";
    if !repaired {
        return Err(QuireError::CheckFailed(format!(
            "the chunk store has {found}; damaged chunks are never used: `quire cache verify --repair` removes them, and {later}"
        )));
    }
    if !out.json {
        out.line(format!("repaired: {found} were removed, and {later}"));
    }
    Ok(())
}

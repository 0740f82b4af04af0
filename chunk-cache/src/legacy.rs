//! Stores of the first layout: chunks of one model under keys that do not say behind what they were computed, payloads in
//! blob files. Nothing of them can be used; only the budget is kept.

use std::path::Path;

use rocksdb::{DB, Options};

use crate::backend::Backend;
use crate::checksum::crc32c;
use crate::error::StoreError;

/// A column family that only the first layout has.
pub(crate) const FAMILY: &str = "manifest";
/// In the first layout a value began behind so many bytes of header.
const HEADER_LEN: usize = 76;

/// What was dropped.
pub(crate) struct Dropped {
    /// Its budget, if that could be read.
    pub(crate) byte_budget: Option<u64>,
    /// What to tell the user.
    pub(crate) sentence: String,
}

/// Whether the directory holds a store of the first layout.
pub(crate) fn is_here(path: &Path) -> bool {
    Backend::families(path).iter().any(|name| name == FAMILY)
}

/// Removes a store of the first layout, if the directory holds one.
pub(crate) fn drop_store(path: &Path) -> Result<Option<Dropped>, StoreError> {
    if !is_here(path) {
        return Ok(None);
    }
    let (byte_budget, chunks) = read(path).unwrap_or_default();
    Backend::destroy(path)?;
    let sentence = format!(
        "the {chunks} cached chunks at {} were stored by an earlier version in a layout that does not say all they depend \
         on: they were removed, and are computed again when they are needed",
        path.display()
    );
    tracing::warn!("{sentence}");
    Ok(Some(Dropped { byte_budget, sentence }))
}

/// Budget and number of chunks, as far as they can be read.
fn read(path: &Path) -> Option<(Option<u64>, usize)> {
    let options = Options::default();
    let db = DB::open_cf_for_read_only(&options, path, Backend::families(path), false).ok()?;
    let mut chunks = 0;
    let mut rows = db.raw_iterator_cf(db.cf_handle(FAMILY)?);
    rows.seek_to_first();
    while rows.valid() {
        chunks += 1;
        rows.next();
    }
    let row = db.get_cf(db.cf_handle("meta")?, b"budget").ok().flatten();
    Some((row.and_then(|row| budget(&row)), chunks))
}

fn budget(row: &[u8]) -> Option<u64> {
    let (header, payload) = row.split_at_checked(HEADER_LEN)?;
    let crc = |bytes: &[u8]| u32::from_le_bytes(*bytes.last_chunk().unwrap_or(&[0; 4]));
    let sound = header.starts_with(b"QKV\x1a\x01\x00")
        && crc(header) == crc32c(&[&header[..72]])
        && crc(&header[..72]) == crc32c(&[payload]);
    sound.then_some(u64::from_le_bytes(payload.try_into().ok()?))
}

//! Rows in the order of their keys, read past blocks that are damaged.
//!
//! RocksDB ends an iteration at a block whose checksum is wrong, and says nothing of where the next one begins. It is
//! searched for: a seek fails for exactly those keys whose place is in the damaged block, so that keys ever further away
//! are tried until one can be read, and the first such key is found by halving what lies between.

use std::collections::VecDeque;

use rocksdb::DB;

use super::error::CatalogError;
use super::rows::DamagedRow;
use super::store::{Family, Store, column, read_options};

/// Rows that are read at a time: few at first, as often one is enough.
const FIRST_ROWS: usize = 8;
const MOST_ROWS: usize = 1024;
/// Bytes of rows that are read at a time, about.
const MOST_BYTES: usize = 4 << 20;
/// Bytes behind what two keys have in common that are halved between them at a time.
const HALVED: usize = 16;
/// Bytes of keys that are told apart: longer than any path.
const LONGEST: usize = 4200;

/// A key and its row as they lie on disk.
pub(super) type RawRow = (Vec<u8>, Vec<u8>);

/// Rows in the order of their keys. Where some cannot be read, one error comes in their place, and then those behind.
pub(super) struct Rows<'a> {
    store: &'a Store,
    family: Family,
    prefix: Vec<u8>,
    /// Where to go on; `None` at the end.
    next: Option<Vec<u8>>,
    read: VecDeque<Result<RawRow, CatalogError>>,
    at_a_time: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a family whose keys begin with `prefix` and are not below `from`.
    pub(super) fn new(store: &'a Store, family: Family, prefix: &[u8], from: &[u8]) -> Rows<'a> {
        let next = Some(from.max(prefix).to_vec());
        Rows { store, family, prefix: prefix.into(), next, read: VecDeque::new(), at_a_time: FIRST_ROWS }
    }

    /// Reads some more.
    fn fill(&mut self, from: Vec<u8>) -> Result<(), CatalogError> {
        let (mut bytes, most) = (0, self.at_a_time);
        self.at_a_time = (most * 4).min(MOST_ROWS);
        self.store.with(|db| {
            let mut rows = db.raw_iterator_cf_opt(column(db, self.family), read_options());
            rows.seek(&from);
            let mut last = from;
            while let Some((key, row)) = rows.item().filter(|(key, _)| key.starts_with(&self.prefix)) {
                if self.read.len() == most || bytes > MOST_BYTES {
                    self.next = Some(key.to_vec());
                    return Ok(());
                }
                bytes += row.len();
                last = key.to_vec();
                self.read.push_back(Ok((key.to_vec(), row.to_vec())));
                rows.next();
            }
            // The end, or a block that cannot be read.
            if let Err(error) = rows.status() {
                let error = match self.store.fail("reading")(error) {
                    CatalogError::Row(DamagedRow(problem)) => {
                        self.next = behind(db, self.family, &last).filter(|next| *next > last);
                        DamagedRow(format!("rows of `{}` cannot be read: {problem}", self.family.name())).into()
                    }
                    whole => whole,
                };
                self.read.push_back(Err(error));
            }
            Ok(())
        })
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<RawRow, CatalogError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.read.is_empty() {
            let from = self.next.take()?;
            if let Err(error) = self.fill(from) {
                return Some(Err(error));
            }
        }
        self.read.pop_front()
    }
}

/// The first place behind `damaged`, which cannot be read, that can be; `None` where there is none.
fn behind(db: &DB, family: Family, damaged: &[u8]) -> Option<Vec<u8>> {
    // Each time another iterator: one that has failed keeps a part of its state.
    let readable = |key: &[u8]| {
        let mut rows = db.raw_iterator_cf_opt(column(db, family), read_options());
        rows.seek(key);
        rows.status().is_ok()
    };
    let further = (1..=damaged.len()).rev().filter_map(|length| successor(&damaged[..length]));
    let mut good = further.chain([vec![u8::MAX; damaged.len() + 1]]).find(|key| readable(key))?;
    let mut common = damaged.iter().zip(&good).take_while(|(a, b)| a == b).count();
    let mut prefix = good[..common].to_vec();
    let mut bad = halved(damaged, common);
    let mut first = halved(&good, common);
    loop {
        while first - bad > 1 {
            let middle = bad + (first - bad) / 2;
            match readable(&[&prefix[..], &middle.to_be_bytes()].concat()) {
                true => first = middle,
                false => bad = middle,
            }
        }
        good = [&prefix[..], &first.to_be_bytes()].concat();
        // All that begin with the last key that cannot be read lie before it: some of them may be readable.
        prefix.extend(bad.to_be_bytes());
        common += HALVED;
        let last = [&prefix[..], &u128::MAX.to_be_bytes()].concat();
        if common > LONGEST || !readable(&last) {
            return Some(good);
        }
        let begins_alike = damaged.starts_with(&prefix);
        bad = if begins_alike { halved(damaged, common) } else { 0 };
        first = u128::MAX;
        if bad == first {
            return Some(good);
        }
    }
}

/// Some bytes of a key as a number.
fn halved(key: &[u8], from: usize) -> u128 {
    let mut bytes = [0; HALVED];
    let part = key.get(from..).unwrap_or_default();
    let part = &part[..part.len().min(HALVED)];
    bytes[..part.len()].copy_from_slice(part);
    u128::from_be_bytes(bytes)
}

/// The first key behind all that begin with `prefix`, if the last byte of that can be raised.
fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let (last, before) = prefix.split_last()?;
    Some([before, &[last.checked_add(1)?]].concat())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::path::Path;

    use super::super::store::Access;
    use super::*;

    const ROWS: u32 = 3000;

    fn key(number: u32) -> Vec<u8> {
        format!("/a/long/path/that/all/have/note-{number:06}.txt").into_bytes()
    }

    /// A closed database in tables, whose rows do not shrink.
    fn tables(path: &Path) -> Vec<std::path::PathBuf> {
        let store = Store::open(path, Access::Write).unwrap();
        let row = |number: u32| {
            (0..12u32)
                .flat_map(|at| blake3::hash(&[number, at].map(u32::to_le_bytes).concat()).as_bytes()[..8].to_vec())
                .collect()
        };
        store.write((0..ROWS).map(|number| ((Family::Names, key(number)), Some(row(number)))), true).unwrap();
        store.purge().unwrap();
        drop(store);
        let files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|ending| ending == "sst")).collect()
    }

    #[test]
    fn rows_behind_a_damaged_block_are_read_and_only_those_in_it_are_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog");
        let files = tables(&path);
        assert_eq!(files.len(), 1);
        let whole = fs::read(&files[0]).unwrap();
        // Blocks of 4 KiB before what describes them.
        for at in [10, whole.len() / 5, whole.len() / 2, whole.len() * 3 / 4] {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(&files[0], &damaged).unwrap();
            let store = Store::open(&path, Access::Read).unwrap();
            let rows = store.scan(Family::Names, b"", b"");
            let (found, errors): (Vec<_>, Vec<_>) = rows.partition(Result::is_ok);
            let lost = ROWS as usize - found.len();
            assert!(
                errors.len() == 1 && (1..=80).contains(&lost),
                "byte {at}: {} errors, {lost} rows lost",
                errors.len()
            );
            let keys: Vec<Vec<u8>> = found.into_iter().map(|row| row.unwrap().0).collect();
            assert!(keys.is_sorted());
            assert_eq!(keys.last(), Some(&key(ROWS - 1)));
        }
    }
}

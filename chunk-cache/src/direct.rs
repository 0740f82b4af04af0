//! Reading layers straight from payload files, past RocksDB.
//!
//! RocksDB's own way to a value costs its checksum of the whole block behind the read, over memory that has left the nearest
//! cache by then. A payload file never changes and holds its values as they are, one a block; so where they lie is worked out
//! when the file is written, looked at once to be sure, and kept in the chunk's row. A read then copies piece by piece and
//! computes the payload's own checksum over each piece while it is near. Whatever is odd about a place (small values that
//! share a block, another table format, damage) only means that the layer is read through RocksDB.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::catalogue::Entry;
use crate::checksum::Crc32c;
use crate::format::{self, HEADER_LEN};
use crate::key::{ChunkKey, RAW_CODEC};
use crate::records::layer_header;
use crate::shape::{KvShape, LayerKv};
use crate::writer::Core;

/// RocksDB's block size: a value of so many bytes has a block of its own.
const BLOCK: usize = 4096;
/// Bytes that are copied and checked at a time.
const PIECE: usize = 256 << 10;
/// Files that are held open.
const MOST_OPEN: usize = 64;
/// Bytes of memory that is kept for the next reads: what the allocator gives anew has to be cleared by the system first.
const MOST_KEPT: usize = 64 << 20;

/// Bytes before a value in its block: lengths of the key's shared and own parts and of the value, then the key with its eight
/// bytes of sequence number and type.
fn before(key: usize, value: usize) -> u64 {
    let varint = |number: usize| (64 - (number as u64 | 1).leading_zeros()).div_ceil(7) as usize;
    (varint(0) + varint(key + 8) + varint(value) + key + 8) as u64
}

/// Bytes behind it: one restart point, their number, the type of compression and the checksum.
const BEHIND: u64 = 4 + 4 + 1 + 4;

/// From one value of a chunk to the next, when all are so large.
fn stride(value: usize) -> u64 {
    before(12, value) + value as u64 + BEHIND
}

/// Works out where the values of a file lie while it is written.
#[derive(Default)]
pub(crate) struct Places {
    end: u64,
    /// Offset and first bytes of each value; no offset from the first value on that shares a block.
    values: Vec<(Option<u64>, Vec<u8>)>,
    shared: bool,
}

impl Places {
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.shared |= value.len() < BLOCK;
        let offset = (!self.shared).then(|| self.end + before(key.len(), value.len()));
        self.end += before(key.len(), value.len()) + value.len() as u64 + BEHIND;
        self.values.push((offset, value[..value.len().min(HEADER_LEN)].to_vec()));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The offsets that are right by the file itself, one a value; zero: not known.
    pub(crate) fn confirmed(self, path: &Path) -> Vec<u64> {
        let Ok(file) = File::open(path) else { return vec![0; self.values.len()] };
        let mut found = [0; HEADER_LEN];
        let confirm = |(offset, start): (Option<u64>, Vec<u8>)| {
            let offset = offset.filter(|offset| file.read_exact_at(&mut found[..start.len()], *offset).is_ok());
            offset.filter(|_| found[..start.len()] == start[..]).unwrap_or(0)
        };
        let places = self.values.into_iter().map(confirm).collect();
        // RocksDB leaves nothing of a file that it has written in the page cache. A single page here and there would make the
        // system read all around them page by page ever after, and copying from those costs twice as much as from large ones.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        places
    }
}

/// Where a chunk's first layer lies, if all of its layers follow each other as they should; else zero.
pub(crate) fn chunk_offset(layers: &[u64], bytes_per_side: u64) -> u64 {
    let stride = stride(HEADER_LEN + 2 * bytes_per_side as usize);
    match layers {
        [first, ..] if *first > 0 && layers.windows(2).all(|pair| pair[0] + stride == pair[1]) => *first,
        _ => 0,
    }
}

/// Payload files that are held open, by their first chunk number.
#[derive(Default)]
pub(crate) struct OpenFiles(Mutex<HashMap<u64, Arc<File>>>);

impl OpenFiles {
    fn get(&self, first: u64, path: &Path) -> Option<Arc<File>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&first) {
            return Some(Arc::clone(file));
        }
        if open.len() >= MOST_OPEN {
            open.clear();
        }
        let file = Arc::new(File::open(path).ok()?);
        open.insert(first, Arc::clone(&file));
        Some(file)
    }

    /// Lets go of a file that was dropped: as long as it is open, the disk does not have its space back.
    pub(crate) fn forget(&self, first: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&first);
    }
}

/// Memory of earlier reads that nobody holds any more.
#[derive(Default)]
pub(crate) struct ReadBuffers(Mutex<Vec<Vec<u8>>>);

impl ReadBuffers {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer that has room for so many bytes, and not for very many more.
    fn take(&self, length: usize) -> Vec<u8> {
        let mut kept = self.lock();
        let fits = |buffer: &Vec<u8>| (length..=2 * length).contains(&buffer.capacity());
        match kept.iter().rposition(fits) {
            Some(at) => kept.swap_remove(at),
            None => Vec::with_capacity(length),
        }
    }

    fn give_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut kept = self.lock();
        kept.push(buffer);
        // The oldest go first, so that sizes that are no longer read do not stay.
        while kept.iter().map(Vec::capacity).sum::<usize>() > MOST_KEPT {
            kept.remove(0);
        }
    }
}

/// What was read, in memory that goes back when nobody holds it any more.
struct Lent {
    bytes: Vec<u8>,
    to: Arc<ReadBuffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.to.give_back(std::mem::take(&mut self.bytes));
    }
}

impl Core {
    /// Keys and values of one layer from the file itself; `None` where RocksDB has to be asked, whatever the reason.
    pub(crate) fn read_directly(&self, key: &ChunkKey, entry: &Entry, shape: &KvShape, layer: u32) -> Option<LayerKv> {
        if entry.offset == 0 || entry.codec != RAW_CODEC {
            return None;
        }
        let side = usize::try_from(shape.bytes_per_side(entry.tokens)?).ok()?;
        let length = HEADER_LEN + side.checked_mul(2)?;
        let (first, path) = {
            let state = self.catalogue.lock();
            let first = state.segment_of(entry.number)?;
            (first, state.segments.get(&first)?.path.clone()?)
        };
        let file = self.files.get(first, &path)?;
        let mut lent = Lent { bytes: self.buffers.take(length), to: Arc::clone(&self.buffers) };
        let crc = read_checked(&file, entry.offset + u64::from(layer) * stride(length), length, &mut lent.bytes)?;
        let found = format::decode_header(&lent.bytes).ok()?;
        found.check(&layer_header(key, shape, entry.tokens, layer)).ok()?;
        if found.payload_crc != crc {
            return None;
        }
        let mut keys = Bytes::from_owner(lent).split_off(HEADER_LEN);
        let values = keys.split_off(side);
        Some(LayerKv { keys, values })
    }
}

/// Reads so many bytes from there into an empty buffer with room for them. Returns the crc32c of those behind the header.
fn read_checked(file: &File, offset: u64, length: usize, bytes: &mut Vec<u8>) -> Option<u32> {
    let mut crc = Crc32c::new();
    while bytes.len() < length {
        let start = bytes.len();
        let piece = PIECE.min(length - start);
        let room: &mut [MaybeUninit<u8>] = &mut bytes.spare_capacity_mut()[..piece];
        let (read, _) = rustix::io::pread(file, room, offset + start as u64).ok()?;
        let count = read.len();
        if count == 0 {
            return None;
        }
        crc.update(&read[HEADER_LEN.saturating_sub(start).min(count)..]);
        // SAFETY: so many bytes of the spare capacity were filled.
        unsafe { bytes.set_len(start + count) };
    }
    Some(crc.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_and_strides_are_those_of_the_table_format() {
        // One byte for the shared part, one for the key's length, three for a value of 2^14 bytes and more.
        assert_eq!(before(12, (1 << 14) - 1), 1 + 1 + 2 + 20);
        assert_eq!(before(12, 1 << 14), 1 + 1 + 3 + 20);
        assert_eq!(stride(1 << 20), 25 + (1 << 20) + 13);
    }

    #[test]
    fn buffers_are_used_again_and_only_so_many_are_kept() {
        let buffers = Arc::new(ReadBuffers::default());
        let first = Lent { bytes: buffers.take(1000), to: Arc::clone(&buffers) };
        let place = first.bytes.as_ptr();
        drop(first);
        let again = buffers.take(900);
        assert_eq!(again.as_ptr(), place);
        assert_eq!(buffers.lock().len(), 0);
        (0..5).for_each(|_| buffers.give_back(Vec::with_capacity(MOST_KEPT / 3)));
        assert_eq!(buffers.lock().len(), 3);
        // One that is much too large stays for those who need it.
        assert!(buffers.take(10).capacity() < 1000);
    }

    #[test]
    fn only_layers_that_follow_each_other_have_a_place() {
        let step = stride(HEADER_LEN + 2 * 4096);
        assert_eq!(chunk_offset(&[30, 30 + step, 30 + 2 * step], 4096), 30);
        assert_eq!(chunk_offset(&[30, 31 + step], 4096), 0);
        assert_eq!((chunk_offset(&[0, step], 4096), chunk_offset(&[], 4096)), (0, 0));
    }
}

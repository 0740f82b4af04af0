//! Files: a header, a table of sections, the sections.
//!
//! All numbers are little-endian. The header (64 bytes) holds the magic bytes, the version, a mark that shows the order
//! of bytes, kind, precision, dimension, number of keys, number of sections and the CRC-32C of the header and the table.
//! A row of the table (32 bytes) holds tag, CRC-32C, offset and length of a section. Sections begin at multiples
//! of 64 bytes, with zeros between them. The map is private: what an opened index changes later (links get
//! shorter or longer) never reaches the file.
//!
//! Checksums find damage. They are no proof that the content makes sense, so every number that a search would
//! trust is checked as well.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crc_fast::{CrcAlgorithm, Digest};
use half::{bf16, f16};
use memmap2::{MmapMut, MmapOptions};

use crate::check::check_rows;
use crate::clusters::ClustersIndex;
use crate::element::Element;
use crate::error::IndexError;
use crate::flat::FlatIndex;
use crate::graph::GraphIndex;
use crate::hnsw::HnswIndex;
use crate::key_index::KeyIndex;
use crate::params::{IndexKind, KeyPrecision};
use crate::rows::Rows;

const MAGIC: &[u8; 8] = b"QUIREANN";
/// The version that is written and read.
pub(crate) const VERSION: u32 = 1;
const ORDER_MARK: u32 = 0x0102_0304;
const HEADER: usize = 64;
const ENTRY: usize = 32;
const ALIGN: usize = 64;
/// Where the checksum lies in the header.
const CHECKSUM_AT: usize = 60;

/// CRC-32C of the parts joined.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    parts.iter().for_each(|part| digest.update(part));
    // 32 bits by the algorithm.
    digest.finalize() as u32
}
/// Sections at most.
const SECTIONS: usize = 1024;

/// What a section holds. The numbers are part of the format. Where there are several graphs, those of the n-th, from
/// 0, are above these by n times [`OF_NEXT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Tag {
    Params = 1,
    Rows = 2,
    Center = 3,
    Codes = 4,
    Scales = 5,
    Mean = 6,
    Factor = 7,
    Entries = 8,
    Links = 9,
    Twins = 10,
    Samples = 11,
    Segments = 12,
    Ids = 13,
    Starts = 14,
    Tail = 15,
    Guides = 16,
    Bars = 17,
    #[allow(dead_code, reason = "only `ivf` has it")]
    Centroids = 18,
    #[allow(dead_code, reason = "only `ivf` has it")]
    Homes = 19,
}

/// See [`Tag`].
const OF_NEXT: u32 = 256;

/// Collects sections and writes them.
pub(crate) struct Sections {
    kind: IndexKind,
    precision: KeyPrecision,
    dim: usize,
    len: usize,
    sections: Vec<(u32, Vec<u8>)>,
    /// What is added to tags.
    above: u32,
}

impl Sections {
    pub(crate) fn new<T: Element>(kind: IndexKind, dim: usize, len: usize) -> Self {
        Self { kind, precision: T::PRECISION, dim, len, sections: Vec::new(), above: 0 }
    }

    /// What comes now belongs to the n-th graph.
    pub(crate) fn of_graph(&mut self, n: usize) {
        self.above = n as u32 * OF_NEXT;
    }

    pub(crate) fn bytes(&mut self, tag: Tag, bytes: Vec<u8>) {
        self.sections.push((tag as u32 + self.above, bytes));
    }

    pub(crate) fn numbers(&mut self, tag: Tag, numbers: impl IntoIterator<Item = u32>) {
        self.bytes(tag, numbers.into_iter().flat_map(u32::to_le_bytes).collect());
    }

    pub(crate) fn floats(&mut self, tag: Tag, numbers: &[f32]) {
        self.numbers(tag, numbers.iter().map(|x| x.to_bits()));
    }

    /// The first `len` rows as they are stored.
    pub(crate) fn rows<T: Element>(&mut self, tag: Tag, rows: &Rows<T>, len: usize) {
        let mut bytes = Vec::with_capacity(len * rows.row_bytes());
        append_rows(&mut bytes, rows, len);
        self.bytes(tag, bytes);
    }

    /// Writes a file beside `path`, brings it to the disk, and gives it the name.
    pub(crate) fn write(self, path: &Path) -> Result<(), IndexError> {
        let failed =
            |e: std::io::Error| IndexError::Io { action: "writing", path: path.to_owned(), reason: e.to_string() };
        // A name of its own for every save: several may write to one path at the same time, and the last is what stays.
        static SAVES: AtomicU64 = AtomicU64::new(0);
        let save = SAVES.fetch_add(1, Ordering::Relaxed);
        let path = &behind_links(path).map_err(failed)?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}.{save}.new", std::process::id()));
        let beside = PathBuf::from(beside);
        let written = self
            .write_to(&beside)
            .and_then(|()| keep_permissions(path, &beside))
            .and_then(|()| std::fs::rename(&beside, path))
            .and_then(|()| sync_folder(path));
        written.map_err(|e| {
            // Nothing can be done about a file that cannot be removed either.
            let _ = std::fs::remove_file(&beside);
            failed(e)
        })
    }

    fn write_to(&self, path: &Path) -> std::io::Result<()> {
        let (mut head, mut table) = (Vec::with_capacity(HEADER), Vec::new());
        let mut offset = (HEADER + ENTRY * self.sections.len()).next_multiple_of(ALIGN);
        for (tag, bytes) in &self.sections {
            table.extend(tag.to_le_bytes());
            table.extend(crc32c(&[bytes]).to_le_bytes());
            table.extend((offset as u64).to_le_bytes());
            table.extend((bytes.len() as u64).to_le_bytes());
            table.extend([0; 8]);
            offset = (offset + bytes.len()).next_multiple_of(ALIGN);
        }
        head.extend(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend(ORDER_MARK.to_le_bytes());
        head.extend(kind_number(self.kind).to_le_bytes());
        head.extend(precision_number(self.precision).to_le_bytes());
        head.extend((self.dim as u64).to_le_bytes());
        head.extend((self.len as u64).to_le_bytes());
        head.extend((self.sections.len() as u32).to_le_bytes());
        head.resize(CHECKSUM_AT, 0);
        let sum = crc32c(&[&head, &table]);
        head.extend(sum.to_le_bytes());
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(&head)?;
        out.write_all(&table)?;
        let mut at = HEADER + table.len();
        for (_, bytes) in &self.sections {
            let start = at.next_multiple_of(ALIGN);
            out.write_all(&vec![0; start - at])?;
            out.write_all(bytes)?;
            at = start + bytes.len();
        }
        out.into_inner().map_err(|e| e.into_error())?.sync_all()
    }
}

/// Where a path leads: a link stays one, and what it names is written, whether that is there already or not. What is there
/// must be a file.
fn behind_links(path: &Path) -> std::io::Result<PathBuf> {
    /// As many as Linux follows.
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let Ok(target) = std::fs::read_link(&path) else {
            return match std::fs::metadata(&path) {
                Ok(found) if !found.is_file() => Err(std::io::Error::other("expected a file or nothing there")),
                _ => Ok(path),
            };
        };
        path = path.parent().map_or_else(|| target.clone(), |folder| folder.join(&target));
    }
    Err(std::io::Error::other("too many links lead to each other"))
}

/// Gives the new file the permissions of the one that it replaces.
fn keep_permissions(old: &Path, new: &Path) -> std::io::Result<()> {
    match std::fs::metadata(old) {
        Ok(old) if old.is_file() => std::fs::set_permissions(new, old.permissions()),
        _ => Ok(()),
    }
}

/// Brings a file's name to the disk, where the system can.
fn sync_folder(of: &Path) -> std::io::Result<()> {
    let folder = of.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// The bytes of stored rows, number by number in little-endian order.
pub(crate) fn append_rows<T: Element>(bytes: &mut Vec<u8>, rows: &Rows<T>, len: usize) {
    for (_, run) in rows.runs(len) {
        T::append_bytes(run, bytes);
    }
}

fn kind_number(kind: IndexKind) -> u32 {
    match kind {
        IndexKind::Flat => 1,
        IndexKind::Hnsw => 2,
        IndexKind::Ivf => 3,
        IndexKind::Graph => 4,
        IndexKind::Clusters => 5,
    }
}

fn precision_number(precision: KeyPrecision) -> u32 {
    match precision {
        KeyPrecision::F32 => 1,
        KeyPrecision::Bf16 => 2,
        KeyPrecision::F16 => 3,
        KeyPrecision::Int8 => 4,
    }
}

/// An opened file whose checksums are right.
#[derive(Clone)]
pub(crate) struct Parts {
    map: Arc<MmapMut>,
    sections: Vec<(u32, usize, usize)>,
    /// What is added to tags.
    above: u32,
    kind: u32,
    precision: u32,
    pub(crate) dim: usize,
    pub(crate) len: usize,
}

/// What is wrong with a file.
pub(crate) type Wrong = String;

impl Parts {
    /// The same file as the n-th graph sees it.
    pub(crate) fn of_graph(&self, n: usize) -> Parts {
        Parts { above: n as u32 * OF_NEXT, ..self.clone() }
    }

    fn find(&self, tag: Tag) -> Result<(usize, usize), Wrong> {
        let found = self.sections.iter().find(|section| section.0 == tag as u32 + self.above);
        found.map(|section| (section.1, section.2)).ok_or_else(|| format!("section {tag:?} is missing"))
    }

    /// The numbers of a section, of which there are `count` where that is known.
    pub(crate) fn numbers(&self, tag: Tag, count: Option<usize>) -> Result<Vec<u32>, Wrong> {
        let (offset, bytes) = self.find(tag)?;
        let found = bytes / 4;
        if bytes % 4 != 0 || count.is_some_and(|count| count != found) {
            return Err(format!("section {tag:?} has {bytes} bytes, expected {count:?} numbers of 4"));
        }
        let four = self.map[offset..offset + bytes].chunks_exact(4);
        Ok(four.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Finite floats.
    pub(crate) fn floats(&self, tag: Tag, count: Option<usize>) -> Result<Vec<f32>, Wrong> {
        let numbers: Vec<f32> = self.numbers(tag, count)?.into_iter().map(f32::from_bits).collect();
        match numbers.iter().all(|x| x.is_finite()) {
            true => Ok(numbers),
            false => Err(format!("section {tag:?} holds a number that is not finite")),
        }
    }

    /// The file, and where a section of that many rows of `row_bytes` bytes lies in it.
    pub(crate) fn place(&self, tag: Tag, rows: usize, row_bytes: usize) -> Result<(&Arc<MmapMut>, usize), Wrong> {
        let (offset, bytes) = self.find(tag)?;
        if rows.checked_mul(row_bytes) != Some(bytes) {
            return Err(format!("section {tag:?} has {bytes} bytes, expected {rows} rows of {row_bytes}"));
        }
        Ok((&self.map, offset))
    }

    /// Stored rows, `skip` of the `total` in the section left out.
    pub(crate) fn rows<T: Element>(&self, tag: Tag, total: usize, skip: usize, count: usize) -> Result<Rows<T>, Wrong> {
        let row_bytes = T::stride(self.dim) * size_of::<T>();
        let (map, offset) = self.place(tag, total, row_bytes)?;
        let rows = Rows::<T>::mapped(self.dim, count, map, offset + skip * row_bytes);
        let rows = rows.ok_or_else(|| format!("section {tag:?} is too short or not aligned"))?;
        let mut row = vec![0.0; self.dim];
        for id in 0..count {
            T::decode(rows.row(id), &mut row);
            check_rows("keys", self.dim, &row).map_err(|e| format!("section {tag:?}, key {}: {e}", skip + id))?;
        }
        Ok(rows)
    }
}

/// Opens an index that [`KeyIndex::save`] has written. `flat`, `graph` and `clusters` search right from the mapped
/// file; `hnsw` is built again from its keys and `ivf` fills its lists again, for their libraries have no readers that are safe
/// on damaged files. Keys that are appended later go to memory.
///
/// While the index lives, the file must not be changed in place by others; replacing or removing it is harmless.
///
/// # Errors
/// [`IndexError::Io`] when the file cannot be read, [`IndexError::Damaged`] when it is not a whole index of this version,
/// [`IndexError::Unsupported`] when it is an `ivf` and this program has none.
pub fn open(path: &Path) -> Result<Box<dyn KeyIndex>, IndexError> {
    let failed = |e: std::io::Error| IndexError::Io { action: "reading", path: path.to_owned(), reason: e.to_string() };
    let file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let damaged = |what: Wrong| IndexError::Damaged { path: path.to_owned(), what };
    if bytes < HEADER as u64 {
        return Err(damaged(format!("{bytes} bytes, expected at least a header of {HEADER}")));
    }
    // SAFETY: the map is private; the contract of `open` forbids changes of the file in place.
    let map = unsafe { MmapOptions::new().map_copy(&file) }.map_err(failed)?;
    let parts = read(map).map_err(damaged)?;
    match parts.precision {
        1 => read_as::<f32>(&parts, &damaged),
        2 => read_as::<bf16>(&parts, &damaged),
        3 => read_as::<f16>(&parts, &damaged),
        4 => read_as::<i8>(&parts, &damaged),
        precision => Err(damaged(format!("unknown precision {precision}"))),
    }
}

/// Checks the frame: header, table and checksums.
fn read(map: MmapMut) -> Result<Parts, Wrong> {
    let word = |at: usize| u32::from_le_bytes([map[at], map[at + 1], map[at + 2], map[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    if &map[..8] != MAGIC {
        return Err("it does not begin as an index does".to_owned());
    }
    if word(12) == ORDER_MARK.swap_bytes() || cfg!(target_endian = "big") {
        return Err("file and machine order the bytes of a number differently".to_owned());
    }
    if word(8) != VERSION {
        return Err(format!("it has format version {}, expected {VERSION}", word(8)));
    }
    let count = word(40) as usize;
    let table = HEADER + ENTRY * count.min(SECTIONS);
    if count > SECTIONS || table > map.len() {
        return Err(format!("{count} sections do not fit"));
    }
    let sum = crc32c(&[&map[..CHECKSUM_AT], &map[HEADER..table]]);
    if sum != word(CHECKSUM_AT) || word(12) != ORDER_MARK {
        return Err(format!("header checksum {sum:08x}, expected {:08x}", word(CHECKSUM_AT)));
    }
    let mut sections: Vec<(u32, usize, usize)> = Vec::with_capacity(count);
    let mut end = table;
    for i in 0..count {
        let at = HEADER + ENTRY * i;
        let (tag, sum, offset, bytes) = (word(at), word(at + 4), long(at + 8), long(at + 16));
        let start = end.next_multiple_of(ALIGN);
        let inside = offset == start as u64 && (map.len() as u64).checked_sub(offset).is_some_and(|rest| bytes <= rest);
        if !inside || map[end..start].iter().any(|&byte| byte != 0) {
            return Err(format!("section {tag}: {bytes} bytes from {offset} on are not where they belong"));
        }
        end = start + bytes as usize;
        let found = crc32c(&[&map[start..end]]);
        if found != sum {
            return Err(format!("section {tag}: checksum {found:08x}, expected {sum:08x}"));
        }
        if sections.iter().any(|&(other, ..)| other == tag) {
            return Err(format!("section {tag} comes twice"));
        }
        sections.push((tag, start, bytes as usize));
    }
    if end != map.len() {
        return Err(format!("{} bytes, expected {end}", map.len()));
    }
    let (kind, precision, dim, len) = (word(16), word(20), long(24), long(32));
    if !(1..=65_536).contains(&dim) || len > crate::blocks::MAX_ROWS as u64 {
        return Err(format!("dimension {dim} and {len} keys are out of range"));
    }
    Ok(Parts { map: Arc::new(map), sections, above: 0, kind, precision, dim: dim as usize, len: len as usize })
}

fn read_as<T: Element>(parts: &Parts, damaged: &dyn Fn(Wrong) -> IndexError) -> Result<Box<dyn KeyIndex>, IndexError> {
    Ok(match parts.kind {
        1 => Box::new(FlatIndex::<T>::read(parts).map_err(damaged)?),
        2 => Box::new(HnswIndex::<T>::read(parts).map_err(damaged)?),
        3 => crate::ivf::read::<T>(parts, damaged)?,
        4 => Box::new(GraphIndex::<T>::read(parts).map_err(damaged)?),
        5 => Box::new(ClustersIndex::<T>::read(parts).map_err(damaged)?),
        kind => return Err(damaged(format!("unknown kind {kind}"))),
    })
}

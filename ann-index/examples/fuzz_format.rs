//! Damages saved indexes for a while: opening must never panic, and what opens must answer.
//!
//! `cargo run --release -p ann-index --example fuzz_format -- --seconds 600`. Half of the damaged files get right
//! checksums again, so that the checks behind those are reached.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use ann_index::{IndexKind, open};
use common::{answers, indexes, mend, mutate};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let after = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)?.parse::<u64>().ok());
    let seconds = after("--seconds").unwrap_or(60);
    let seed = after("--seed").unwrap_or(1);
    let folder = std::env::temp_dir().join(format!("fuzz_format_{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("index");
    let files: Vec<_> = [0, 9, 600, 1100]
        .iter()
        .flat_map(|&keys| indexes(keys))
        .map(|index| {
            index.save(&path).unwrap();
            (index.kind(), answers(&*index), std::fs::read(&path).unwrap())
        })
        .collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (begin, mut tried, mut opened_ones) = (Instant::now(), 0u64, 0u64);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let (kind, expected, whole) = &files[rng.random_range(0..files.len())];
        let mut bytes = whole.clone();
        mutate(&mut bytes, &mut rng);
        let mended = rng.random::<bool>();
        if mended {
            mend(&mut bytes);
        }
        std::fs::write(&path, &bytes).unwrap();
        tried += 1;
        let Ok(opened) = open(&path) else { continue };
        opened_ones += 1;
        assert!(mended || &bytes == whole, "a damaged file was opened: seed {seed}, try {tried}");
        if opened.dim() > 100 {
            continue;
        }
        let found = answers(&*opened);
        assert!(found.iter().all(|f| f.hits.len() == opened.len().min(10)));
        if &bytes == whole && *kind != IndexKind::Hnsw {
            assert_eq!(&found, expected);
        }
        opened.append(&vec![0.5; 2 * opened.dim()]).unwrap();
        answers(&*opened);
    }
    std::fs::remove_dir_all(&folder).unwrap();
    println!("{tried} files in {seconds} s, {opened_ones} of them opened, seed {seed}");
}

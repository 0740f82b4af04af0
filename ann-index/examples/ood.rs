//! A generator of out-of-distribution queries, and the indexes on it.
#![allow(clippy::unwrap_used, missing_docs)]
use ann_index::*;
use std::time::Instant;

const D: usize = 128;
mod data {
    pub(crate) struct Sizes {
        pub(crate) keys: usize,
        pub(crate) growth: usize,
        pub(crate) samples: usize,
        pub(crate) queries: usize,
    }
    pub(crate) struct Dataset {
        #[allow(dead_code)]
        pub(crate) name: &'static str,
        #[allow(dead_code)]
        pub(crate) dim: usize,
        pub(crate) keys: Vec<f32>,
        pub(crate) growth: Vec<f32>,
        pub(crate) samples: Vec<f32>,
        #[allow(dead_code)]
        pub(crate) tuning: Vec<f32>,
        pub(crate) test: Vec<f32>,
    }
    pub(crate) fn round_bf16(x: f32) -> f32 {
        half::bf16::from_f32(x).to_f32()
    }
}
#[path = "/tmp/oodgen.rs"]
mod oodgen;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let n: usize = args[1].parse().unwrap();
    let sq: usize = args[2].parse().unwrap();
    let kinds = &args[3];
    let grow = n / 4;
    let c = oodgen::Character::new(1);
    let sizes = data::Sizes { keys: n, growth: grow, samples: sq, queries: 1000 };
    let d = if std::env::var("IND").is_ok() { c.in_distribution(&sizes) } else { c.out_of_distribution(&sizes) };
    let mut all = d.keys.clone();
    all.extend(&d.growth);
    let keys = &d.keys[..];
    let samples = d.samples;
    let tests = d.test;
    let t = Instant::now();
    let near = exact_neighbours(D, keys, &samples, 100, 0).unwrap();
    println!("knn {:.2} s", t.elapsed().as_secs_f64());
    let truth = exact_neighbours(D, keys, &tests, 100, 0).unwrap();
    let truth2 = exact_neighbours(D, &all, &tests, 100, 0).unwrap();
    for kind in kinds.split(',') {
        let params = IndexParams { kind: kind.parse().unwrap(), ..Default::default() };
        let t = Instant::now();
        let index = build_with_neighbours(D, keys, &samples, &near, &params).unwrap();
        println!(
            "{kind}: build {:.2} s, {} MB, links {} B/key",
            t.elapsed().as_secs_f64(),
            index.memory_bytes() >> 20,
            index.link_bytes() / n
        );
        curve(&*index, &tests, &truth);
        if index.kind() == IndexKind::Flat {
            let buf = vec![1u64; n * D / 4];
            for _ in 0..3 {
                let t = Instant::now();
                let s: u64 = buf.iter().fold(0, |a, b| a.wrapping_add(*b));
                println!("  read {:.1} GB/s {s}", buf.len() as f64 * 8.0 / t.elapsed().as_secs_f64() / 1e9);
            }
            for g in [1usize, 2, 4, 8] {
                let p = SearchParams::default();
                let t = Instant::now();
                for i in 0..50 {
                    index.search_group(&tests[i * D..(i + g) * D], &p, None).unwrap();
                }
                let us = t.elapsed().as_secs_f64() * 1e6 / 50.0;
                println!("  group {g}: {us:.0} us, {:.1} GB/s", (n * D * 2) as f64 / us / 1e3);
            }
        }
        if args.len() > 4 {
            let t = Instant::now();
            for part in all[n * D..].chunks(D * 1024) {
                index.append(part).unwrap();
            }
            println!("append {:.2} s", t.elapsed().as_secs_f64());
            curve(&*index, &tests, &truth2);
        }
    }
}

fn curve(index: &dyn KeyIndex, tests: &[f32], truth: &Neighbours) {
    let efs: &[usize] = match index.kind() {
        IndexKind::Flat => &[1],
        _ => &[100, 128, 160, 200, 256, 384, 512],
    };
    for &ef in efs {
        let p = SearchParams { k: 100, ef, probes: if index.kind() == IndexKind::Clusters { ef * 4 } else { 0 } };
        for q in tests.chunks(D).take(100) {
            index.search(q, &p, None).unwrap();
        }
        let t = Instant::now();
        let (mut good, mut stats) = (0, SearchStats::default());
        let mut found = Vec::new();
        for q in tests.chunks(D) {
            let r = index.search(q, &p, None).unwrap();
            stats += r.stats;
            found.push(r.hits);
        }
        let us = t.elapsed().as_secs_f64() * 1e6 / 1000.0;
        for (r, t) in found.iter().zip(truth.lists()) {
            good += r.iter().filter(|h| t.contains(&h.id)).count();
        }
        println!(
            "  ef {ef:4}: recall {:.4} touched {:6} ({:.2} %) visited {:5} bytes {:8} {us:8.1} us",
            good as f64 / 100_000.0,
            stats.keys_touched / 1000,
            stats.keys_touched as f64 / 10.0 / index.len() as f64,
            stats.nodes_visited / 1000,
            stats.bytes / 1000
        );
    }
}

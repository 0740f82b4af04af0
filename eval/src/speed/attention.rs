//! Attention of one new token over a long context, in one layer: a device's kernel beside cuDNN's.

use serde_json::{Value, json};

use super::gpu_peer::{GpuPeer, GpuPeerOptions};
use super::{Side, SpeedReport, length_name, round};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};

/// Bytes of a number of KV.
const BF16: usize = 2;

/// What one call attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences, each with its own KV and one query.
    pub batch: usize,
    /// Tokens of KV of each.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Llama-3.1-8B's heads, which the peer has too.
    fn llama_8b(batch: usize, tokens: usize) -> AttentionShape {
        AttentionShape { batch, tokens, heads: 32, kv_heads: 8, head_dim: 128 }
    }

    /// Bytes of keys and values in bf16: each must be read once.
    fn kv_bytes(&self) -> f64 {
        (2 * self.batch * self.tokens * self.kv_heads * self.head_dim * BF16) as f64
    }
}

/// The device that is measured.
pub trait DeviceAttention {
    /// Its name, for the settings of records.
    fn name(&self) -> String;

    /// Seconds of one layer's attention, `repeats` times, over random bf16 KV that no cache of the device holds, with a
    /// kernel whose result was compared with the definition.
    ///
    /// # Errors
    /// What keeps the device from it.
    fn decode_attention(&mut self, shape: &AttentionShape, repeats: usize) -> Result<Vec<f64>>;

    /// GB/s of a copy inside of the device's memory, bytes read and bytes written both counted.
    ///
    /// # Errors
    /// What keeps the device from it.
    fn copy_bandwidth(&mut self) -> Result<f64>;
}

/// What [`bench_attention_decode`] measures.
#[derive(Debug, Clone)]
pub struct AttentionOptions {
    /// Tokens of KV of a sequence.
    pub tokens: usize,
    /// Numbers of sequences.
    pub batches: Vec<usize>,
    /// Calls of a round.
    pub repeats: usize,
    /// Timed rounds in which the sides alternate; one more warms up.
    pub rounds: usize,
    /// The other side.
    pub peer: GpuPeerOptions,
    /// The model's name in the cases of records.
    pub model_label: String,
    /// Where records go.
    pub output: Output,
}

/// Kernels of PyTorch that are measured, and their names in records.
const PEERS: [(&str, &str); 2] = [("cudnn", "cuDNN"), ("flash", "FlashAttention in PyTorch")];

/// Measures attention of one layer on a device, alternating with cuDNN's in PyTorch.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::Peer`]; those of the device.
pub fn bench_attention_decode(
    device: &mut dyn DeviceAttention,
    options: &AttentionOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    let counts = [("tokens", options.tokens), ("batches", options.batches.len()), ("rounds", options.rounds)];
    let sizes =
        counts.into_iter().chain([("repeats", options.repeats)]).chain(options.batches.iter().map(|b| ("batch", *b)));
    if let Some((what, _)) = sizes.into_iter().find(|(_, count)| *count == 0) {
        return Err(EvalError::BadOption { what, found: "0".into(), expected: "at least 1".into() });
    }
    let steps = options.batches.len() * (options.rounds + 1);
    let mut meter = Meter::new(steps, steps as f64, progress);
    let run = RunInfo::start(&options.output);
    let copy = device.copy_bandwidth()?;
    meter.say(format!("{}: copies {copy:.0} GB/s", device.name()));
    let mut peer = GpuPeer::start(&options.peer)?;
    let mut records = Vec::new();
    for &batch in &options.batches {
        let shape = AttentionShape::llama_8b(batch, options.tokens);
        let sides = alternate(device, peer.as_mut(), &shape, options, &mut meter)?;
        let config = config(&device.name(), peer.as_ref(), &shape, options, &sides);
        let case = format!("{}/{}/b{batch}", options.model_label, length_name(options.tokens));
        records.extend(figures(&run.clone().with_config(config), &case, &shape, copy, &sides));
    }
    run.write(&records)?;
    Ok(SpeedReport { records })
}

/// The seconds of all sides.
struct Sides {
    ours: Side,
    /// Only those that could be measured.
    theirs: Vec<Side>,
    /// Why others could not.
    errors: Vec<String>,
}

fn alternate(
    device: &mut dyn DeviceAttention,
    mut peer: Option<&mut GpuPeer>,
    shape: &AttentionShape,
    options: &AttentionOptions,
    meter: &mut Meter<'_>,
) -> Result<Sides> {
    let mut sides = Sides { ours: Side::new("quire"), theirs: Vec::new(), errors: Vec::new() };
    for round in 0..=options.rounds {
        let seconds = device.decode_attention(shape, options.repeats)?;
        if round > 0 {
            sides.ours.seconds.extend(seconds);
        }
        if let Some(peer) = &mut peer {
            for (kind, name) in PEERS {
                sides.add(peer, kind, name, shape, round == 0)?;
            }
        }
        let state = if round == 0 { "warm-up" } else { "timed" };
        meter.advance(1, 1.0, format!("attention of {} tokens x {}: {state}", shape.tokens, shape.batch));
    }
    Ok(sides)
}

impl Sides {
    /// A round of one peer; none any more once it has failed.
    fn add(&mut self, peer: &mut GpuPeer, kind: &str, name: &str, shape: &AttentionShape, warm_up: bool) -> Result<()> {
        let part = format!("attention:{kind}:{}:{}", shape.tokens, shape.batch);
        if self.errors.iter().any(|reason| reason.starts_with(&part)) {
            return Ok(());
        }
        match peer.time(&part)? {
            Err(reason) => {
                self.theirs.retain(|side| side.name != name);
                self.errors.push(reason);
            }
            Ok(_) if warm_up => self.theirs.push(Side::new(name)),
            Ok(samples) => {
                let side = self.theirs.iter_mut().find(|side| side.name == name);
                side.into_iter().for_each(|side| side.seconds.extend(samples.iter().map(|ms| ms / 1e3)));
            }
        }
        Ok(())
    }
}

fn config(
    device: &str,
    peer: Option<&GpuPeer>,
    shape: &AttentionShape,
    options: &AttentionOptions,
    sides: &Sides,
) -> Value {
    json!({
        "device": device, "batch": shape.batch, "tokens": shape.tokens, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "kv": "bf16, random",
        "kv_bytes": shape.kv_bytes(), "rounds": options.rounds, "repeats": options.repeats,
        "copy_bandwidth_counts": "bytes read and bytes written",
        "peer": peer.map(|peer| peer.version.clone()), "peer_errors": sides.errors,
    })
}

fn figures(info: &RunInfo, case: &str, shape: &AttentionShape, copy: f64, sides: &Sides) -> Vec<Record> {
    let (ms, samples) = (sides.ours.median_ms(), sides.ours.seconds.len());
    let record = |metric, unit, value: f64, figure: &dyn Fn(f64) -> f64| {
        let mut record = info.record("attention-decode", case, metric, unit, round(value), samples);
        record.peers = sides.theirs.iter().map(|s| (s.name.clone(), round(figure(s.median_ms())))).collect();
        record
    };
    let rate = |ms: f64| shape.kv_bytes() / ms / 1e6;
    let mut time = record("ms_per_layer", "ms", ms, &|ms| ms);
    time.floor = Some(round(shape.kv_bytes() / copy / 1e6));
    let mut records = vec![
        time,
        record("bandwidth", "GB/s", rate(ms), &rate),
        record("bandwidth_share", "ratio", rate(ms) / copy, &|ms| rate(ms) / copy),
        info.record("attention-decode", case, "copy_bandwidth", "GB/s", round(copy), 1),
    ];
    for ((_, name), metric) in PEERS.into_iter().zip(["ratio_to_cudnn", "ratio_to_flash"]) {
        let theirs = sides.theirs.iter().find(|side| side.name == name).map(Side::median_ms);
        records.extend(
            theirs.map(|peer| info.record("attention-decode", case, metric, "ratio", round(peer / ms), samples)),
        );
    }
    records
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A device of known times.
    struct Known {
        calls: Vec<AttentionShape>,
    }

    impl DeviceAttention for Known {
        fn name(&self) -> String {
            "made up".into()
        }

        fn decode_attention(&mut self, shape: &AttentionShape, repeats: usize) -> Result<Vec<f64>> {
            self.calls.push(*shape);
            // The warm-up is slow; it must not count.
            let seconds = if self.calls.len() == 1 { 1.0 } else { 2.68435456e-4 };
            Ok(vec![seconds; repeats])
        }

        fn copy_bandwidth(&mut self) -> Result<f64> {
            Ok(2500.0)
        }
    }

    fn options() -> AttentionOptions {
        AttentionOptions {
            tokens: 131_072,
            batches: vec![1],
            repeats: 4,
            rounds: 3,
            peer: GpuPeerOptions { enabled: false, ..GpuPeerOptions::default() },
            model_label: "8b".into(),
            output: Output { results_dir: None, ..Output::default() },
        }
    }

    #[test]
    fn shares_are_of_the_copy_bandwidth_and_the_warm_up_does_not_count() {
        let mut device = Known { calls: Vec::new() };
        let report = bench_attention_decode(&mut device, &options(), &mut |_| {}).unwrap();
        let record = |metric: &str| report.records.iter().find(|r| r.metric == metric).unwrap();
        // 512 MiB in .268 ms.
        assert_eq!((record("bandwidth").value, record("bandwidth_share").value), (2000.0, 0.8));
        assert_eq!(record("ms_per_layer").floor, Some(0.21475));
        assert_eq!((record("ms_per_layer").samples, device.calls.len()), (12, 4));
        assert_eq!(record("ms_per_layer").case, "8b/128k/b1");
        assert!(!report.records.iter().any(|r| r.metric.starts_with("ratio_")));
    }

    #[test]
    fn ratios_are_to_each_peer_that_could_be_measured() {
        let side = |name: &str, ms: f64| Side { name: name.into(), seconds: vec![ms / 1e3; 3] };
        let theirs = vec![side("cuDNN", 3.0)];
        let sides = Sides { ours: side("quire", 2.0), theirs, errors: vec!["attention:flash:8:1: none".into()] };
        let info = RunInfo::start(&options().output);
        let records = figures(&info, "8b/128k/b8", &AttentionShape::llama_8b(8, 131_072), 4000.0, &sides);
        let ratio = records.iter().find(|r| r.metric == "ratio_to_cudnn").unwrap();
        assert_eq!(ratio.value, 1.5);
        assert!(!records.iter().any(|r| r.metric == "ratio_to_flash"));
        assert_eq!(records[0].peers["cuDNN"], 3.0);
    }

    #[test]
    fn senseless_options_are_refused() {
        for bad in [
            AttentionOptions { batches: vec![], ..options() },
            AttentionOptions { batches: vec![1, 0], ..options() },
            AttentionOptions { rounds: 0, ..options() },
            AttentionOptions { repeats: 0, ..options() },
        ] {
            let refused = bench_attention_decode(&mut Known { calls: Vec::new() }, &bad, &mut |_| {});
            assert!(matches!(refused, Err(EvalError::BadOption { .. })));
        }
    }
}

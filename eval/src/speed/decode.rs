//! Writing an answer: the time of a token behind a long prompt, and its distance from the floor.

use engine::{DecodeStats, Engine, Prompt, Request, Strategy};
use serde_json::{Value, json};

use super::membw::FloorRate;
use super::peer::{CACHES, DTYPES, Peer};
use super::prefill::{same, start_peer};
use super::prompt::prompt;
use super::{Side, SpeedOptions, SpeedReport, fastest_ms, length_name, place, round, with_peers};
use crate::ask::{Answer, ask};
use crate::error::Result;
use crate::progress::{Meter, Progress};
use crate::record::{Record, RunInfo};

/// Measures the time between the tokens of an answer, alternating with the peer for strategy `full`; both must begin
/// with the same token before anything is timed.
///
/// The floor of a token is the bytes that it must read once - all weights, the output matrix among them, and the KV of
/// the prompt and of half the answer - over the measured read rate with the same number of threads. The rate
/// is the higher one of a large buffer and of a buffer of just these bytes, which caches may hold: the stricter floor.
///
/// # Errors
/// As [`bench_prefill`](super::bench_prefill).
pub fn bench_decode(
    engine: &Engine,
    options: &SpeedOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check()?;
    let steps = options.lengths.len() * options.strategies.len() * (options.repeats + 1);
    let cost: usize = options.lengths.iter().sum::<usize>() * options.strategies.len() * (options.repeats + 1);
    let mut meter = Meter::new(steps, cost as f64, progress);
    let mut peer =
        if options.strategies.contains(&Strategy::Full) { start_peer(engine, options, &mut meter)? } else { None };
    let mut bench = Bench { engine, options, records: Vec::new(), info: RunInfo::start(&options.output) };
    for &length in &options.lengths {
        for &strategy in &options.strategies {
            bench.case(length, strategy, &mut peer, &mut meter)?;
        }
    }
    bench.info.write(&bench.records)?;
    Ok(SpeedReport { records: bench.records })
}

struct Bench<'a> {
    engine: &'a Engine,
    options: &'a SpeedOptions,
    records: Vec<Record>,
    info: RunInfo,
}

/// What one case has measured.
struct Measured {
    ours: Side,
    theirs: Vec<Side>,
    /// Leading tokens that all sides agree on, in the warm-up.
    agreeing: Option<usize>,
    decode: DecodeStats,
    floor_bytes: u64,
    rate: FloorRate,
}

impl Bench<'_> {
    fn case(
        &mut self,
        length: usize,
        strategy: Strategy,
        peer: &mut Option<Peer>,
        meter: &mut Meter<'_>,
    ) -> Result<()> {
        let measured = self.measure(length, strategy, peer, meter)?;
        let config = self.options.config(self.engine, self.config(peer.as_ref(), strategy, &measured));
        let info = self.info.clone().with_config(config);
        let case = format!("{}/{}/{}/{strategy}", self.options.model_label, length_name(length), place(self.engine));
        self.records.extend(figures(&info, &case, &measured));
        Ok(())
    }

    fn measure(
        &self,
        length: usize,
        strategy: Strategy,
        peer: &mut Option<Peer>,
        meter: &mut Meter<'_>,
    ) -> Result<Measured> {
        let tokens = prompt(self.engine, &self.options.text, length)?.tokens();
        let mut peer = peer.as_mut().filter(|_| strategy == Strategy::Full);
        if let Some(peer) = &mut peer {
            peer.prompt(&tokens)?;
        }
        let floor_bytes = self.floor_bytes(length);
        meter.say("measuring the read bandwidth");
        let rate = FloorRate::measure(self.engine.threads(), floor_bytes, self.options.repeats)?;
        let variants = DTYPES.iter().flat_map(|dtype| CACHES.iter().map(move |cache| (*dtype, *cache)));
        let variants: Vec<(&str, &str)> = variants.filter(|_| peer.is_some()).collect();
        let named = variants.iter().map(|(dtype, cache)| Side::new(format!("transformers {dtype} {cache} cache")));
        let mut measured = Measured {
            ours: Side::new("quire"),
            theirs: named.collect(),
            agreeing: None,
            decode: DecodeStats::default(),
            floor_bytes,
            rate,
        };
        for round in 0..=self.options.repeats {
            let warm_up = round == 0;
            let answer = self.ours(&tokens, strategy)?;
            let gaps = (answer.ids.len().max(2) - 1) as f64;
            measured.decode = answer.finished.decode;
            if !warm_up {
                measured.ours.seconds.push(answer.rest_seconds / gaps);
            }
            if let Some(peer) = &mut peer {
                self.theirs(peer, &variants, &answer, warm_up, &mut measured)?;
            }
            let state = if warm_up { "warm-up" } else { "timed" };
            let ms = answer.rest_seconds / gaps * 1e3;
            meter.advance(1, length as f64, format!("decode {length} {strategy}: {state}, {ms:.2} ms a token"));
        }
        Ok(measured)
    }

    fn ours(&self, tokens: &[u32], strategy: Strategy) -> Result<Answer> {
        let mut request = Request::new(Prompt::plain(tokens.to_vec()), self.options.decode_tokens);
        request.ignore_eos = true;
        request.attention.strategy = strategy;
        ask(self.engine, request)
    }

    fn theirs(
        &self,
        peer: &mut Peer,
        variants: &[(&str, &str)],
        answer: &Answer,
        warm_up: bool,
        measured: &mut Measured,
    ) -> Result<()> {
        for ((dtype, cache), side) in variants.iter().zip(&mut measured.theirs) {
            let (seconds, chosen) = peer.decode(dtype, cache, self.options.decode_tokens)?;
            if warm_up {
                same(&format!("first token, {}", side.name), &answer.ids, &chosen)?;
                let equal = answer.ids.iter().zip(&chosen).take_while(|(a, b)| a == b).count();
                measured.agreeing = Some(measured.agreeing.map_or(equal, |least| least.min(equal)));
            } else {
                side.seconds.push(seconds / (chosen.len().max(2) - 1) as f64);
            }
        }
        Ok(())
    }

    /// Weights, and KV of the prompt and of half the answer.
    fn floor_bytes(&self, length: usize) -> u64 {
        let shape = self.engine.kv_shape();
        let token = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.size();
        (self.engine.weight_bytes_per_step() + token * (length + self.options.decode_tokens / 2)) as u64
    }

    fn config(&self, peer: Option<&Peer>, strategy: Strategy, measured: &Measured) -> Value {
        let mut config = json!({
            "decode_tokens": self.options.decode_tokens, "strategy": strategy, "floor_bytes": measured.floor_bytes,
            "read_gb_s_large_buffer": round(measured.rate.large),
            "read_gb_s_floor_sized_buffer": round(measured.rate.resident),
        });
        if let (Some(peer), Some(equal), Value::Object(config)) = (peer, measured.agreeing, &mut config) {
            config.insert("peer".into(), peer.version.clone().into());
            config.insert("peer_settings".into(), "sdpa, last logits only, greedy loop without generate()".into());
            config.insert("leading_tokens_equal".into(), equal.into());
        }
        config
    }
}

fn figures(info: &RunInfo, case: &str, measured: &Measured) -> Vec<Record> {
    let (ms, samples) = (measured.ours.median_ms(), measured.ours.seconds.len());
    let record = |metric, unit, value| info.record("decode", case, metric, unit, value, samples);
    let theirs = &measured.theirs;
    let floor_ms = measured.floor_bytes as f64 / measured.rate.strict() / 1e6;
    let mut time = with_peers(record("time_per_token", "ms", ms), theirs, |ms| ms);
    time.floor = Some(round(floor_ms));
    let mut rate = with_peers(record("tokens_per_second", "tokens/s", 1e3 / ms), theirs, |ms| 1e3 / ms);
    rate.floor = Some(round(1e3 / floor_ms));
    let bandwidth = measured.floor_bytes as f64 / ms / 1e6;
    let mut records = vec![
        time,
        rate,
        with_peers(record("floor_share", "ratio", floor_ms / ms), theirs, |ms| floor_ms / ms),
        record("achieved_bandwidth", "GB/s", round(bandwidth)),
        record("read_bandwidth_large_buffer", "GB/s", round(measured.rate.large)),
        record("read_bandwidth_floor_sized_buffer", "GB/s", round(measured.rate.resident)),
    ];
    if let Some(best) = fastest_ms(theirs) {
        records.push(with_peers(record("ratio_to_transformers", "ratio", best / ms), theirs, |peer| peer / ms));
    }
    let shares = [
        ("cold_keys_touched", measured.decode.scored_share()),
        ("cold_keys_attended", measured.decode.attended_share()),
    ];
    for (metric, share) in shares {
        records.extend(share.map(|share| record(metric, "%", round(100.0 * share))));
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Output;

    #[test]
    fn floor_and_ratio_follow_from_the_medians() {
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let side = |name: &str, ms: f64| Side { name: name.into(), seconds: vec![ms / 1e3; 5] };
        let measured = Measured {
            ours: side("quire", 2.0),
            theirs: vec![side("transformers f32 dynamic cache", 12.0), side("transformers bf16 static cache", 8.0)],
            agreeing: Some(9),
            decode: DecodeStats { cold_keys: 200, keys_scored: 200, keys_attended: 50, ..DecodeStats::default() },
            floor_bytes: 40_000_000,
            rate: FloorRate { large: 20.0, resident: 40.0 },
        };
        let records = figures(&info, "ref/8k/cpu/full", &measured);
        let value = |metric: &str| records.iter().find(|r| r.metric == metric).map(|r| (r.value, r.floor));
        assert_eq!(value("time_per_token"), Some((2.0, Some(1.0))));
        assert_eq!(value("floor_share"), Some((0.5, None)));
        assert_eq!(value("ratio_to_transformers"), Some((4.0, None)));
        assert_eq!(value("tokens_per_second"), Some((500.0, Some(1000.0))));
        assert_eq!(value("cold_keys_attended"), Some((25.0, None)));
        assert_eq!(records[0].peers["transformers f32 dynamic cache"], 12.0);
    }
}

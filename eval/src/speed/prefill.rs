//! Reading a prompt: from handing it in to the first token.

use engine::{Engine, Prompt, Request};
use serde_json::json;

use super::peer::{DTYPES, Peer};
use super::prompt::prompt;
use super::{Side, SpeedOptions, SpeedReport, fastest_ms, length_name, place, round, with_peers};
use crate::ask::ask;
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Record, RunInfo};

/// Measures the time to the first token of prompts, alternating with the peer; both must choose the same token before
/// anything is timed. Ours includes queue and channel, the peer's only the forward pass and the choice.
///
/// # Errors
/// [`EvalError::BadOption`]; [`EvalError::Peer`]; [`EvalError::Disagreement`]; those of the engine and of reading data.
pub fn bench_prefill(
    engine: &Engine,
    options: &SpeedOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<SpeedReport> {
    options.check()?;
    let cost: usize = options.lengths.iter().sum::<usize>() * (options.repeats + 1);
    let mut meter = Meter::new(options.lengths.len() * (options.repeats + 1), cost as f64, progress);
    let mut peer = start_peer(engine, options, &mut meter)?;
    let version = peer.as_ref().map_or("none", |p| p.version.as_str()).to_owned();
    let config = options.config(engine, json!({"peer": version, "peer_settings": "sdpa, last logits only"}));
    let info = RunInfo::start(&options.output).with_config(config);
    let mut records = Vec::new();
    for &length in &options.lengths {
        let tokens = prompt(engine, &options.text, length)?.tokens();
        if let Some(peer) = &mut peer {
            peer.prompt(&tokens)?;
        }
        let mut ours = Side::new("quire");
        let names = if peer.is_some() { &DTYPES[..] } else { &[] };
        let mut theirs: Vec<Side> = names.iter().map(|dtype| Side::new(format!("transformers {dtype}"))).collect();
        for round in 0..=options.repeats {
            let warm_up = round == 0;
            let answer = ask(engine, Request::new(Prompt::plain(tokens.clone()), 1))?;
            if !warm_up {
                ours.seconds.push(answer.first_seconds);
            }
            for (dtype, side) in DTYPES.iter().zip(&mut theirs) {
                let Some(peer) = &mut peer else { break };
                let (seconds, chosen) = peer.prefill(dtype)?;
                if warm_up {
                    same(&format!("first token of {length}, {}", side.name), &answer.ids, &chosen)?;
                } else {
                    side.seconds.push(seconds);
                }
            }
            let state = if warm_up { "warm-up, tokens agree" } else { "timed" };
            meter.advance(1, length as f64, format!("prefill {length}: {state}, {:.0} ms", answer.first_seconds * 1e3));
        }
        // On a GPU, how many bf16 numbers an activation is split into decides the time.
        let how = if engine.gpu().is_none() {
            place(engine)
        } else if engine.rounds_activations() {
            "bf16-one-half"
        } else {
            "bf16-two-halves"
        };
        let case = format!("{}/{}/{how}", options.model_label, length_name(length));
        records.extend(figures(&info, &case, length, &ours, &theirs));
    }
    info.write(&records)?;
    Ok(SpeedReport { records })
}

/// The peer, unless it is not wanted.
pub(super) fn start_peer(engine: &Engine, options: &SpeedOptions, meter: &mut Meter<'_>) -> Result<Option<Peer>> {
    if !options.peer.enabled {
        return Ok(None);
    }
    meter.say(format!("starting {} with transformers", options.peer.python.display()));
    Peer::start(&options.peer, engine.threads()).map(Some)
}

/// Both sides must begin with the same token.
pub(super) fn same(what: &str, ours: &[u32], theirs: &[u32]) -> Result<()> {
    match (ours.first(), theirs.first()) {
        (Some(a), Some(b)) if a == b => Ok(()),
        (a, b) => {
            let (ours, theirs) = (a.copied().unwrap_or_default(), b.copied().unwrap_or_default());
            Err(EvalError::Disagreement { what: what.into(), ours, theirs })
        }
    }
}

fn figures(info: &RunInfo, case: &str, length: usize, ours: &Side, theirs: &[Side]) -> Vec<Record> {
    let (ms, samples) = (ours.median_ms(), ours.seconds.len());
    let record = |metric, unit, value| info.record("prefill", case, metric, unit, value, samples);
    let rate = |ms: f64| length as f64 * 1e3 / ms;
    let mut records = vec![
        with_peers(record("time_to_first_token", "ms", ms), theirs, |ms| ms),
        record("seconds", "s", round(ms / 1e3)),
        with_peers(record("tokens_per_second", "tokens/s", rate(ms)), theirs, rate),
    ];
    if let Some(best) = fastest_ms(theirs) {
        let ratio = with_peers(record("ratio_to_transformers", "ratio", best / ms), theirs, |peer| peer / ms);
        records.push(Record { value: round(best / ms), ..ratio });
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Output;

    #[test]
    fn the_ratio_is_to_the_faster_format_and_tokens_must_agree() {
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let side = |name: &str, seconds: f64| Side { name: name.into(), seconds: vec![seconds; 3] };
        let theirs = [side("transformers f32", 8.0), side("transformers bf16", 3.0)];
        let records = figures(&info, "ref/2k/cpu", 2048, &side("quire", 2.0), &theirs);
        let ratio = records.iter().find(|r| r.metric == "ratio_to_transformers");
        assert!(ratio.is_some_and(|r| r.value == 1.5 && r.samples == 3 && r.peers["transformers f32"] == 4.0));
        assert_eq!((records[1].value, records[2].value), (2.0, 1024.0));
        assert_eq!(figures(&info, "ref/2k/cpu", 2048, &side("quire", 2.0), &[]).len(), 3);
        assert!(same("x", &[1], &[1, 2]).is_ok());
        assert!(same("x", &[1], &[2]).is_err() && same("x", &[], &[2]).is_err());
    }
}

//! Benches of an engine under load and of a device, from the command line to their options.

use engine::{Engine, EngineConfig};
use eval::{
    AttentionOptions, BatchDecodeOptions, DeviceAttention, EvalError, GpuPeerOptions, MixedLoadOptions, PromptSource,
    bench_attention_decode, bench_batch_decode, bench_mixed_load, time_decode_peers,
};

use super::args::{DecodeArgs, PromptArg, ServeBenchArgs};
use super::bench::print;
use super::eval::{data_source, output, with_progress};
use super::output::Out;
use crate::config::Settings;
use crate::error::Result;

/// The engine's settings, with room for so many requests at the same time.
fn engine_for(settings: &Settings, requests: usize) -> Result<EngineConfig> {
    let config = settings.engine()?;
    let (max_sequences, queue) = (config.max_sequences.max(requests), config.queue.max(requests));
    Ok(EngineConfig { max_sequences, queue, ..config })
}

/// The peer is measured before the engine takes the device's memory.
pub(super) fn batch_decode(settings: &Settings, args: DecodeArgs, out: &Out) -> Result<()> {
    let speed = args.speed;
    let config = engine_for(settings, args.batch.iter().copied().max().unwrap_or(1))?;
    let options = BatchDecodeOptions {
        lengths: speed.lengths,
        length_name: args.length_name,
        batches: args.batch,
        tokens: speed.tokens,
        repeats: speed.repeats,
        strategies: speed.strategies.into_iter().map(|named| named.0).collect(),
        prompt: match args.prompt {
            PromptArg::Random => PromptSource::Random { seed: 1 },
            PromptArg::Text => PromptSource::Text(data_source(&speed.data)?),
        },
        prefill_chunk: config.prefill_chunk,
        model_label: speed.label,
        output: output(&speed.records),
    };
    let peer = GpuPeerOptions {
        python: speed.python,
        model_dir: Some(config.model_dir.clone()),
        device: args.peer_device,
        enabled: !speed.no_peer,
    };
    let peers = with_progress(out, |progress| Ok(time_decode_peers(&options, &peer, progress)?))?;
    let engine = Engine::load(config)?;
    let report = with_progress(out, |progress| Ok(bench_batch_decode(&engine, &peers, &options, progress)?))?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

pub(super) fn mixed_load(settings: &Settings, args: &ServeBenchArgs, out: &Out) -> Result<()> {
    let config = engine_for(settings, args.sequences + if args.rate.is_some() { args.arrivals } else { 1 })?;
    let options = MixedLoadOptions {
        sequences: args.sequences,
        context_tokens: args.context,
        answer_tokens: args.answer_tokens,
        alone_tokens: args.alone,
        arrivals: args.arrivals,
        arrival_tokens: args.arrival_tokens,
        rate: args.rate,
        strategy: settings.strategy.0,
        seed: args.seed,
        prefill_chunk: config.prefill_chunk,
        model_label: args.label.clone(),
        output: output(&args.records),
    };
    let engine = Engine::load(config)?;
    let report = with_progress(out, |progress| Ok(bench_mixed_load(&engine, &options, progress)?))?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

pub(super) fn attention_decode(options: &AttentionOptions, out: &Out) -> Result<()> {
    let mut device = device_attention()?;
    let report = with_progress(out, |progress| Ok(bench_attention_decode(device.as_mut(), options, progress)?))?;
    print(&report, &report.table(), out);
    Ok(())
}

/// The device whose attention is measured. The engine computes on the CPU only, where decoding is measured whole.
fn device_attention() -> Result<Box<dyn DeviceAttention>> {
    let why = "expected a GPU that the engine computes on; `quire bench decode` measures the CPU's attention as part of \
               a token";
    Err(EvalError::NoDevice { bench: "attention-decode", why: why.into() }.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_engine_has_room_for_the_batch_and_never_less_than_is_set() {
        let settings = Settings { model: Some("/models/one".into()), ..Settings::default() };
        let config = engine_for(&settings, 64).unwrap();
        assert_eq!((config.max_sequences, config.queue), (64, 64));
        assert_eq!(engine_for(&settings, 1).unwrap().max_sequences, settings.max_sequences);
    }
}

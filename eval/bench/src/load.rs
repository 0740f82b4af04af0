//! Benches of an engine under load and of a device, from the command line to their options.

use engine::{CudaConfig, Engine, EngineConfig, ModelSpec, SamplingParams, find_gpu};
use eval::{
    AttentionOptions, AttentionShape, BatchDecodeOptions, DeviceAttention, GpuPeerOptions, MixedLoadOptions,
    PromptSource, Scattered, ScatteredOptions, bench_attention_decode, bench_batch_decode, bench_ingest_load,
    bench_mixed_load, bench_scattered, time_decode_peers,
};

use super::args::{DecodeArgs, PromptArg, ServeBenchArgs};
use super::dispatch::print;
use super::quality::{data_source, output, with_progress};
use crate::error::Result;
use quire::cli::Out;
use settings::Settings;

/// The engine's settings, with room for so many requests at the same time.
fn engine_for(settings: &Settings, requests: usize) -> Result<EngineConfig> {
    let config = settings.engine()?;
    let (max_sequences, queue) = (config.max_sequences.max(requests), config.queue.max(requests));
    // Every prompt is to be read.
    Ok(EngineConfig { max_sequences, queue, prefix_cache: false, ..config })
}

/// The peer is measured before the engine takes the device's memory.
pub(super) fn batch_decode(settings: &Settings, args: DecodeArgs, out: &Out) -> Result<()> {
    let speed = args.speed;
    let config = engine_for(settings, args.batch.iter().copied().max().unwrap_or(1))?;
    let config = EngineConfig { wait_for_index: true, ..config };
    let options = BatchDecodeOptions {
        lengths: speed.lengths,
        length_name: args.length_name,
        batches: args.batch,
        tokens: speed.tokens,
        repeats: speed.repeats,
        strategies: speed.strategies.into_iter().map(|named| named.0).collect(),
        // With one seed, sequences with one prompt have one answer.
        sampling: SamplingParams {
            temperature: settings.temperature.unwrap_or(0.0),
            top_p: args.top_p,
            top_k: args.top_k,
            seed: Some(1),
            ..SamplingParams::default()
        },
        prompt: match args.prompt {
            PromptArg::Random => PromptSource::Random { seed: 1 },
            PromptArg::Text => PromptSource::Text(data_source(&speed.data)?),
        },
        prefill_chunk: config.prefill_chunk,
        step_tokens: config.step_tokens,
        mixed_prefill_tokens: config.mixed_prefill_tokens,
        model_label: speed.label,
        output: output(&speed.records)?,
    };
    // Before minutes of measuring.
    let context = ModelSpec::from_dir(&config.model_dir)?.max_context;
    options.check_context(config.max_context.map_or(context, |limit| limit.min(context)))?;
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
        step_tokens: config.step_tokens,
        mixed_prefill_tokens: config.mixed_prefill_tokens,
        model_label: args.label.clone(),
        output: output(&args.records)?,
    };
    let engine = Engine::load(config)?;
    let report = with_progress(out, |progress| match args.ingest {
        true => Ok(bench_ingest_load(&engine, &options, args.chunk_tokens, progress)?),
        false => Ok(bench_mixed_load(&engine, &options, progress)?),
    })?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

pub(super) fn attention_decode(settings: &Settings, options: &AttentionOptions, out: &Out) -> Result<()> {
    let mut gpu = Gpu::find(settings.cuda())?;
    let report = with_progress(out, |progress| Ok(bench_attention_decode(&mut gpu, options, progress)?))?;
    print(&report, &report.table(), out);
    Ok(())
}

pub(super) fn attention_scattered(settings: &Settings, options: &ScatteredOptions, out: &Out) -> Result<()> {
    let gpu = Gpu::find(settings.cuda())?;
    let report = bench_scattered(options, &mut |tokens, share, repeats| {
        let found = engine::scattered_attention(&gpu.config, tokens, share, repeats)?;
        let engine::ScatteredAttention { scattered, causal, share } = found;
        Ok(Scattered { device: gpu.name.clone(), scattered, causal, share })
    })?;
    print(&report, &report.table(), out);
    Ok(())
}

/// The GPU that the settings name.
struct Gpu {
    config: CudaConfig,
    name: String,
}

impl Gpu {
    fn find(config: CudaConfig) -> Result<Gpu> {
        let name = find_gpu(&config)?;
        Ok(Gpu { config, name })
    }
}

impl DeviceAttention for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn decode_attention(&mut self, shape: &AttentionShape, repeats: usize) -> eval::Result<Vec<f64>> {
        let AttentionShape { batch, tokens, heads, kv_heads, head_dim } = *shape;
        let shape = engine::AttentionShape { batch, tokens, heads, kv_heads, head_dim };
        Ok(engine::decode_attention(&self.config, shape, repeats)?)
    }

    fn copy_bandwidth(&mut self) -> eval::Result<f64> {
        Ok(engine::copy_bandwidth(&self.config, COPIES)? / 1e9)
    }
}

/// Copies whose median is the bandwidth.
const COPIES: usize = 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_engine_has_room_for_the_batch_and_never_less_than_is_set() {
        let settings = Settings { model: Some("/models/one".into()), ..Settings::default() };
        let config = engine_for(&settings, 64).unwrap();
        assert_eq!((config.max_sequences, config.queue), (64, settings.queue));
        assert_eq!(engine_for(&settings, 1000).unwrap().queue, 1000);
        assert_eq!(engine_for(&settings, 1).unwrap().max_sequences, settings.max_sequences);
    }
}

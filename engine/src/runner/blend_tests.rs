//! Contexts that are blended by parts, beside others that are answered.

use std::sync::Condvar;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::chunk::{ChunkLayer, ChunkSource};

/// A source whose layers are handed out as far as its gate is open.
struct Gated {
    chunk: Arc<dyn ChunkSource>,
    open: Arc<(Mutex<usize>, Condvar)>,
}

impl ChunkSource for Gated {
    fn tokens(&self) -> usize {
        self.chunk.tokens()
    }

    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        let (open, changed) = &*self.open;
        let mut open = open.lock().unwrap();
        while *open <= layer {
            open = changed.wait_timeout(open, Duration::from_secs(30)).unwrap().0;
        }
        drop(open);
        self.chunk.layer(layer)
    }
}

fn open(gate: &Arc<(Mutex<usize>, Condvar)>, layers: usize) {
    *gate.0.lock().unwrap() = layers;
    gate.1.notify_all();
}

/// A source that fails on its last layer.
struct Failing(Arc<dyn ChunkSource>);

impl ChunkSource for Failing {
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    fn layer(&self, layer: usize) -> Result<ChunkLayer> {
        if layer == 0 { self.0.layer(layer) } else { Err(EngineError::Internal("the disk is gone".into())) }
    }
}

fn asking(rng: &mut ChaCha8Rng, sizes: &[usize], mode: BlendMode) -> Request {
    let mut request = plain(tokens(rng, 9), 12);
    request.prompt.prefix = vec![1];
    request.prompt.chunks = sizes.iter().map(|n| cached_chunk(rng, *n)).collect();
    request.blend = BlendConfig { mode, ratio: 0.3, ..BlendConfig::default() };
    request
}

/// Tokens so far, until they end.
#[derive(Default)]
struct Told(Answer);

impl Told {
    /// Takes what has come; how many tokens.
    fn take(&mut self, events: &mut UnboundedReceiver<Event>) -> usize {
        let Answer { started, tokens, finished, failed } = Answer::read(events);
        let new = tokens.len();
        self.0.started = self.0.started.take().or(started);
        self.0.tokens.extend(tokens);
        self.0.finished = self.0.finished.take().or(finished);
        self.0.failed = self.0.failed.take().or(failed);
        new
    }
}

/// Waits for what sources read meanwhile, so that each step does what it can.
fn await_layers(bench: &mut Bench) {
    let second = Duration::from_secs(1);
    for sequence in bench.queue.sequences.iter_mut().filter(|sequence| sequence.is_blending()) {
        while !sequence.wait_for_layer(second) {}
    }
    for job in bench.queue.jobs.iter_mut().filter(|job| job.is_blending()) {
        while !job.wait_for_layer(second) {}
    }
}

#[test]
fn a_token_comes_in_every_step_while_contexts_are_blended_by_parts() {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    let modes = [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::FullRecompute, BlendMode::Reuse];
    for mode in modes {
        let requests = [&[300, 120, 200][..], &[150, 150], &[40]].map(|sizes| asking(&mut rng, sizes, mode));
        let talks = plain(tokens(&mut rng, 30), 400);
        let mut bench = Bench::new(EngineConfig { mixed_prefill_tokens: 32, ..config() }, 64);
        let mut talking = bench.submit(&talks);
        bench.cycle();
        assert_eq!(Answer::read(&mut talking).tokens.len(), 1);
        let mut streams = requests.each_ref().map(|request| bench.submit(request));
        let mut told = [(); 3].map(|()| Told::default());
        let (mut steps, mut blending) = (0, 0);
        while told.iter().any(|told| told.0.finished.is_none()) {
            await_layers(&mut bench);
            bench.cycle();
            steps += 1;
            blending += usize::from(bench.queue.blending() > 0);
            assert_eq!(Answer::read(&mut talking).tokens.len(), 1, "step {steps}, {mode}");
            told.iter_mut().zip(&mut streams).for_each(|(told, events)| {
                told.take(events);
            });
        }
        // 630 rows that are computed are five blocks, each more than a step is granted: ten steps for two layers.
        let least = if mode == BlendMode::FullRecompute { 10 } else { 3 };
        assert!(blending >= least, "{blending} of {steps}, {mode}");
        told.iter().zip(&requests).for_each(|(told, request)| assert_same(&told.0, &alone(request), request));
    }
}

#[test]
fn a_layer_that_does_not_come_holds_nobody_up() {
    let mut rng = ChaCha8Rng::seed_from_u64(42);
    let gate: Arc<(Mutex<usize>, Condvar)> = Arc::default();
    let want = asking(&mut rng, &[60, 80], BlendMode::Answer);
    let mut waits = want.clone();
    let chunk = &mut waits.prompt.chunks[1];
    chunk.source = Some(Arc::new(Gated { chunk: chunk.source.take().unwrap(), open: Arc::clone(&gate) }));
    let others = [asking(&mut rng, &[60, 80], BlendMode::Answer), plain(tokens(&mut rng, 200), 30)];
    let mut bench = Bench::new(config(), 64);
    let mut waiting = bench.submit(&waits);
    for layers in 0..=MODEL.spec.layers {
        open(&gate, layers);
        let mut streams = others.each_ref().map(|request| bench.submit(request));
        let mut told = [(); 2].map(|()| Told::default());
        while told.iter().any(|told| told.0.finished.is_none()) {
            bench.cycle();
            told.iter_mut().zip(&mut streams).for_each(|(told, events)| {
                told.take(events);
            });
        }
        told.iter().zip(&others).for_each(|(told, request)| assert_same(&told.0, &alone(request), request));
        if layers < MODEL.spec.layers {
            assert!(waiting.try_recv().is_err(), "{layers} layers are there");
        }
    }
    bench.run();
    assert_same(&Answer::read(&mut waiting), &alone(&want), &want);
}

#[test]
fn whoever_leaves_while_its_layer_is_waited_for_frees_its_memory_at_once() {
    let mut rng = ChaCha8Rng::seed_from_u64(43);
    let gate: Arc<(Mutex<usize>, Condvar)> = Arc::default();
    let mut waits = asking(&mut rng, &[60, 400], BlendMode::Answer);
    let chunk = &mut waits.prompt.chunks[1];
    chunk.source = Some(Arc::new(Gated { chunk: chunk.source.take().unwrap(), open: Arc::clone(&gate) }));
    open(&gate, 1);
    let mut bench = Bench::new(config(), 64);
    let waiting = bench.submit(&waits);
    while bench.runner.load.kv_bytes.load(Ordering::Relaxed) == 0 {
        bench.cycle();
    }
    drop(waiting);
    bench.cycle();
    assert!(bench.queue.is_empty());
    assert_eq!(bench.runner.load.kv_bytes.load(Ordering::Relaxed), 0);
    open(&gate, usize::MAX);
}

#[test]
fn a_blend_that_gives_way_begins_again() {
    let mut rng = ChaCha8Rng::seed_from_u64(44);
    // The answer of the oldest outgrows what the younger one's context leaves, while that waits for its last layer.
    let gate: Arc<(Mutex<usize>, Condvar)> = Arc::default();
    let talks = plain(tokens(&mut rng, PAGE - 20), 300);
    let want = asking(&mut rng, &[PAGE - 40, PAGE], BlendMode::Answer);
    let mut waits = want.clone();
    let chunk = &mut waits.prompt.chunks[1];
    chunk.source = Some(Arc::new(Gated { chunk: chunk.source.take().unwrap(), open: Arc::clone(&gate) }));
    open(&gate, 1);
    let mut bench = Bench::new(config(), 4);
    let (mut talking, mut waiting) = (bench.submit(&talks), bench.submit(&waits));
    while bench.preemptions() == 0 {
        bench.cycle();
    }
    open(&gate, usize::MAX);
    bench.run();
    assert_same(&Answer::read(&mut talking), &alone(&talks), &talks);
    assert_same(&Answer::read(&mut waiting), &alone(&want), &want);
}

#[test]
fn a_source_that_fails_in_the_middle_costs_nobody_else_a_step() {
    let mut rng = ChaCha8Rng::seed_from_u64(45);
    for mode in [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::Reuse] {
        let mut want = asking(&mut rng, &[150, 200, 60], mode);
        let mut fails = want.clone();
        fails.prompt.chunks[1].source = Some(Arc::new(Failing(want.prompt.chunks[1].source.take().unwrap())));
        let talks = plain(tokens(&mut rng, 30), 200);
        let mut bench = Bench::new(EngineConfig { mixed_prefill_tokens: 32, ..config() }, 64);
        let (mut talking, mut events) = (bench.submit(&talks), bench.submit(&fails));
        let mut told = Told::default();
        bench.cycle();
        while told.0.finished.is_none() {
            let before = Answer::read(&mut talking).tokens.len();
            assert_eq!(before, 1);
            await_layers(&mut bench);
            bench.cycle();
            told.take(&mut events);
            assert!(told.0.failed.is_none(), "{:?}", told.0.failed);
        }
        assert_eq!(told.0.started.as_ref().unwrap().failed_chunks, 1);
        assert_same(&told.0, &alone(&want), &want);
    }
}

#[test]
fn a_panic_in_a_part_of_a_blend_ends_its_own_request_only() {
    let mut rng = ChaCha8Rng::seed_from_u64(46);
    let model = Arc::new(Transformer::load_dir(MODEL_DIR.path(), 2, None).unwrap());
    let (asks, talks) = (asking(&mut rng, &[20, 300, 250], BlendMode::Answer), plain(tokens(&mut rng, 40), 60));
    for parts in [1, 3, 6] {
        let mut bench = Bench::of(Arc::clone(&model), EngineConfig { mixed_prefill_tokens: 32, ..config() }, 64);
        let mut talking = bench.submit(&talks);
        bench.cycle();
        let mut events = bench.submit(&asks);
        let mut granted = 0;
        while granted < parts {
            await_layers(&mut bench);
            bench.cycle();
            granted += bench.queue.blending();
            assert!(bench.queue.sequences.len() == 2, "it ended after {granted} parts");
        }
        // What comes next is a part of the blend: its layer must be there.
        await_layers(&mut bench);
        assert_eq!(bench.queue.blending(), 1);
        model.cpu.pool.trip.store(1, Ordering::Relaxed);
        bench.run();
        let failed = Answer::read(&mut events);
        assert!(matches!(failed.failed, Some(EngineError::Panicked { doing: "blending a context", .. })), "{failed:?}");
        assert_same(&Answer::read(&mut talking), &alone(&talks), &talks);
    }
}

#[test]
fn contexts_are_prepared_by_parts_while_others_are_answered() {
    let mut rng = ChaCha8Rng::seed_from_u64(47);
    let chunks: Vec<PromptChunk> = [200, 300].iter().map(|n| cached_chunk(&mut rng, *n)).collect();
    let blend_config = BlendConfig { ratio: 0.2, ..BlendConfig::default() };
    let whole = blend(&MODEL, &Context::unasked(&[1], &chunks), &blend_config, &|| false).unwrap();
    let mut bench = Bench::new(EngineConfig { mixed_prefill_tokens: 32, ..config() }, 64);
    let (send, commands) = channel();
    bench.runner.commands = commands;
    let talks = plain(tokens(&mut rng, 30), 100);
    let mut talking = bench.submit(&talks);
    bench.cycle();
    let (reply, answer) = channel();
    let (prefix, held) = (vec![1], bench.held());
    send.send(Command::Compute(Computation::Context { prefix, chunks, blend: blend_config, reply })).unwrap();
    assert!(bench.runner.take_commands(&mut bench.queue, false));
    let mut steps = 0;
    while !bench.queue.jobs.is_empty() {
        assert_eq!(Answer::read(&mut talking).tokens.len(), 1);
        await_layers(&mut bench);
        bench.cycle();
        steps += 1;
    }
    assert!(steps >= 10, "{steps} steps");
    let prepared = answer.try_recv().unwrap().unwrap();
    let rows = |kv: &crate::kv::sequence::SequenceKv| {
        (0..MODEL.spec.layers).map(|layer| kv.rows(layer, 0, 0..501)).collect::<Vec<_>>()
    };
    assert!(rows(&prepared.kv) == rows(&whole.kv));
    assert_eq!(bench.held(), held, "its pages are whose who asked for them");
    bench.run();
}

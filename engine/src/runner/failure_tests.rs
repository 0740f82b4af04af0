//! Panics and failures at every place where a request can meet them: they cost their own request, and no other.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use ann_index::{Bitmap, IndexError, IndexKind, IndexParams, KeyIndex, SearchParams, SearchResult};

use super::*;
use crate::attention::cold::{MakeIndex, make_index};

/// A model of its own, whose pool trips for nobody else.
fn model(make: MakeIndex) -> Arc<Transformer> {
    let mut model = Transformer::load_dir(MODEL_DIR.path(), 2, None).unwrap();
    model.make_index = make;
    Arc::new(model)
}

fn panicked(answer: &Answer) -> bool {
    matches!(answer.failed, Some(EngineError::Panicked { .. }))
}

fn retrieval(tokens: Vec<u32>, max_tokens: usize, k: usize) -> Request {
    let attention = AttentionConfig { strategy: Strategy::Retrieval, window: 32, k, ..AttentionConfig::default() };
    Request { attention, ..plain(tokens, max_tokens) }
}

#[test]
fn a_panic_in_a_forward_pass_ends_those_that_were_read_and_nobody_else() {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    let model = model(make_index);
    let requests: Vec<Request> = (0..4).map(|i| plain(tokens(&mut rng, 90 + 300 * i), 12)).collect();
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    let mut all_failed = 0;
    for region in [1, 2, 3, 5, 8, 13, 21, 34] {
        let settings = EngineConfig { max_sequences: 2, prefix_cache: region % 2 == 0, ..config() };
        let mut bench = Bench::of(Arc::clone(&model), settings, 64);
        let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
        bench.cycle();
        model.cpu.pool.trip.store(region, Ordering::Relaxed);
        while model.cpu.pool.trip.load(Ordering::Relaxed) > 0 {
            bench.cycle();
        }
        bench.run();
        let answers: Vec<Answer> = streams.iter_mut().map(Answer::read).collect();
        // Attention is a sequence's own; all else is everybody's that was read.
        let failed = answers[..2].iter().filter(|answer| panicked(answer)).count();
        assert!(failed > 0, "region {region}");
        all_failed += usize::from(failed == 2);
        for ((answer, want), request) in answers.iter().zip(&want).zip(&requests) {
            match &answer.failed {
                Some(error) => assert!(error.to_string().contains("tripped over task"), "{error}"),
                None => assert_same(answer, want, request),
            }
        }
        assert!(answers[2..].iter().all(|answer| answer.failed.is_none()));
    }
    assert!(all_failed > 0);
}

#[test]
fn a_panic_in_the_loop_itself_ends_what_ran_and_what_waited_goes_on() {
    let mut rng = ChaCha8Rng::seed_from_u64(22);
    let requests: Vec<Request> = (0..5).map(|i| plain(tokens(&mut rng, 50 + 100 * i), 12)).collect();
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    let mut bench = Bench::new(EngineConfig { max_sequences: 2, prefix_cache: true, ..config() }, 64);
    let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
    bench.cycle();
    bench.queue.running = 99;
    assert!(bench.runner.round(&mut bench.queue));
    assert_eq!((bench.queue.running, bench.queue.sequences.len()), (0, 3));
    assert_eq!(bench.runner.load.running.load(Ordering::Relaxed), 0);
    bench.run();
    for (i, events) in streams.iter_mut().enumerate() {
        let answer = Answer::read(events);
        match i {
            0 | 1 => assert!(panicked(&answer)),
            _ => assert_same(&answer, &want[i], &requests[i]),
        }
    }
}

#[test]
fn a_panic_while_a_chunk_is_computed_is_the_answer_of_who_asked() {
    let model = model(make_index);
    let mut bench = Bench::of(Arc::clone(&model), config(), 64);
    let (send, commands) = channel();
    bench.runner.commands = commands;
    for trip in [3, 0] {
        let (reply, answer) = channel();
        send.send(chunk(vec![5; 20], reply)).unwrap();
        assert!(bench.runner.take_commands(&mut bench.queue, false));
        model.cpu.pool.trip.store(trip, Ordering::Relaxed);
        bench.run();
        let answer = answer.try_recv().unwrap();
        assert_eq!(trip > 0, matches!(answer, Err(EngineError::Panicked { .. })), "{:?}", answer.err());
    }
}

#[test]
fn an_index_that_cannot_be_built_leaves_its_tokens_to_exact_attention() {
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    let text = tokens(&mut rng, 700);
    let exact = alone(&plain(text.clone(), 20));
    let panics: MakeIndex = |_, _, _, _| panic!("an index panics");
    let fails: MakeIndex = |_, _, _, _| Err(IndexError::NotFinite { what: "keys", row: 0, column: 0, value: f32::NAN });
    for make in [panics, fails] {
        let mut bench = Bench::of(model(make), config(), 64);
        let mut events = bench.submit(&retrieval(text.clone(), 20, 16));
        bench.run();
        let answer = Answer::read(&mut events);
        assert_eq!(answer.tokens, exact.tokens, "{:?}", answer.failed);
        let decode = answer.finished.unwrap().decode;
        assert_eq!(decode.index_failures, 1);
        assert!(decode.cold_keys > 0 && decode.keys_attended == decode.cold_keys);
    }
}

/// A flat index that panics when it is asked for 13 keys, and refuses when it is asked for 17.
#[derive(Debug)]
struct Trap(Box<dyn KeyIndex>);

impl KeyIndex for Trap {
    fn dim(&self) -> usize {
        self.0.dim()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn append(&self, keys: &[f32]) -> std::result::Result<(), IndexError> {
        self.0.append(keys)
    }
    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> std::result::Result<SearchResult, IndexError> {
        match params.k {
            13 => panic!("a search panics"),
            17 => Err(IndexError::NotFinite { what: "keys", row: 0, column: 0, value: f32::NAN }),
            _ => self.0.search(query, params, exclude),
        }
    }
    fn key(&self, id: u32, out: &mut [f32]) -> std::result::Result<(), IndexError> {
        self.0.key(id, out)
    }
    fn memory_bytes(&self) -> usize {
        self.0.memory_bytes()
    }
    fn kind(&self) -> IndexKind {
        self.0.kind()
    }
    fn save(&self, path: &Path) -> std::result::Result<(), IndexError> {
        self.0.save(path)
    }
}

#[test]
fn a_search_that_fails_or_panics_ends_its_own_sequence_only() {
    let mut rng = ChaCha8Rng::seed_from_u64(24);
    let trap: MakeIndex =
        |dim, keys, params: &IndexParams, wanted| Ok(Box::new(Trap(make_index(dim, keys, params, wanted)?)));
    let requests = [
        retrieval(tokens(&mut rng, 400), 20, 16),
        retrieval(tokens(&mut rng, 410), 20, 13),
        plain(tokens(&mut rng, 300), 40),
        retrieval(tokens(&mut rng, 420), 20, 17),
        retrieval(tokens(&mut rng, 430), 20, 16),
    ];
    let mut bench = Bench::of(model(trap), EngineConfig { step_tokens: 4096, ..config() }, 64);
    let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
    bench.run();
    for (i, (request, events)) in requests.iter().zip(&mut streams).enumerate() {
        let answer = Answer::read(events);
        match i {
            1 => assert!(panicked(&answer), "{:?}", answer.failed),
            3 => assert!(matches!(answer.failed, Some(EngineError::Index(_))), "{:?}", answer.failed),
            _ => assert_same(&answer, &alone(request), request),
        }
    }
}

/// While it is closed, no index of the test below gets done.
static GATE: AtomicBool = AtomicBool::new(false);
static BUILT: AtomicUsize = AtomicUsize::new(0);

#[test]
fn others_are_answered_while_a_request_waits_for_its_index_and_whoever_waits_can_go() {
    let mut rng = ChaCha8Rng::seed_from_u64(25);
    let gated: MakeIndex = |dim, keys, params, wanted| {
        while !GATE.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        BUILT.fetch_add(1, Ordering::SeqCst);
        make_index(dim, keys, params, wanted)
    };
    let model = model(gated);
    let (waits, leaves) = (retrieval(tokens(&mut rng, 500), 9, 16), retrieval(tokens(&mut rng, 600), 9, 16));
    let talks = plain(tokens(&mut rng, 30), 50);
    let mut bench = Bench::of(Arc::clone(&model), config(), 64);
    let (mut waiting, leaving) = (bench.submit(&waits), bench.submit(&leaves));
    let mut talking = bench.submit(&talks);
    let mut text = Answer::default();
    while text.finished.is_none() {
        bench.cycle();
        let Answer { started, tokens, finished, .. } = Answer::read(&mut talking);
        text.started = text.started.or(started);
        text.tokens.extend(tokens);
        text.finished = finished;
    }
    assert_same(&text, &alone(&talks), &talks);
    let before = bench.runner.load.kv_bytes.load(Ordering::Relaxed);
    // Each has written one token behind its prompt, which is read exactly, and waits before it reads that.
    assert_eq!(Answer::read(&mut waiting).tokens.len(), 1);
    drop(leaving);
    bench.cycle();
    assert_eq!(bench.queue.sequences.len(), 1);
    assert!(bench.runner.load.kv_bytes.load(Ordering::Relaxed) < before, "its memory is free at once");
    GATE.store(true, Ordering::SeqCst);
    bench.run();
    let answer = Answer::read(&mut waiting);
    assert_eq!(answer.tokens.len(), 8);
    assert!(answer.finished.unwrap().decode.cold_keys > 0);
    // Of the one that left, nothing was built: it had not been begun, or was asked before each index whether it was wanted.
    let heads = model.spec.layers * model.shape.kv_heads;
    assert!(BUILT.load(Ordering::SeqCst) < 2 * heads, "{} of {heads} each", BUILT.load(Ordering::SeqCst));
}

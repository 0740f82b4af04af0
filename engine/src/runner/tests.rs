//! The loop on a tiny model with f32 weights, whose rows do not depend on their neighbours on any machine: answers under
//! every pressure must equal, bit for bit, those of a request that runs alone.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::*;
use crate::blend::{Context, blend};
use crate::chunk::{ChunkKv, ComputedChunk, PromptChunk};
use crate::config::{AttentionConfig, BlendConfig, BlendMode, DeviceChoice, Strategy};
use crate::engine::Engine;
use crate::kv::page::PAGE;
use crate::kv::prefix::page_bytes;
use crate::request::{
    Event, EventStream, FinishReason, Finished, PrefillStats, PreparedContext, Prompt, Request, Usage,
};
use crate::sampler::SamplingParams;
use crate::sequence::Waiting;
use crate::tiers::ChunkTiers;

#[path = "blend_tests.rs"]
mod blends;
#[path = "failure_tests.rs"]
mod failures;
#[path = "forced_tests.rs"]
mod forced;
#[path = "gpu_tests.rs"]
mod gpu;

/// The tiny Llama 2 of the golden fixtures, with room for 4096 tokens and a tokenizer of one word an id.
static MODEL_DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/llama2");
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(4096);
    let vocab: serde_json::Map<_, _> = (0..251).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
});

static MODEL: LazyLock<Arc<Transformer>> =
    LazyLock::new(|| Arc::new(Transformer::load_dir(MODEL_DIR.path(), 2, None).unwrap()));

/// A runner that is driven step by step.
struct Bench {
    runner: Runner,
    queue: Queue,
    /// Cycles so far.
    cycles: usize,
}

#[derive(Default, Debug)]
struct Answer {
    started: Option<PrefillStats>,
    tokens: Vec<(u32, String, u32)>,
    finished: Option<Finished>,
    failed: Option<EngineError>,
}

impl Answer {
    fn read(events: &mut UnboundedReceiver<Event>) -> Answer {
        let mut answer = Answer::default();
        while let Ok(event) = events.try_recv() {
            assert!(answer.finished.is_none() && answer.failed.is_none(), "nothing comes behind the end");
            match event {
                Event::Started(stats) => assert!(answer.started.replace(stats).is_none(), "it starts once"),
                Event::Token(t) => answer.tokens.push((t.id, t.text, t.logprob.to_bits())),
                Event::Finished(finished) => answer.finished = Some(finished),
                Event::Failed(error) => answer.failed = Some(error),
            }
        }
        answer
    }
}

impl Bench {
    /// `pages`: budget of KV in pages.
    fn new(config: EngineConfig, pages: usize) -> Bench {
        Bench::of(Arc::clone(&MODEL), config, pages)
    }

    fn of(model: Arc<Transformer>, config: EngineConfig, pages: usize) -> Bench {
        let page = Bytes { device: 0, host: page_bytes(&model.shape) };
        let limits = Limits {
            step_tokens: config.step_tokens,
            mixed_prefill_tokens: config.mixed_prefill_tokens,
            max_sequences: config.max_sequences,
            page_tokens: PAGE,
            page_bytes: page,
            budget: page.times(pages),
        };
        let runner = Runner {
            tokenizer: Tokenizer::from_dir(MODEL_DIR.path(), model.spec.vocab).unwrap(),
            limits,
            max_context: model.spec.max_context,
            identity: 1,
            root: config.prefix_cache.then(|| PageKey::root(b"tiny")),
            load: Arc::default(),
            tiers: Arc::new(ChunkTiers::new(model.shape, model.cpu.isa, 0, model.device()).unwrap()),
            commands: channel().1,
            model,
            config,
        };
        Bench { runner, queue: Queue::new(), cycles: 0 }
    }

    fn submit(&mut self, request: &Request) -> UnboundedReceiver<Event> {
        let (events, stream) = unbounded_channel();
        let submitted = self.submitted(request, events);
        let age = self.queue.next_age();
        self.queue.sequences.push(self.runner.sequence(submitted, age));
        stream
    }

    fn submitted(&self, request: &Request, events: UnboundedSender<Event>) -> Submitted {
        let waiting = Waiting::new(&self.runner.load).0;
        Submitted { request: Box::new(request.clone()), events, at: Instant::now(), waiting }
    }

    fn cycle(&mut self) {
        if !self.runner.cycle(&mut self.queue) {
            std::thread::sleep(LOOK);
        }
        self.cycles += 1;
        assert!(self.cycles < 20_000, "no end");
    }

    fn held(&self) -> u64 {
        let load = &self.runner.load;
        load.kv_bytes.load(Ordering::Relaxed) + load.cached_bytes.load(Ordering::Relaxed)
    }

    fn run(&mut self) {
        while !self.queue.is_empty() {
            self.cycle();
            assert!(self.held() <= self.runner.limits.budget.host, "{} bytes", self.held());
        }
        assert_eq!(self.runner.load.waiting.load(Ordering::Relaxed), 0);
        assert_eq!((self.queue.running, self.queue.cache.in_use()), (0, 0), "all is given back");
    }

    fn preemptions(&self) -> u64 {
        self.runner.load.preemptions.load(Ordering::Relaxed)
    }

    /// Prompt tokens asked for and found.
    fn prefix_hits(&self) -> (u64, u64) {
        let load = &self.runner.load;
        (load.prefix_queries.load(Ordering::Relaxed), load.prefix_hits.load(Ordering::Relaxed))
    }
}

/// Indexes are waited for, so that answers can be compared.
fn config() -> EngineConfig {
    EngineConfig { prefix_cache: false, wait_for_index: true, ..EngineConfig::default() }
}

fn alone(request: &Request) -> Answer {
    let mut bench = Bench::new(config(), 64);
    let mut events = bench.submit(request);
    bench.run();
    let answer = Answer::read(&mut events);
    assert!(answer.finished.is_some(), "{answer:?}");
    answer
}

fn assert_same(got: &Answer, want: &Answer, request: &Request) {
    let about = format!("{:?}, {} tokens, {:?}", request.attention.strategy, request.prompt.len(), got.failed);
    assert_eq!(got.tokens, want.tokens, "{about}");
    let (got, want) = (got.finished.as_ref().expect(&about), want.finished.as_ref().unwrap());
    assert_eq!((got.reason, &got.text), (want.reason, &want.text), "{about}");
    let of = |usage: &Usage| (usage.prompt_tokens, usage.completion_tokens, usage.reused_tokens);
    assert_eq!(of(&got.usage), of(&want.usage), "{about}");
    assert_eq!((got.decode.steps, got.decode.cold_keys), (want.decode.steps, want.decode.cold_keys), "{about}");
}

fn tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(3..250)).collect()
}

fn plain(tokens: Vec<u32>, max_tokens: usize) -> Request {
    Request { ignore_eos: true, ..Request::new(Prompt::plain(tokens), max_tokens) }
}

fn computed_chunk(rng: &mut ChaCha8Rng, n: usize) -> PromptChunk {
    PromptChunk { tokens: tokens(rng, n).into(), prefix: [1].into(), source: None }
}

fn cached_chunk(rng: &mut ChaCha8Rng, n: usize) -> PromptChunk {
    let tokens = tokens(rng, n);
    let kv = ChunkKv::compute(&MODEL, &[1], &tokens, 512).unwrap();
    PromptChunk { tokens: tokens.into(), prefix: [1].into(), source: Some(Arc::new(kv)) }
}

/// Requests of all kinds, which need three pages at most.
fn mixed(rng: &mut ChaCha8Rng, n: usize) -> Vec<Request> {
    let kinds = [Strategy::Full, Strategy::Full, Strategy::Window, Strategy::Full];
    (0..n)
        .map(|i| {
            let (prompt, answer) = (rng.random_range(1..500), rng.random_range(1..260));
            let mut request = plain(tokens(rng, prompt), answer);
            request.attention = AttentionConfig { strategy: kinds[i % 4], window: 64, ..AttentionConfig::default() };
            if i % 3 == 1 {
                request.sampling =
                    SamplingParams { temperature: 1.0, seed: Some(i as u64), ..SamplingParams::default() };
                request.sampling.repetition_penalty = 1.3;
            }
            if i % 5 == 2 {
                // A context that is computed, or one from cached chunks.
                let cached = i % 10 == 7;
                let mut chunk = |n| if cached { cached_chunk(rng, n) } else { computed_chunk(rng, n) };
                request.prompt.chunks = vec![chunk(110), chunk(130)];
                request.prompt.suffix.truncate(100);
                request.prompt.prefix = vec![1];
                request.blend.mode = if cached { BlendMode::Answer } else { BlendMode::Reuse };
            }
            if i % 7 == 3 {
                let context =
                    blend(&MODEL, &Context::unasked(&tokens(rng, 150), &[]), &request.blend, &|| false).unwrap();
                let context = PreparedContext { kv: context.kv, stats: context.stats, engine: 1 };
                request.prompt.suffix.truncate(100);
                request.context = Some(Arc::new(context));
            }
            request
        })
        .collect()
}

#[test]
fn answers_under_pressure_equal_those_alone() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let requests = mixed(&mut rng, 16);
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    let mut preempted = 0;
    for (step_tokens, max_sequences, pages, prefix_cache) in
        [(512, 16, 64, true), (512, 8, 7, true), (61, 5, 5, false), (9, 3, 3, true)]
    {
        let limits = EngineConfig { step_tokens, max_sequences, prefix_cache, prefill_chunk: 100, ..config() };
        let mut bench = Bench::new(limits, pages);
        let mut streams = Vec::new();
        for request in &requests {
            streams.push(bench.submit(request));
            (0..rng.random_range(0..4)).for_each(|_| bench.cycle());
        }
        bench.run();
        for ((request, want), events) in requests.iter().zip(&want).zip(&mut streams) {
            assert_same(&Answer::read(events), want, request);
        }
        preempted += bench.preemptions();
        assert!(pages < 64 || bench.preemptions() == 0, "there is room for all");
    }
    assert!(preempted > 0, "the budgets are too large for this test to mean anything");
}

#[test]
fn indexes_are_built_again_as_they_were() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let retrieval = AttentionConfig { strategy: Strategy::Retrieval, window: 32, k: 16, ..AttentionConfig::default() };
    let requests: Vec<Request> = (0..4)
        .map(|i| Request { attention: retrieval.clone(), ..plain(tokens(&mut rng, 300 + 60 * i), 330) })
        .collect();
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    assert!(want.iter().all(|a| a.finished.as_ref().unwrap().decode.cold_keys > 0));
    // An index holds its keys a second time: room for two of them.
    let mut bench = Bench::new(config(), 12);
    let mut streams: Vec<_> = requests.iter().map(|r| bench.submit(r)).collect();
    while !bench.queue.sequences.is_empty() {
        bench.cycle();
    }
    assert!(bench.preemptions() > 0);
    for ((request, want), events) in requests.iter().zip(&want).zip(&mut streams) {
        assert_same(&Answer::read(events), want, request);
    }
}

#[test]
fn cancelling_at_any_step_frees_memory_and_disturbs_nobody() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let requests = mixed(&mut rng, 10);
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    for round in 0..4 {
        let limits = EngineConfig { step_tokens: 50, max_sequences: 4, prefix_cache: round % 2 == 0, ..config() };
        let mut bench = Bench::new(limits, 6);
        let mut streams: Vec<_> = requests.iter().map(|r| Some(bench.submit(r))).collect();
        for _ in 0..6 {
            (0..rng.random_range(0..40)).for_each(|_| bench.cycle());
            streams[rng.random_range(0..requests.len())] = None;
            bench.cycle();
            let open = bench.queue.sequences.iter().filter(|s| !s.is_cancelled()).count();
            assert_eq!(open, bench.queue.sequences.len(), "who has gone away is forgotten");
        }
        bench.run();
        assert_eq!(bench.runner.load.kv_bytes.load(Ordering::Relaxed), 0);
        for ((request, want), events) in requests.iter().zip(&want).zip(&mut streams) {
            if let Some(events) = events {
                assert_same(&Answer::read(events), want, request);
            }
        }
    }
}

#[test]
fn a_prefix_that_is_there_changes_nothing_but_the_work() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let start = tokens(&mut rng, 2 * PAGE + 100);
    let with_tail = |tail: Vec<u32>| plain([start.clone(), tail].concat(), 20);
    let mut bench = Bench::new(EngineConfig { prefix_cache: true, ..config() }, 64);
    let strategies = [Strategy::Full, Strategy::Window, Strategy::Retrieval];
    let window = AttentionConfig { window: 64, k: 8, ..AttentionConfig::default() };
    for (round, strategy) in strategies.into_iter().cycle().take(6).enumerate() {
        let mut request = with_tail(tokens(&mut rng, 50 + 90 * round));
        request.attention = AttentionConfig { strategy, ..window.clone() };
        let before = bench.prefix_hits();
        let mut events = bench.submit(&request);
        bench.run();
        let (asked, found) = bench.prefix_hits();
        assert_eq!(asked - before.0, request.prompt.len() as u64);
        assert_eq!(found - before.1, if round == 0 { 0 } else { 2 * PAGE as u64 });
        let got = Answer::read(&mut events);
        assert_eq!(got.started.as_ref().unwrap().prefix_tokens as u64, found - before.1);
        assert_eq!(got.started.as_ref().unwrap().prompt_tokens, request.prompt.len());
        assert_same(&got, &alone(&request), &request);
    }
}

#[test]
fn what_comes_before_a_context_is_shared_with_any_prompt() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut bench = Bench::new(EngineConfig { prefix_cache: true, ..config() }, 64);
    let instructions = tokens(&mut rng, PAGE + 30);
    let chunks = [300, 70].map(|n| cached_chunk(&mut rng, n));
    let modes = [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::Reuse, BlendMode::Answer, BlendMode::Question];
    for (round, mode) in modes.into_iter().chain([BlendMode::FullRecompute]).enumerate() {
        let mut request = plain(vec![9, 8, 7, round as u32 + 3], 30);
        (request.prompt.prefix, request.prompt.chunks) = (instructions.clone(), chunks.to_vec());
        request.blend.mode = mode;
        let mut events = bench.submit(&request);
        bench.run();
        let (got, want) = (Answer::read(&mut events), alone(&request));
        assert_same(&got, &want, &request);
        let (got, want) = (got.started.unwrap(), want.started.unwrap());
        let prefix = if round == 0 { 0 } else { PAGE };
        assert_eq!((got.prefix_tokens, got.prompt_tokens), (prefix, want.prompt_tokens));
        assert_eq!((got.reused_tokens, got.recomputed_tokens), (want.reused_tokens, want.recomputed_tokens - prefix));
    }
    let other = plain([instructions, tokens(&mut rng, 300)].concat(), 30);
    let mut events = bench.submit(&other);
    bench.run();
    let got = Answer::read(&mut events);
    assert_eq!(got.started.as_ref().unwrap().prefix_tokens, PAGE, "no page that holds tokens of a chunk");
    assert_same(&got, &alone(&other), &other);
}

#[test]
fn an_answer_that_becomes_part_of_a_prompt_is_not_read_again() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut bench = Bench::new(EngineConfig { prefix_cache: true, ..config() }, 64);
    let first = plain(tokens(&mut rng, 150), 400);
    let mut events = bench.submit(&first);
    bench.run();
    let answer: Vec<u32> = Answer::read(&mut events).tokens.iter().map(|t| t.0).collect();
    let turn = plain([first.prompt.suffix.clone(), answer, tokens(&mut rng, 30)].concat(), 20);
    let mut events = bench.submit(&turn);
    bench.run();
    let got = Answer::read(&mut events);
    assert_eq!(got.started.as_ref().unwrap().prefix_tokens, 2 * PAGE);
    assert_same(&got, &alone(&turn), &turn);
    // Exactly two pages: the last token is read in any case, for what comes behind it.
    let whole = plain(turn.prompt.suffix[..2 * PAGE].to_vec(), 5);
    let mut events = bench.submit(&whole);
    bench.run();
    let got = Answer::read(&mut events);
    assert_eq!(got.started.as_ref().unwrap().prefix_tokens, PAGE);
    assert_same(&got, &alone(&whole), &whole);
}

#[test]
fn requests_that_run_together_hold_their_common_beginning_once() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let start = tokens(&mut rng, 8 * PAGE);
    // Each needs nine pages; all begin alike, so that one page each is enough behind the first eight.
    let requests: Vec<Request> = (0..6).map(|_| plain([start.clone(), tokens(&mut rng, 40)].concat(), 30)).collect();
    let want: Vec<Answer> = requests.iter().map(alone).collect();
    let together = EngineConfig { prefix_cache: true, mixed_prefill_tokens: 512, ..config() };
    let mut bench = Bench::new(together, 16);
    let mut streams = vec![bench.submit(&requests[0])];
    (0..6).for_each(|_| bench.cycle());
    streams.extend(requests[1..].iter().map(|r| bench.submit(r)));
    bench.cycle();
    assert_eq!(bench.queue.running, 6, "they share eight of their nine pages");
    assert_eq!(bench.held() / bench.runner.limits.page_bytes.host, 8 + 6);
    bench.run();
    assert_eq!(bench.preemptions(), 0);
    for ((request, want), events) in requests.iter().zip(&want).zip(&mut streams) {
        assert_same(&Answer::read(events), want, request);
    }
}

#[test]
fn a_sequence_is_said_to_free_what_it_frees() {
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let together = EngineConfig { prefix_cache: true, step_tokens: 4096, mixed_prefill_tokens: 4096, ..config() };
    let mut bench = Bench::new(EngineConfig { prefill_chunk: 4096, ..together }, 64);
    let page = bench.runner.limits.page_bytes;
    let start = tokens(&mut rng, 8 * PAGE);
    let with_tail = |kept: usize, tail: Vec<u32>| plain([start[..kept].to_vec(), tail].concat(), 200);
    // The second shares four pages with the first, the third none; the fourth is not shared at all behind its window.
    let tails = [tokens(&mut rng, 40), tokens(&mut rng, 300), tokens(&mut rng, 2 * PAGE + 9), tokens(&mut rng, 50)];
    let [a, b, c, d] = tails;
    let mut requests = [with_tail(8 * PAGE, a), with_tail(4 * PAGE, b), plain(c, 200), with_tail(2 * PAGE, d)];
    requests[3].attention = AttentionConfig { strategy: Strategy::Window, window: 4096, ..AttentionConfig::default() };
    let mut streams = vec![bench.submit(&requests[0])];
    (0..2).for_each(|_| bench.cycle());
    streams.extend(requests[1..].iter().map(|request| bench.submit(request)));
    (0..3).for_each(|_| bench.cycle());
    let entries = |bench: &mut Bench| -> Vec<(u64, u64)> {
        let running = bench.queue.running;
        let (entries, _) = bench.runner.entries(&mut bench.queue);
        let pages = |bytes: Bytes| bytes.host / page.host;
        entries[..running].iter().map(|entry| (pages(entry.own), pages(entry.shared))).collect()
    };
    // Own pages, and those that others hold too: nine, six, three and three.
    assert_eq!(entries(&mut bench), [(5, 4), (2, 4), (3, 0), (3, 0)]);
    while bench.queue.running > 0 {
        let left = bench.queue.running - 1;
        let (own, used) = (entries(&mut bench)[left].0, bench.queue.used(page));
        bench.runner.arrange(&mut bench.queue, &[left], left);
        let freed = used.minus(bench.queue.used(page));
        assert_eq!(freed, page.times(own as usize), "the last of {}", left + 1);
        if left == 1 {
            assert_eq!(entries(&mut bench), [(9, 0)], "what it shared is its own once nobody else holds it");
        }
    }
    assert_eq!(bench.queue.used(page), Bytes::default());
}

#[test]
fn two_that_read_the_same_prompt_at_once_end_up_with_one_copy() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let request = plain(tokens(&mut rng, 2 * PAGE + 10), 40);
    let want = alone(&request);
    let mut bench = Bench::new(EngineConfig { prefix_cache: true, step_tokens: 4096, ..config() }, 64);
    let mut streams = [bench.submit(&request), bench.submit(&request)];
    (0..3).for_each(|_| bench.cycle());
    assert_eq!((bench.queue.running, bench.prefix_hits().1), (2, 0));
    assert_eq!(bench.held() / bench.runner.limits.page_bytes.host, 2 + 2);
    bench.run();
    streams.iter_mut().for_each(|events| assert_same(&Answer::read(events), &want, &request));
}

#[test]
fn cached_pages_give_way_to_requests() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut bench = Bench::new(EngineConfig { prefix_cache: true, ..config() }, 4);
    for _ in 0..5 {
        let request = plain(tokens(&mut rng, 3 * PAGE), 60);
        let mut events = bench.submit(&request);
        bench.run();
        assert_same(&Answer::read(&mut events), &alone(&request), &request);
        assert_eq!(bench.queue.cache.len(), 3, "what is kept fits beside nothing else");
    }
    assert_eq!((bench.prefix_hits().1, bench.preemptions()), (0, 0));
}

#[test]
fn pages_of_a_context_that_others_go_on_from_are_not_freed_by_giving_way() {
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let mut bench = Bench::new(config(), 64);
    let blended =
        blend(&MODEL, &Context::unasked(&tokens(&mut rng, 2 * PAGE + 20), &[]), &BlendConfig::default(), &|| false)
            .unwrap();
    let context = Arc::new(PreparedContext { kv: blended.kv, stats: blended.stats, engine: 1 });
    let request = Request { context: Some(Arc::clone(&context)), ..plain(tokens(&mut rng, 9), 20) };
    let _events = bench.submit(&request);
    (0..3).for_each(|_| bench.cycle());
    let page = bench.runner.limits.page_bytes;
    let own = |bench: &Bench| bench.queue.sequences[0].own_bytes(&bench.queue.cache, page).0;
    assert_eq!(own(&bench), page, "its copy of the last page, behind two that are the context's");
    drop((context, request));
    assert_eq!(bench.queue.sequences[0].private_bytes(page), page.times(3));
}

#[test]
fn what_grows_beyond_the_memory_fails_by_name_and_the_engine_goes_on() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut bench = Bench::new(config(), 3);
    // Pages for all tokens there are, but none for the copy of the keys that an index holds.
    let mut large = plain(tokens(&mut rng, 700), 60);
    large.attention = AttentionConfig { strategy: Strategy::Retrieval, window: 32, ..AttentionConfig::default() };
    let small = plain(tokens(&mut rng, 100), 30);
    let (mut large, mut after) = (bench.submit(&large), bench.submit(&small));
    while !bench.queue.sequences.is_empty() {
        bench.cycle();
    }
    let failed = Answer::read(&mut large).failed.expect("an index needs memory, too");
    assert!(matches!(failed, EngineError::NeverFits { .. }), "{failed}");
    assert!(failed.to_string().contains("host memory"), "{failed}");
    assert_same(&Answer::read(&mut after), &alone(&small), &small);
}

#[test]
fn an_answer_without_a_bound_reserves_nothing_and_ends_where_the_context_or_the_memory_does() {
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let mut endless = |n: usize| Request { max_tokens: None, ..plain(tokens(&mut rng, n), 0) };
    let bounded = |request: &Request, most: usize| alone(&Request { max_tokens: Some(most), ..request.clone() });
    let mut bench = Bench::new(config(), 64);
    bench.runner.max_context = 400;
    let request = endless(150);
    let mut events = bench.submit(&request);
    bench.run();
    assert_same(&Answer::read(&mut events), &bounded(&request, 250), &request);

    // Room for both prompts, and for three pages of one answer at last.
    let requests = [endless(100), endless(120)];
    let mut bench = Bench::new(config(), 3);
    let mut streams = requests.each_ref().map(|request| bench.submit(request));
    bench.cycle();
    assert_eq!(bench.queue.running, 2, "nothing is reserved for answers");
    bench.run();
    assert!(bench.preemptions() > 0, "the youngest gives way");
    for (request, events) in requests.iter().zip(&mut streams) {
        let got = Answer::read(events);
        assert_eq!(got.finished.expect("it is cut, not failed").reason, FinishReason::Memory);
        // The last token has no KV.
        assert_eq!(got.tokens, bounded(request, 3 * PAGE - request.prompt.len() + 1).tokens);
    }
    // A prompt that takes all there is has an answer of one token.
    let full = endless(3 * PAGE);
    let mut events = bench.submit(&full);
    bench.run();
    assert_eq!(Answer::read(&mut events).tokens, bounded(&full, 1).tokens);
}

#[test]
fn an_answer_ends_neither_by_its_model_nor_by_a_stop_before_it_has_the_tokens_it_must_have() {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let mut request = Request::new(Prompt::plain(tokens(&mut rng, 20)), 30);
    request.sampling.logit_bias = vec![(2, 100.0)];
    let ended = |request: &Request| {
        let answer = alone(request);
        let eos = answer.tokens.iter().position(|token| token.0 == 2);
        (answer.tokens.len(), eos, answer.finished.unwrap().reason)
    };
    assert_eq!(ended(&request), (1, Some(0), FinishReason::Stop));
    request.min_tokens = 5;
    assert_eq!(ended(&request), (6, Some(5), FinishReason::Stop));
    // Every token's text has a `w`.
    request.stop = vec!["w".into()];
    assert_eq!(ended(&request), (6, Some(5), FinishReason::Stop));
    request.sampling.logit_bias.clear();
    assert_eq!(ended(&request), (6, None, FinishReason::StopString));
}

#[test]
fn chunks_are_computed_by_parts_while_others_are_answered() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let settings = EngineConfig { mixed_prefill_tokens: 16, ..config() };
    let mut bench = Bench::new(settings, 64);
    let (send, commands) = channel();
    bench.runner.commands = commands;
    let request = plain(tokens(&mut rng, 20), 60);
    let mut events = bench.submit(&request);
    bench.cycle();
    let texts: Vec<Vec<u32>> = [100, 9, 3, 70, 250].into_iter().map(|n| tokens(&mut rng, n)).collect();
    let replies: Vec<_> = texts
        .iter()
        .map(|text| {
            let (reply, answer) = channel();
            send.send(chunk(text.clone(), reply)).unwrap();
            answer
        })
        .collect();
    assert!(bench.runner.take_commands(&mut bench.queue, false));
    let mut done = Vec::new();
    let mut answered = Answer::read(&mut events).tokens.len();
    while !bench.queue.jobs.is_empty() {
        bench.cycle();
        let tokens = Answer::read(&mut events).tokens.len();
        assert_eq!(tokens, 1, "an answer goes on in every step");
        answered += tokens;
        done.extend(replies.iter().map(|reply| reply.try_recv().ok()).enumerate().filter_map(|(i, r)| Some((i, r?))));
    }
    // All with the bos before them, in 16 tokens a step.
    assert_eq!(answered, 1 + (100usize + 9 + 3 + 70 + 250 + 5).div_ceil(16));
    assert_eq!(done.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2, 3, 4], "the oldest first");
    for (number, computed) in done {
        let whole = ChunkKv::compute(&MODEL, &[1], &texts[number], 512).unwrap();
        assert!(computed.unwrap().encoded(&MODEL).unwrap() == whole, "chunk {number}");
    }
    bench.run();
}

#[test]
fn a_chunk_waits_for_room_and_whoever_comes_behind_it_waits_too() {
    // Of three pages, one has room for the request's prompt and one for its answer; the chunk takes two.
    let mut bench = Bench::new(config(), 3);
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let first = plain(tokens(&mut rng, PAGE - 10), 20);
    let mut before = bench.submit(&first);
    bench.cycle();
    let (send, commands) = channel();
    bench.runner.commands = commands;
    let (reply, answer) = channel();
    send.send(chunk(tokens(&mut rng, 2 * PAGE), reply)).unwrap();
    assert!(bench.runner.take_commands(&mut bench.queue, false));
    let mut behind = bench.submit(&plain(tokens(&mut rng, 9), 3));
    let mut text = Answer::default();
    while text.finished.is_none() {
        assert_eq!(bench.queue.begun, 0);
        assert!(answer.try_recv().is_err(), "its KV and the request's are more than the budget");
        bench.cycle();
        let Answer { tokens, finished, .. } = Answer::read(&mut before);
        text.tokens.extend(tokens);
        text.finished = finished;
    }
    assert!(behind.try_recv().is_err(), "it came later");
    assert_eq!(text.tokens, alone(&first).tokens);
    bench.run();
    assert_eq!(answer.try_recv().unwrap().unwrap().tokens, 2 * PAGE);
    assert!(Answer::read(&mut behind).finished.is_some());
}

/// The command to compute a chunk.
fn chunk(tokens: Vec<u32>, reply: Sender<Result<ComputedChunk>>) -> Command {
    Command::Compute(Computation::Chunk { prefix: vec![1], tokens, reply })
}

#[test]
fn whoever_finds_a_free_place_is_not_refused_for_the_queue() {
    let model_dir = MODEL_DIR.path().to_path_buf();
    let settings = EngineConfig { model_dir, threads: 2, max_sequences: 4, queue: 1, ..config() };
    let engine = Engine::load(settings).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    // Faster than the engine's thread takes them.
    let request = plain(tokens(&mut rng, 300), 400);
    let all: Vec<_> = (0..9).map(|_| engine.submit(request.clone())).collect();
    let taken = all.iter().filter(|taken| taken.is_ok()).count();
    assert!((5..=6).contains(&taken), "{taken} of 9: four that run and one that waits");
    let refused = all.into_iter().find_map(Result::err).unwrap();
    assert!(matches!(refused, EngineError::QueueFull { limit: 1 }), "{refused}");
    engine.shutdown();
}

/// Pages of a prepared context are no request's: the scheduler does not know of them.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_the_youngest_gives_way_where_a_context_leaves_too_few_pages() {
    let page = (MODEL.shape.token_bytes() * 64) as u64;
    let model_dir = MODEL_DIR.path().to_path_buf();
    let settings = EngineConfig { device: DeviceChoice::Cuda, kv_budget_bytes: 20 * page, ..config() };
    let engine = Engine::load(EngineConfig { model_dir, max_sequences: 4, ..settings }).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    let answers = |requests: &[Request]| -> Vec<usize> {
        let mut streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        let read = |stream: &mut EventStream| {
            let mut tokens = 0;
            while let Some(event) = stream.blocking_next() {
                match event {
                    Event::Token(_) => tokens += 1,
                    Event::Failed(error) => panic!("{error}"),
                    Event::Started(_) | Event::Finished(_) => {}
                }
            }
            tokens
        };
        streams.iter_mut().map(read).collect()
    };
    // Of twenty pages the context takes twelve; each request grows to seven.
    let context = engine.prepare_context(tokens(&mut rng, 12 * 64), vec![], BlendConfig::default()).unwrap();
    let requests: Vec<Request> = (0..3)
        .map(|_| {
            let request = plain(tokens(&mut rng, 200), 240);
            Request { ignore_eos: true, ..request }
        })
        .collect();
    assert_eq!(answers(&requests), [240; 3]);
    // Who had to give way is not let in again at once.
    let preemptions = engine.load_report().preemptions;
    assert!((1..=8).contains(&preemptions), "{preemptions} gave way");
    let asks = Request { context: Some(Arc::clone(&context)), ..requests[0].clone() };
    assert_eq!(answers(&[asks.clone(), asks]), [240; 2]);
    engine.shutdown();
}

#[test]
fn the_engine_refuses_what_can_never_fit_and_serves_what_can() {
    let page = page_bytes(&MODEL.shape);
    let model_dir = MODEL_DIR.path().to_path_buf();
    let engine = Engine::load(EngineConfig { model_dir, threads: 2, kv_budget_bytes: 3 * page, ..config() }).unwrap();
    let refused = |request: Request| engine.submit(request).err().expect("it must be refused");
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let error = refused(plain(tokens(&mut rng, 800), 1));
    assert!(
        matches!(&error, EngineError::NeverFits { needed, budget, .. } if (*needed, *budget) == (4 * page, 3 * page)),
        "{error}"
    );
    assert!(error.to_string().contains("host memory"), "{error}");
    // A bound of the answer is no demand: what does not fit is cut.
    let mut cut = engine.submit(plain(tokens(&mut rng, 700), 1_000_000)).unwrap();
    let last = std::iter::from_fn(|| cut.blocking_next()).last();
    let Some(Event::Finished(Finished { reason, usage, .. })) = last else { panic!("{last:?}") };
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Memory, 3 * PAGE - 700 + 1));
    // It would fail all that is computed beside it.
    assert!(matches!(refused(plain(vec![5, 251], 4)), EngineError::InvalidRequest(_)));

    let requests: Vec<Request> = (0..6).map(|i| plain(tokens(&mut rng, 200 + i), 150)).collect();
    let mut streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(&mut streams) {
        let mut ids = Vec::new();
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token(token) => ids.push(token.id),
                Event::Failed(error) => panic!("{error}"),
                Event::Started(_) | Event::Finished(_) => {}
            }
        }
        assert_eq!(ids, alone(request).tokens.iter().map(|t| t.0).collect::<Vec<_>>());
    }
    assert!(engine.load_report().preemptions > 0);
    engine.shutdown();
    assert_eq!((engine.load_report().running, engine.load_report().kv_bytes), (0, 0));
}

#[test]
fn the_thread_ends_when_shutdown_comes_behind_a_request_that_is_still_to_be_answered() {
    let mut bench = Bench::new(config(), 8);
    let (commands, receiver) = channel();
    bench.runner.commands = receiver;
    let (events, mut stream) = unbounded_channel();
    let load = Arc::clone(&bench.runner.load);
    commands.send(Command::Submit(bench.submitted(&plain(vec![5, 6, 7], 4), events))).unwrap();
    commands.send(Command::Shutdown).unwrap();
    // Comes when it is too late.
    let (events, late) = unbounded_channel();
    commands.send(Command::Submit(bench.submitted(&plain(vec![5, 6, 7], 4), events))).unwrap();
    let runner = bench.runner;
    let thread = std::thread::spawn(move || runner.run());
    // `commands` lives on, as it does while an engine waits for its thread.
    let begun = Instant::now();
    while !thread.is_finished() {
        assert!(begun.elapsed().as_secs() < 60, "the thread waits for a command that never comes");
        std::thread::yield_now();
    }
    assert!(Answer::read(&mut stream).finished.is_some());
    let mut late = EventStream::new(late);
    assert!(matches!(late.blocking_next(), Some(Event::Failed(EngineError::Stopped(_)))));
    assert!(late.blocking_next().is_none());
    assert_eq!(load.waiting.load(Ordering::Relaxed), 0, "nobody waits any more");
    let (events, _stream) = unbounded_channel();
    let waiting = Waiting::new(&load).0;
    let submitted = Submitted { request: Box::new(plain(vec![5], 1)), events, at: Instant::now(), waiting };
    assert!(commands.send(Command::Submit(submitted)).is_err());
    assert_eq!(load.waiting.load(Ordering::Relaxed), 0, "nor does who was refused");
}

//! What an engine on a GPU must not do. Ignored where there is none.

use super::*;
use crate::kv::KvDtype;

fn engine(pages: u64) -> Engine {
    let page = (MODEL.shape.token_bytes() * 64) as u64;
    let model_dir = MODEL_DIR.path().to_path_buf();
    let settings = EngineConfig { device: DeviceChoice::Cuda, kv_budget_bytes: pages * page, ..config() };
    Engine::load(EngineConfig { model_dir, prefix_cache: true, ..settings }).unwrap()
}

fn written(engine: &Engine, request: &Request) -> usize {
    let (mut stream, mut tokens) = (engine.submit(request.clone()).unwrap(), 0);
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Token(_) => tokens += 1,
            Event::Failed(error) => panic!("{error}"),
            Event::Started(_) | Event::Finished(_) => {}
        }
    }
    tokens
}

/// All of the prefix is in the cache the second time, and the chunk is used as it is: no row is left to compute.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_chunks_are_reused_behind_a_cached_prefix_of_whole_pages() {
    let engine = engine(200);
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    let text = tokens(&mut rng, 90);
    let source = Some(Arc::new(engine.chunk_kv(&[1], &text).unwrap()) as _);
    let chunk = PromptChunk { tokens: text.into(), prefix: [1].into(), source };
    for pages in [1, 2] {
        let mut request = plain(vec![9, 8, 7], 5);
        (request.prompt.prefix, request.prompt.chunks) = (tokens(&mut rng, pages * 64), vec![chunk.clone()]);
        request.blend.mode = BlendMode::Reuse;
        for _ in 0..3 {
            assert_eq!(written(&engine, &request), 5);
        }
    }
    engine.shutdown();
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_an_index_beyond_the_hosts_budget_is_refused_by_name() {
    let engine = engine(40);
    let mut rng = ChaCha8Rng::seed_from_u64(32);
    let attention = AttentionConfig { strategy: Strategy::Retrieval, window: 64, ..AttentionConfig::default() };
    let ask = |n: usize, rng: &mut ChaCha8Rng| Request { attention: attention.clone(), ..plain(tokens(rng, n), 9) };
    let refused = engine.submit(ask(1600, &mut rng)).err().expect("its index takes 50 pages of the host's memory");
    assert!(matches!(refused, EngineError::NeverFits { memory: "host", .. }), "{refused}");
    assert_eq!(written(&engine, &ask(1000, &mut rng)), 9);
    engine.shutdown();
}

/// Contexts in the making, one that decodes, and chunks that are computed use one workspace in turn.
#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_contexts_are_blended_beside_answers_and_chunks() {
    let engine = engine(400);
    let mut rng = ChaCha8Rng::seed_from_u64(33);
    let talks = plain(tokens(&mut rng, 40), 300);
    let asks: Vec<Request> = [BlendMode::Answer, BlendMode::CacheBlend, BlendMode::Reuse, BlendMode::Answer]
        .into_iter()
        .map(|mode| {
            let mut request = plain(tokens(&mut rng, 12), 8);
            request.prompt.prefix = vec![1];
            request.prompt.chunks = [500, 300, 700].map(|n| cached_chunk(&mut rng, n)).to_vec();
            request.blend = BlendConfig { mode, ratio: 0.3, ..BlendConfig::default() };
            request
        })
        .collect();
    let text = tokens(&mut rng, 600);
    let alone = engine.chunk_kv(&[1], &text).unwrap();
    let mut talking = engine.submit(talks).unwrap();
    let beside = std::thread::scope(|scope| {
        let chunk = scope.spawn(|| engine.chunk_kv(&[1], &text).unwrap());
        let answers: Vec<_> = asks.iter().map(|request| scope.spawn(|| written(&engine, request))).collect();
        assert!(answers.into_iter().all(|answer| answer.join().unwrap() == 8));
        chunk.join().unwrap()
    });
    assert_eq!((beside.tokens, beside.layers.len()), (alone.tokens, alone.layers.len()));
    let numbers = |kv: &ChunkKv| kv.layers.iter().flat_map(|l| KvDtype::F32.decode(&l.values)).collect::<Vec<f32>>();
    let apart = numbers(&beside).iter().zip(numbers(&alone)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-2, "a chunk that is cut otherwise differs by {apart}");
    let told = std::iter::from_fn(|| talking.blocking_next()).filter(|e| matches!(e, Event::Token(_))).count();
    assert_eq!(told, 300);
    engine.shutdown();
}

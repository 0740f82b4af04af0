#![allow(clippy::unwrap_used)]
use super::*;
use engine::EngineConfig;

fn options() -> BatchDecodeOptions {
    BatchDecodeOptions {
        lengths: vec![96],
        length_name: None,
        batches: vec![1, 3],
        tokens: 6,
        repeats: 1,
        strategies: vec![Strategy::Full],
        sampling: SamplingParams::default(),
        prompt: PromptSource::Random { seed: 1 },
        prefill_chunk: 32,
        step_tokens: 512,
        mixed_prefill_tokens: 112,
        model_label: "ref".into(),
        output: Output { results_dir: None, ..Output::default() },
    }
}

fn engine(max_context: usize) -> Engine {
    let model_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
    let max_context = Some(max_context);
    Engine::load(EngineConfig { model_dir, threads: 1, prefill_chunk: 32, max_context, ..EngineConfig::default() })
        .unwrap()
}

#[test]
fn floors_and_ratios_follow_from_the_steps() {
    let info = RunInfo::start(&options().output);
    let measured = Measured {
        steps: vec![0.002, 0.001, 0.002, 0.002, 0.010],
        prompt_tokens: 96,
        kv_tokens: 100.0,
        floor_bytes: 4e7,
        rate: ReadRate { gb_s: 40.0, measured: "made up" },
    };
    let peers = [("transformers eager dynamic cache", 12.0), ("transformers compiled static cache", 8.0)];
    let records = figures(&info, "8b/2k/b64/full", &measured, 64, peers.into_iter());
    let value = |metric: &str| records.iter().find(|r| r.metric == metric).map(|r| (r.value, r.floor)).unwrap();
    assert_eq!(value("ms_per_token"), (2.0, Some(1.0)));
    assert_eq!(value("ms_per_token_p99"), (10.0, None));
    assert_eq!(value("floor_share"), (0.5, None));
    assert_eq!(value("tokens_per_second"), (32_000.0, Some(64_000.0)));
    assert_eq!(value("achieved_bandwidth"), (20.0, None));
    assert_eq!(value("ratio_to_transformers"), (4.0, None));
    let ratio = records.iter().find(|r| r.metric == "ratio_to_transformers").unwrap();
    assert_eq!(ratio.peers["transformers eager dynamic cache"], 6.0);
    assert_eq!(figures(&info, "x", &measured, 1, std::iter::empty()).len(), records.len() - 1);
}

#[test]
fn batches_decode_together_and_are_recorded_case_by_case() {
    let peers = DecodePeers {
        version: Some("made up".into()),
        times: vec![(96, 3, "transformers eager dynamic cache", 5.0)],
        errors: vec!["decode:compiled:96:1: made up".into()],
    };
    let engine = engine(4096);
    let report = bench_batch_decode(&engine, &peers, &options(), &mut |_| {}).unwrap();
    let time = |case: &str| report.records.iter().find(|r| r.case == case && r.metric == "ms_per_token").unwrap();
    let (one, three) = (time("ref/short/b1/full"), time("ref/short/b3/full"));
    assert!(one.value > 0.0 && one.floor.unwrap() < one.value, "{one:?}");
    assert_eq!((one.samples, three.samples, one.peers.len(), three.peers.len()), (6, 6, 0, 1));
    // In the middle of the timed steps all three sequences have at least their prompts and what stands before.
    let kv = |record: &Record| record.config["kv_tokens_mid"].as_f64().unwrap();
    assert_eq!(kv(one), (96 + WARM_UP + 3 + 1) as f64);
    assert!(kv(three) >= 3.0 * kv(one), "{}", kv(three));
    assert_eq!(three.config["peer_errors"][0], "decode:compiled:96:1: made up");
}

#[test]
fn a_prompt_as_long_as_the_context_is_cut_and_keeps_its_name() {
    let case = BatchDecodeOptions { lengths: vec![1024], batches: vec![1], ..options() };
    let report = bench_batch_decode(&engine(1024), &DecodePeers::default(), &case, &mut |_| {}).unwrap();
    assert_eq!(report.records[0].case, "ref/1k/b1/full");
    assert_eq!(report.records[0].config["prompt_tokens"], 1024 - (6 + WARM_UP + 2));
    for context in [12, 1023] {
        let none = bench_batch_decode(&engine(context), &DecodePeers::default(), &case, &mut |_| {});
        assert!(matches!(none, Err(EvalError::BadOption { what: "the prompt's length", .. })));
    }
}

#[test]
fn equal_texts_begin_equally_in_every_row() {
    let case = BatchDecodeOptions { prompt: PromptSource::Text(DataSource::Generated), batches: vec![2], ..options() };
    let case = BatchDecodeOptions { lengths: vec![600], length_name: Some("six".into()), ..case };
    let report = bench_batch_decode(&engine(4096), &DecodePeers::default(), &case, &mut |_| {}).unwrap();
    assert_eq!(report.records[0].case, "ref/six/b2/full");
    let sampling = SamplingParams { temperature: 0.7, top_k: 50, top_p: 0.9, seed: Some(1), ..Default::default() };
    let drawn = BatchDecodeOptions { sampling, ..case };
    let report = bench_batch_decode(&engine(4096), &DecodePeers::default(), &drawn, &mut |_| {}).unwrap();
    assert_eq!(report.records[0].case, "ref/six/b2/full/t0.7-k50-p0.9");
}

#[test]
fn senseless_options_are_refused() {
    let bad = [
        BatchDecodeOptions { repeats: 0, ..options() },
        BatchDecodeOptions { tokens: 1, ..options() },
        BatchDecodeOptions { batches: vec![4, 0], ..options() },
        BatchDecodeOptions { batches: vec![], ..options() },
        BatchDecodeOptions { lengths: vec![], ..options() },
        BatchDecodeOptions { sampling: SamplingParams { top_k: 5, ..Default::default() }, ..options() },
        BatchDecodeOptions { lengths: vec![8, 16], length_name: Some("short".into()), ..options() },
    ];
    let fits = BatchDecodeOptions { lengths: vec![100], batches: vec![1], ..options() };
    assert!(fits.check_context(100 + 6 + WARM_UP + 2).is_ok());
    for without_room in [
        BatchDecodeOptions { lengths: vec![8000], ..fits.clone() },
        BatchDecodeOptions { batches: vec![1, usize::MAX], ..fits.clone() },
        BatchDecodeOptions { tokens: usize::MAX, ..fits.clone() },
    ] {
        assert!(matches!(without_room.check_context(4096), Err(EvalError::BadOption { .. })), "{without_room:?}");
    }
    for options in bad {
        assert!(matches!(options.check(), Err(EvalError::BadOption { .. })), "{options:?}");
    }
}

#[test]
fn lengths_have_names() {
    let (plain, named) = (options(), BatchDecodeOptions { length_name: Some("short".into()), ..options() });
    let names = [plain.name_of(512), plain.name_of(2048), plain.name_of(131_072), named.name_of(700)];
    assert_eq!(names, ["short", "2k", "128k", "short"]);
}

//! Documents are ingested and questions asked while many streams decode: nobody's answer changes, and nobody stands still.

use std::collections::HashMap;

use engine::{Event, EventStream, Prompt, Request};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::*;
use crate::{Options, Question};

const STREAMS: usize = 16;
/// Tokens of each stream that are compared.
const COMPARED: usize = 40;

/// The reference model in f32, where no row depends on those beside it, on any machine.
fn model(dir: &Path) {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../eval/models/reference");
    for file in std::fs::read_dir(&reference).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|kind| kind == "json") {
            std::fs::copy(&file, dir.join(file.file_name().unwrap())).unwrap();
        }
    }
    let bytes = std::fs::read(reference.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let widened = tensors.tensors().into_iter().map(|(name, tensor)| {
        assert_eq!(tensor.dtype(), Dtype::BF16, "{name}");
        let rows = tensor.data().chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect::<Vec<u8>>();
        (name, tensor.shape().to_vec(), rows)
    });
    let widened: Vec<_> = widened.collect();
    let views: HashMap<&str, TensorView<'_>> = widened
        .iter()
        .map(|(name, shape, rows)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), rows).unwrap()))
        .collect();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn open(model: &Path, data_dir: &Path) -> Service {
    let settings = Settings {
        model: Some(model.into()),
        threads: 2,
        kv_budget_bytes: Bytes(1 << 30),
        max_sequences: STREAMS + 2,
        data_dir: data_dir.into(),
        ..settings(data_dir)
    };
    Service::open(&settings, Purpose::Ingest).unwrap()
}

/// Text that each stream goes on from.
fn stream(service: &Service, number: usize, max_tokens: Option<usize>) -> EventStream {
    let text = format!("Buoy {number} lies off the pier of Tolmare. In spring the harbour master wrote");
    let prompt = Prompt::plain(service.engine().tokenizer().encode(&text).unwrap());
    let request = Request { ignore_eos: true, max_tokens, ..Request::new(prompt, 0) };
    service.engine().submit(request).unwrap()
}

/// The next token of a stream.
fn next(stream: &mut EventStream) -> u32 {
    loop {
        match stream.blocking_next() {
            Some(Event::Started(_)) => {}
            Some(Event::Token(token)) => return token.id,
            other => panic!("the stream ended: {other:?}"),
        }
    }
}

fn documents(service: &Service) -> IngestReport {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let paths = ["10-customs-archive.md", "11-customs-case-notes.txt"].map(|name| examples.join(name));
    service.ingest("notes", &paths, &mut |_| {}).unwrap()
}

fn ask(service: &Service, question: &str) -> (String, usize, usize) {
    let options = Options { max_tokens: Some(12), ..service.options().clone() };
    let answer = service.answer(&Question::new(question, "notes", 6, options)).unwrap();
    let answer = answer.wait(&mut |_| {}).unwrap();
    (answer.text, answer.stats.prompt_tokens, answer.stats.recomputed_tokens)
}

/// The engine reports behind each step what runs, which is after the events of that step.
fn all_decode(service: &Service) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let running = || service.engine().load_report().running;
    while running() != STREAMS {
        assert!(std::time::Instant::now() < deadline, "{} streams decode, not {STREAMS}", running());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn documents_are_ingested_and_questions_answered_while_sixteen_streams_decode() {
    let dir = tempfile::tempdir().unwrap();
    let model_dir = dir.path().join("model");
    std::fs::create_dir(&model_dir).unwrap();
    model(&model_dir);
    let questions = ["Which password did Edmund Hathersage choose?", "Where did Ida Venstrand move last spring?"];

    let quiet = open(&model_dir, &dir.path().join("quiet"));
    let alone: Vec<Vec<u32>> = (0..STREAMS)
        .map(|number| {
            let mut stream = stream(&quiet, number, Some(COMPARED));
            (0..COMPARED).map(|_| next(&mut stream)).collect()
        })
        .collect();
    let ingested = documents(&quiet);
    let answers = questions.map(|question| ask(&quiet, question));
    assert!(answers.iter().all(|(text, read, recomputed)| !text.is_empty() && read > recomputed), "{answers:?}");
    drop(quiet);

    let loud = open(&model_dir, &dir.path().join("loud"));
    let mut streams: Vec<EventStream> = (0..STREAMS).map(|number| stream(&loud, number, None)).collect();
    let mut written: Vec<Vec<u32>> = streams.iter_mut().map(|stream| vec![next(stream)]).collect();
    all_decode(&loud);
    let beside = documents(&loud);
    assert_eq!(
        (beside.new, beside.chunks_computed, beside.tokens),
        (ingested.new, ingested.chunks_computed, ingested.tokens)
    );
    assert_eq!(questions.map(|question| ask(&loud, question)), answers);
    all_decode(&loud);
    for (stream, written) in streams.iter_mut().zip(&mut written) {
        while written.len() < COMPARED {
            written.push(next(stream));
        }
    }
    assert_eq!(written, alone);
}

//! Which cached tokens a rule recomputes in given prompts, and what follows: to compare with other implementations of it.
//!
//! `blend_choices MODEL_DIR MODE RATIO CORRECTION < prompts.jsonl`, where a prompt is `{"prefix": [ids], "chunks": [[ids], ...],
//! "suffix": [ids]}` and each chunk is computed alone behind the prefix. KV is f32. Prints a line a prompt: `{"chosen":
//! [positions], "token": id, "logprob": x, "charged": share}`.

use std::io::BufRead;

use std::sync::Arc;

use engine::{BlendConfig, Correction, Engine, EngineConfig, Event, KvDtype, Prompt, PromptChunk, Request};

#[derive(serde::Deserialize)]
struct Given {
    prefix: Vec<u32>,
    chunks: Vec<Vec<u32>>,
    suffix: Vec<u32>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, mode, ratio, correction] = &arguments[..] else {
        return Err("usage: blend_choices MODEL_DIR MODE RATIO CORRECTION < prompts.jsonl".into());
    };
    let correction: Correction = correction.parse()?;
    let blend = BlendConfig {
        mode: mode.parse()?,
        ratio: ratio.parse()?,
        correction: Some(correction),
        ..BlendConfig::default()
    };
    let engine = Engine::load(EngineConfig {
        model_dir: model.into(),
        kv_dtype: Some(KvDtype::F32),
        ..EngineConfig::default()
    })?;
    for line in std::io::stdin().lock().lines() {
        let given: Given = serde_json::from_str(&line?)?;
        let chunk = |tokens: &Vec<u32>| -> engine::Result<PromptChunk> {
            let source = Some(Arc::new(engine.chunk_kv(&given.prefix, tokens)?) as _);
            Ok(PromptChunk { tokens: tokens.as_slice().into(), prefix: given.prefix.as_slice().into(), source })
        };
        let chunks = given.chunks.iter().map(chunk).collect::<engine::Result<_>>()?;
        let prompt = Prompt { prefix: given.prefix.clone(), chunks, suffix: given.suffix };
        let mut events = engine.submit(Request { blend: blend.clone(), ..Request::new(prompt, 1) })?;
        let (mut chosen, mut charged) = (Vec::new(), None);
        while let Some(event) = events.blocking_next() {
            match event {
                Event::Started(stats) => (chosen, charged) = (stats.chosen, stats.charged_share),
                Event::Token(token) => println!(
                    "{}",
                    serde_json::json!({"chosen": chosen, "token": token.id, "logprob": token.logprob, "charged": charged})
                ),
                Event::Failed(error) => return Err(error.into()),
                Event::Finished(_) => {}
            }
        }
    }
    engine.shutdown();
    Ok(())
}

//! `generation_config.json`: how the makers of a model want its tokens chosen.

use std::path::Path;

use super::config::Fields;
use crate::error::Result;
use crate::sampler::SamplingParams;

/// The sampling that a model comes with. What it leaves open is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// 0 where the file says not to draw (`do_sample: false`).
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<usize>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; a model may come without.
    ///
    /// As in transformers, `do_sample: false` means the likeliest token, whatever else stands there, and the repetition
    /// penalty holds in any case. A file that gives a temperature, `top_p`, `top_k` or `min_p` and does not say whether to
    /// draw means to: vLLM reads it so, while transformers would ignore them.
    ///
    /// `max_new_tokens` and `max_length` are not taken: an answer ends where the text does.
    ///
    /// # Errors
    /// [`EngineError::Config`](crate::EngineError::Config) for values outside of what a request may ask for.
    pub fn from_dir(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        match path.try_exists() {
            Ok(false) => Ok(GenerationConfig::default()),
            _ => GenerationConfig::from_fields(&Fields::read(&path, "it states how tokens are chosen")?),
        }
    }

    fn from_fields(fields: &Fields) -> Result<GenerationConfig> {
        let repetition_penalty = number(fields, "repetition_penalty", "a number above 0", |x| x > 0.0)?;
        if !fields.flag_or("do_sample", true)? {
            return Ok(GenerationConfig { temperature: Some(0.0), repetition_penalty, ..GenerationConfig::default() });
        }
        Ok(GenerationConfig {
            temperature: number(fields, "temperature", "a number from 0 to 2", |x| (0.0..=2.0).contains(&x))?,
            top_p: number(fields, "top_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            // -1 and 0 mean all.
            top_k: number(fields, "top_k", "a whole number", |x| x.fract() == 0.0 && x >= -1.0)?.map(|k| k as usize),
            min_p: number(fields, "min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty,
        })
    }

    /// These values, and those of the OpenAI API where they are open: tokens are drawn at temperature 1, from all.
    #[must_use]
    pub fn sampling(&self) -> SamplingParams {
        let neutral = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(neutral.top_p),
            top_k: self.top_k.unwrap_or(neutral.top_k),
            min_p: self.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            ..neutral
        }
    }
}

fn number(fields: &Fields, name: &str, expected: &str, allowed: impl Fn(f32) -> bool) -> Result<Option<f32>> {
    if fields.get(name).is_none() {
        return Ok(None);
    }
    let value = fields.number_or(name, 0.0)? as f32;
    if allowed(value) { Ok(Some(value)) } else { Err(fields.wrong(name, expected)) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(text: &str) -> Result<GenerationConfig> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        GenerationConfig::from_dir(dir.path())
    }

    #[test]
    fn what_a_model_states_is_taken_and_the_rest_is_as_in_openais_api() {
        let llama =
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "max_length": 4096}"#;
        let expected = SamplingParams { temperature: 0.6, top_p: 0.9, ..SamplingParams::default() };
        assert_eq!(read(llama).unwrap().sampling(), expected);
        let qwen = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}"#;
        let expected =
            SamplingParams { temperature: 0.7, top_p: 0.8, top_k: 20, repetition_penalty: 1.05, ..Default::default() };
        assert_eq!(read(qwen).unwrap().sampling(), expected);
        let open = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        assert_eq!(read(r#"{"eos_token_id": 2, "temperature": null}"#).unwrap().sampling(), open);
        assert_eq!(GenerationConfig::from_dir(tempfile::tempdir().unwrap().path()).unwrap().sampling(), open);
    }

    #[test]
    fn a_model_that_is_not_to_draw_is_greedy_whatever_else_stands_there() {
        let text = r#"{"do_sample": false, "temperature": 0.9, "top_p": 0.1, "top_k": 3, "repetition_penalty": 1.2}"#;
        let expected = SamplingParams { repetition_penalty: 1.2, ..SamplingParams::default() };
        assert_eq!(read(text).unwrap().sampling(), expected);
        // It says nothing of drawing, and how to draw.
        assert_eq!(read(r#"{"temperature": 0.6, "top_k": -1}"#).unwrap().sampling().temperature, 0.6);
    }

    #[test]
    fn a_value_that_no_request_may_ask_for_names_file_and_field() {
        for (text, field) in [
            (r#"{"temperature": 3}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"top_k": 2.5}"#, "top_k"),
            (r#"{"do_sample": false, "repetition_penalty": 0}"#, "repetition_penalty"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("generation_config.json"), "{text}: {error}");
        }
    }
}

//! The ways of serving a context that are compared.

use std::collections::HashSet;

use ann_index::IndexKind;
use engine::{AttentionConfig, BlendConfig, BlendMode, Correction, KvCodec, Strategy};

use super::QualityOptions;
use crate::error::{EvalError, Result};

/// Names in the order of tables. `full` stands for `full-recompute` too: they are the same computation.
const NAMES: [&str; 14] = [
    FULL,
    "window",
    "retrieval-flat",
    "retrieval-hnsw",
    "default",
    "reuse",
    "random-15",
    "epic",
    "question-15",
    "answer-15",
    "cacheblend-5",
    "cacheblend-15",
    "cacheblend-30",
    "cacheblend-50",
];

/// The configuration that all others are compared with.
pub(crate) const FULL: &str = "full";

/// Left out unless named: `answer-15` is close to `default`. The answers of `retrieval-hnsw` are those of
/// `retrieval-flat` up to the recall of the graph, which is slow to build for contexts that are asked once.
const ON_DEMAND: [&str; 5] = ["retrieval-hnsw", "answer-15", "random-15", "epic", "question-15"];

/// Names of configurations, in the order of tables. Beside these, any `MODE-PERCENT` is one: a rule and the share of the cached
/// tokens that it recomputes, such as `cacheblend-10`. `+none`, `+prompt` or `+chunk` behind it is the correction of tokens that stay
/// cached, where another than the rule's own is wanted: `answer-15+none`. Last, `-int8` or `-kivi4` is how chunks are stored:
/// `default-kivi4`.
#[must_use]
pub fn config_names() -> Vec<&'static str> {
    NAMES.to_vec()
}

/// The place of a configuration in tables, behind all where it is not one of [`config_names`].
pub(crate) fn place(name: &str) -> usize {
    NAMES.iter().position(|known| *known == name).unwrap_or(NAMES.len())
}

/// One way of serving a context.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) name: String,
    /// How the KV of a context is made.
    pub(super) blend: BlendConfig,
    /// How the chunks' own KV is stored.
    pub(super) codec: KvCodec,
    pub(super) attention: AttentionConfig,
}

impl Config {
    /// Whether the chunks' own KV is needed.
    pub(super) fn uses_chunks(&self) -> bool {
        self.blend.mode != BlendMode::FullRecompute
    }

    /// Whether a context's KV is the same whatever is asked, so that questions can share it.
    pub(super) fn is_shared(&self) -> bool {
        !self.blend.mode.asks()
    }
}

/// The chosen configurations: `full` first, and those that share a context's KV side by side.
///
/// # Errors
/// [`EvalError::UnknownName`].
pub(super) fn chosen(options: &QualityOptions) -> Result<Vec<Config>> {
    let all = || NAMES.iter().filter(|name| !ON_DEMAND.contains(name)).map(ToString::to_string).collect();
    let mut names: Vec<String> = if options.configs.is_empty() { all() } else { options.configs.clone() };
    names.sort_by_key(|name| place(name));
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names.into_iter().map(|name| config(name, options)).collect()
}

fn config(name: String, options: &QualityOptions) -> Result<Config> {
    let full = BlendConfig { mode: BlendMode::FullRecompute, ..BlendConfig::default() };
    let (served, codec) = coded(&name);
    let (blend, strategy, index) = match served {
        FULL => (full, Strategy::Full, IndexKind::Flat),
        "window" => (full, Strategy::Window, IndexKind::Flat),
        "retrieval-flat" => (full, Strategy::Retrieval, IndexKind::Flat),
        "retrieval-hnsw" => (full, Strategy::Retrieval, IndexKind::Hnsw),
        "default" => (BlendConfig::default(), Strategy::Full, IndexKind::Flat),
        other => (blending(other).ok_or_else(|| unknown(&name))?, Strategy::Full, IndexKind::Flat),
    };
    if codec != KvCodec::Raw && blend.mode == BlendMode::FullRecompute {
        return Err(unknown(&name));
    }
    let attention =
        AttentionConfig { strategy, sinks: options.sinks, window: options.window, k: options.k, ef: options.ef, index };
    Ok(Config { name, blend, codec, attention })
}

/// What stands before the codec, where one is named, and the codec.
fn coded(name: &str) -> (&str, KvCodec) {
    let parts = name.rsplit_once('-').and_then(|(served, codec)| Some((served, codec.parse().ok()?)));
    parts.unwrap_or((name, KvCodec::Raw))
}

/// A rule that knows how much it recomputes, or a rule and a percentage; then perhaps a correction.
fn blending(name: &str) -> Option<BlendConfig> {
    let (rule, correction) = match name.split_once('+') {
        Some((rule, correction)) => (rule, Some(correction.parse::<Correction>().ok()?)),
        None => (name, None),
    };
    let whole = |mode: BlendMode| matches!(mode, BlendMode::Reuse | BlendMode::Epic);
    let (mode, ratio) = match rule.parse::<BlendMode>() {
        Ok(mode) => whole(mode).then_some((mode, 0.0))?,
        Err(_) => {
            let (mode, percent) = rule.rsplit_once('-')?;
            let (mode, percent) = (mode.parse().ok()?, percent.parse::<u8>().ok()?);
            let fits = percent <= 100 && mode != BlendMode::FullRecompute && !whole(mode);
            fits.then_some((mode, f32::from(percent) / 100.0))?
        }
    };
    Some(BlendConfig { mode, ratio, correction, ..BlendConfig::default() })
}

fn unknown(name: &str) -> EvalError {
    let known = format!(
        "{}, and MODE-PERCENT for any rule that recomputes a share, each with +none, +prompt or +chunk for another correction; behind it -int8 or -kivi4 for chunks that are stored so",
        NAMES.join(", ")
    );
    EvalError::UnknownName { what: "configuration", name: name.into(), known }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn named(names: &[&str]) -> Result<Vec<Config>> {
        let configs = names.iter().map(ToString::to_string).collect();
        chosen(&QualityOptions { configs, ..QualityOptions::default() })
    }

    #[test]
    fn all_but_the_ones_on_demand_by_default_and_any_by_name_with_full_first() {
        let names = |configs: Vec<Config>| configs.into_iter().map(|c| c.name).collect::<Vec<_>>();
        let all = names(named(&[]).unwrap());
        assert_eq!(all.len(), NAMES.len() - ON_DEMAND.len());
        assert!(ON_DEMAND.iter().all(|name| !all.contains(&name.to_string())));
        let some = named(&["cacheblend-10", "retrieval-hnsw", "full", "reuse", "answer-5", "cacheblend-10"]).unwrap();
        assert_eq!(names(some), ["full", "retrieval-hnsw", "reuse", "cacheblend-10", "answer-5"]);
    }

    #[test]
    fn ratios_are_what_the_names_say() {
        for (name, ratio) in [("cacheblend-15", 0.15), ("cacheblend-7", 0.07), ("cacheblend-100", 1.0)] {
            let config = &named(&[name]).unwrap()[0];
            assert_eq!((config.blend.mode, config.blend.ratio), (BlendMode::CacheBlend, ratio));
            assert!(config.uses_chunks());
        }
        let config = &named(&["answer-10+prompt"]).unwrap()[0];
        assert_eq!((config.blend.mode, config.blend.correction), (BlendMode::Answer, Some(Correction::Prompt)));
        assert!(!config.is_shared() && named(&["epic+none"]).unwrap()[0].is_shared());
        let config = &named(&["default"]).unwrap()[0];
        assert_eq!(config.blend, BlendConfig::default());
        assert!(!named(&["window"]).unwrap()[0].uses_chunks());
    }

    #[test]
    fn a_codec_stands_behind_what_it_is_used_with() {
        for (name, codec) in
            [("default", KvCodec::Raw), ("default-int8", KvCodec::Int8), ("default-kivi4", KvCodec::Kivi4)]
        {
            let config = &named(&[name]).unwrap()[0];
            assert_eq!((&config.blend, config.codec, &*config.name), (&BlendConfig::default(), codec, name));
        }
        let config = &named(&["cacheblend-15+none-kivi4"]).unwrap()[0];
        assert_eq!(
            (config.blend.mode, config.blend.ratio, config.codec),
            (BlendMode::CacheBlend, 0.15, KvCodec::Kivi4)
        );
        assert_eq!(config.blend.correction, Some(Correction::None));
        assert_eq!(named(&["reuse-int8"]).unwrap()[0].blend.mode, BlendMode::Reuse);
    }

    #[test]
    fn other_names_are_refused_with_what_is_known() {
        for name in [
            "fast",
            "cacheblend",
            "cacheblend-101",
            "cacheblend-x",
            "reuse-15",
            "full-recompute-5",
            "answer",
            "answer-15+x",
            "default-kivi2",
            "full-kivi4",
            "window-int8",
        ] {
            let error = named(&["full", name]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("MODE-PERCENT"), "{error}");
        }
    }
}

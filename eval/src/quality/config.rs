//! The ways of serving a context that are compared.

use std::collections::HashSet;

use ann_index::IndexKind;
use engine::{AttentionConfig, BlendConfig, BlendMode, Correction, GateConfig, KvCodec, Strategy};

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
/// tokens that it recomputes, such as `cacheblend-10`; `MODE-mPERCENT` is a share of the attention instead. Parts behind a `+`: `none`,
/// `prompt` or `chunk`, the correction of tokens that stay cached, where another than the rule's own is wanted (`answer-15+none`); `gate`,
/// with which the gate acts, and its thresholds: `answer-13+gate:mass=80:most=30:small=17:below=96:wide=12:whole=16:reach=2`, shares in percent.
/// Last, `-int8` or `-kivi4` is how chunks are stored: `default-kivi4`. `NAME=CONFIGURATION` gives any of them a name for tables and records.
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
    /// What it was asked for as, where that is not its name.
    pub(super) what: String,
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
    names.sort_by_key(|name| place(name.split('=').next().unwrap_or(name)));
    let mut configs = names.into_iter().map(|name| config(name, options)).collect::<Result<Vec<_>>>()?;
    let mut seen = HashSet::new();
    configs.retain(|config| seen.insert(config.name.clone()));
    Ok(configs)
}

/// What the names stand for that were given to configurations.
pub(super) fn described(configs: &[Config]) -> Option<serde_json::Value> {
    let named: serde_json::Map<_, _> = configs
        .iter()
        .filter(|config| config.what != config.name)
        .map(|c| (c.name.clone(), c.what.clone().into()))
        .collect();
    (!named.is_empty()).then(|| named.into())
}

fn config(name: String, options: &QualityOptions) -> Result<Config> {
    let (name, what) = match name.split_once('=').filter(|(name, _)| !name.contains(':')) {
        Some((name, what)) => (name.to_owned(), what.to_owned()),
        None => (name.clone(), name),
    };
    let full = BlendConfig { mode: BlendMode::FullRecompute, ..BlendConfig::default() };
    let (served, codec) = coded(&what);
    let (blend, strategy, index) = match served {
        FULL => (full, Strategy::Full, IndexKind::Flat),
        "window" => (full, Strategy::Window, IndexKind::Flat),
        "retrieval-flat" => (full, Strategy::Retrieval, IndexKind::Flat),
        "retrieval-hnsw" => (full, Strategy::Retrieval, IndexKind::Hnsw),
        "default" => (BlendConfig::default(), Strategy::Full, IndexKind::Flat),
        other => (blending(other).ok_or_else(|| unknown(&what))?, Strategy::Full, IndexKind::Flat),
    };
    if codec != KvCodec::Raw && blend.mode == BlendMode::FullRecompute {
        return Err(unknown(&what));
    }
    let attention =
        AttentionConfig { strategy, sinks: options.sinks, window: options.window, k: options.k, ef: options.ef, index };
    Ok(Config { name, what, blend, codec, attention })
}

/// What stands before the codec, where one is named, and the codec.
fn coded(name: &str) -> (&str, KvCodec) {
    let parts = name.rsplit_once('-').and_then(|(served, codec)| Some((served, codec.parse().ok()?)));
    parts.unwrap_or((name, KvCodec::Raw))
}

/// A rule that knows how much it recomputes, or a rule and a percentage; then perhaps a correction and the gate, which is off
/// without.
fn blending(name: &str) -> Option<BlendConfig> {
    let mut parts = name.split('+');
    let rule = parts.next()?;
    let (mut correction, mut gate) = (None, GateConfig { on: false, ..GateConfig::default() });
    for part in parts {
        match part.strip_prefix("gate") {
            Some(thresholds) => gate = gated(thresholds)?,
            None => correction = Some(part.parse::<Correction>().ok()?),
        }
    }
    let whole = |mode: BlendMode| matches!(mode, BlendMode::Reuse | BlendMode::Epic);
    let share = |percent: &str| Some(f32::from(percent.parse::<u8>().ok().filter(|percent| *percent <= 100)?) / 100.0);
    let (mode, ratio, mass) = match rule.parse::<BlendMode>() {
        Ok(mode) => whole(mode).then_some((mode, 0.0, None))?,
        Err(_) => {
            let (mode, percent) = rule.rsplit_once('-')?;
            let mode: BlendMode = mode.parse().ok()?;
            let found = match percent.strip_prefix('m') {
                Some(percent) if mode.asks() => (mode, 0.0, Some(share(percent)?)),
                Some(_) => return None,
                None => (mode, share(percent)?, None),
            };
            (mode != BlendMode::FullRecompute && !whole(mode)).then_some(found)?
        }
    };
    Some(BlendConfig { mode, ratio, mass, correction, gate, ..BlendConfig::default() })
}

/// The gate with these thresholds, each behind a colon.
fn gated(thresholds: &str) -> Option<GateConfig> {
    let mut gate = GateConfig { on: true, ..GateConfig::default() };
    let mut parts = thresholds.split(':');
    parts.next().filter(|before| before.is_empty())?;
    for part in parts {
        let (name, value) = part.split_once('=')?;
        let share = || Some(f32::from(value.parse::<u8>().ok().filter(|percent| *percent <= 100)?) / 100.0);
        match name {
            "mass" => gate.mass = share()?,
            "most" => gate.most = share()?,
            "small" => gate.small_ratio = share()?,
            "below" => gate.small_tokens = value.parse().ok()?,
            "wide" => gate.wide = value.parse().ok()?,
            "whole" => gate.whole = value.parse().ok()?,
            "reach" => gate.reach = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(gate)
}

fn unknown(name: &str) -> EvalError {
    let known = format!(
        "{}, and MODE-PERCENT for any rule that recomputes a share, each with +none, +prompt or +chunk for another correction, \
         and +gate:THRESHOLD=NUMBER:... (mass, most, small, below, wide, whole, reach), and behind it all -int8 or -kivi4 for chunks that are stored so",
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
        assert_eq!(named(&["answer-m90"]).unwrap()[0].blend.mass, Some(0.9));
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
    fn the_gate_is_off_unless_named_and_takes_its_thresholds_from_the_name() {
        let gate = |name: &str| named(&[name]).unwrap()[0].blend.gate.clone();
        let known = GateConfig::default();
        assert!(!gate("answer-13").on && !gate("answer-13+prompt").on);
        assert_eq!(gate("answer-13+gate"), GateConfig { on: true, ..known.clone() });
        let wanted = GateConfig {
            on: true,
            small_tokens: 70,
            small_ratio: 0.2,
            mass: 0.8,
            most: 0.4,
            wide: 12.5,
            whole: 15.0,
            reach: 3,
        };
        assert_eq!(gate("answer-13+none+gate:mass=80:most=40:small=20:below=70:wide=12.5:whole=15:reach=3"), wanted);
        let named = &named(&["best=answer-13+gate:mass=80"]).unwrap()[0];
        assert_eq!((named.name.as_str(), named.blend.gate.mass), ("best", 0.8));
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
            "answer-15+gates",
            "answer-15+gate:mass=101",
            "answer-15+gate:depth=2",
            "cacheblend-m90",
            "default-kivi2",
            "full-kivi4",
            "window-int8",
        ] {
            let error = named(&["full", name]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("MODE-PERCENT"), "{error}");
        }
        assert!(named(&["full", "best=fast"]).unwrap_err().to_string().contains("`fast`"));
    }
}

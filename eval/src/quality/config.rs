//! The ways of serving a context that are compared.

use ann_index::IndexKind;
use engine::{AttentionConfig, BlendConfig, BlendMode, Strategy};

use super::QualityOptions;

/// Names in the order of tables, how the context is made, and how question and answer attend it. `full` stands for
/// `full-recompute` too: they are the same computation.
const CONFIGS: [(&str, Blend, Strategy, IndexKind); 9] = [
    ("full", Blend::Full, Strategy::Full, IndexKind::Flat),
    ("window", Blend::Full, Strategy::Window, IndexKind::Flat),
    ("retrieval-flat", Blend::Full, Strategy::Retrieval, IndexKind::Flat),
    ("retrieval-hnsw", Blend::Full, Strategy::Retrieval, IndexKind::Hnsw),
    ("reuse", Blend::Reuse, Strategy::Full, IndexKind::Flat),
    ("cacheblend-5", Blend::Percent(5), Strategy::Full, IndexKind::Flat),
    ("cacheblend-15", Blend::Percent(15), Strategy::Full, IndexKind::Flat),
    ("cacheblend-30", Blend::Percent(30), Strategy::Full, IndexKind::Flat),
    ("cacheblend-50", Blend::Percent(50), Strategy::Full, IndexKind::Flat),
];

/// Left out unless named: its answers are those of `retrieval-flat` up to the recall of the graph, and it is slow to
/// build for contexts that are asked once.
const ON_DEMAND: &str = "retrieval-hnsw";

/// The names of all configurations, in the order of tables.
#[must_use]
pub fn config_names() -> Vec<&'static str> {
    CONFIGS.iter().map(|config| config.0).collect()
}

/// How the KV of a context is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blend {
    Full,
    Reuse,
    /// Of the tokens, recomputed.
    Percent(u8),
}

impl Blend {
    /// Whether the chunks' own KV is needed.
    pub(super) fn uses_chunks(self) -> bool {
        self != Blend::Full
    }

    pub(super) fn settings(self) -> BlendConfig {
        let (mode, ratio) = match self {
            Blend::Full => (BlendMode::FullRecompute, 1.0),
            Blend::Reuse => (BlendMode::Reuse, 0.0),
            Blend::Percent(percent) => (BlendMode::CacheBlend, f32::from(percent) / 100.0),
        };
        BlendConfig { mode, ratio, ..BlendConfig::default() }
    }
}

/// One way of serving a context.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) name: &'static str,
    pub(super) blend: Blend,
    pub(super) attention: AttentionConfig,
}

/// The chosen configurations, those that share a context's KV side by side.
pub(super) fn chosen(options: &QualityOptions) -> Vec<Config> {
    let wanted = |name: &str| {
        if options.configs.is_empty() { name != ON_DEMAND } else { options.configs.iter().any(|c| c == name) }
    };
    let chosen = CONFIGS.into_iter().filter(|config| wanted(config.0));
    chosen
        .map(|(name, blend, strategy, index)| Config {
            name,
            blend,
            attention: AttentionConfig {
                strategy,
                sinks: options.sinks,
                window: options.window,
                k: options.k,
                ef: options.ef,
                index,
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_slow_one_by_default_and_any_by_name() {
        let names = |options: &QualityOptions| chosen(options).iter().map(|c| c.name).collect::<Vec<_>>();
        let all = names(&QualityOptions::default());
        assert_eq!(all.len(), CONFIGS.len() - 1);
        assert!(!all.contains(&ON_DEMAND));
        let configs = vec![ON_DEMAND.to_owned(), "full".to_owned()];
        assert_eq!(names(&QualityOptions { configs, ..QualityOptions::default() }), ["full", ON_DEMAND]);
    }

    #[test]
    fn ratios_are_what_the_names_say() {
        for config in chosen(&QualityOptions::default()) {
            if let Some(percent) = config.name.strip_prefix("cacheblend-") {
                let settings = config.blend.settings();
                assert_eq!(settings.mode, BlendMode::CacheBlend);
                assert_eq!(format!("{:.0}", settings.ratio * 100.0), percent);
            }
        }
    }
}

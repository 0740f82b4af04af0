//! From settings to an index.

use half::{bf16, f16};

use crate::check::check_rows;
use crate::clusters::ClustersIndex;
use crate::element::Element;
use crate::error::IndexError;
use crate::flat::FlatIndex;
use crate::graph::{GraphIndex, MOST_HEADS};
use crate::hnsw::HnswIndex;
use crate::key_index::KeyIndex;
use crate::neighbours::Neighbours;
use crate::params::{IndexKind, IndexParams, KeyPrecision};

/// Builds an index over `keys`, rows of `dim` numbers; no rows at all gives an empty index to
/// append to.
///
/// `sample_queries` are rows of `dim` numbers drawn from the queries to come, for indexes that
/// shape themselves after them: `graph` does, and without any takes the keys for queries. The others
/// check them and do not use them.
///
/// # Errors
/// [`IndexError::BadParameter`] when `dim` is 0, a setting is out of range or the sample queries are not as many for
/// each of several query heads, [`IndexError::Unsupported`]
/// for `ivf` in a program without it, and what [`KeyIndex::append`] refuses.
pub fn build(
    dim: usize,
    keys: &[f32],
    sample_queries: &[f32],
    params: &IndexParams,
) -> Result<Box<dyn KeyIndex>, IndexError> {
    build_any(dim, keys, sample_queries, None, params, &|| true)
}

/// As [`build`], given up once `wanted` says no. `hnsw`, which may take minutes, asks before each key; the others ask
/// once, before they begin.
///
/// # Errors
/// As [`build`], and [`IndexError::Cancelled`].
pub fn build_while(
    dim: usize,
    keys: &[f32],
    sample_queries: &[f32],
    params: &IndexParams,
    wanted: &(dyn Fn() -> bool + Sync),
) -> Result<Box<dyn KeyIndex>, IndexError> {
    build_any(dim, keys, sample_queries, None, params, wanted)
}

/// As [`build`], with the keys nearest to each of the `sample_queries` computed elsewhere, on a device or
/// by [`exact_neighbours`](crate::exact_neighbours). Only `graph` uses them.
///
/// # Errors
/// As [`build`], and [`IndexError::BadNeighbours`] when they do not fit the keys and queries.
pub fn build_with_neighbours(
    dim: usize,
    keys: &[f32],
    sample_queries: &[f32],
    neighbours: &Neighbours,
    params: &IndexParams,
) -> Result<Box<dyn KeyIndex>, IndexError> {
    build_any(dim, keys, sample_queries, Some(neighbours), params, &|| true)
}

fn build_any(
    dim: usize,
    keys: &[f32],
    sample_queries: &[f32],
    neighbours: Option<&Neighbours>,
    params: &IndexParams,
    wanted: &(dyn Fn() -> bool + Sync),
) -> Result<Box<dyn KeyIndex>, IndexError> {
    check_params(dim, params)?;
    check_rows("keys", dim, keys)?;
    check_rows("sample queries", dim, sample_queries)?;
    let (samples, heads) = (sample_queries.len() / dim, params.graph.query_heads);
    if params.kind == IndexKind::Graph && samples % heads != 0 {
        let expected = "as many for each of `graph.query_heads`";
        return Err(IndexError::BadParameter { name: "sample queries", value: samples, expected });
    }
    if let Some(neighbours) = neighbours {
        neighbours.check(keys.len() / dim, sample_queries.len() / dim)?;
    }
    if !wanted() {
        return Err(IndexError::Cancelled);
    }
    match params.precision {
        KeyPrecision::F32 => build_as::<f32>(dim, keys, sample_queries, neighbours, params, wanted),
        KeyPrecision::Bf16 => build_as::<bf16>(dim, keys, sample_queries, neighbours, params, wanted),
        KeyPrecision::F16 => build_as::<f16>(dim, keys, sample_queries, neighbours, params, wanted),
        KeyPrecision::Int8 => build_as::<i8>(dim, keys, sample_queries, neighbours, params, wanted),
    }
}

fn build_as<T: Element>(
    dim: usize,
    keys: &[f32],
    samples: &[f32],
    neighbours: Option<&Neighbours>,
    params: &IndexParams,
    wanted: &(dyn Fn() -> bool + Sync),
) -> Result<Box<dyn KeyIndex>, IndexError> {
    Ok(match params.kind {
        IndexKind::Flat => Box::new(FlatIndex::<T>::build(dim, keys)?),
        IndexKind::Hnsw => Box::new(HnswIndex::<T>::build_while(dim, keys, params, wanted)?),
        IndexKind::Graph => Box::new(GraphIndex::<T>::build(dim, keys, samples, neighbours, &params.graph)?),
        IndexKind::Clusters => Box::new(ClustersIndex::<T>::build(dim, keys, &params.clusters)?),
        IndexKind::Ivf => crate::ivf::build::<T>(dim, keys, &params.ivf)?,
    })
}

fn check_params(dim: usize, params: &IndexParams) -> Result<(), IndexError> {
    check_range("dim", dim, 1..=65_536, "1 to 65,536")?;
    check_range("hnsw_m", params.hnsw_m, 2..=255, "2 to 255")?;
    let ef = params.hnsw_ef_construction;
    check_range("hnsw_ef_construction", ef, 1..=65_536, "1 to 65,536")?;
    let graph = &params.graph;
    check_range("graph.degree", graph.degree, 4..=255, "4 to 255")?;
    check_range("graph.build_ef", graph.build_ef, 1..=65_536, "1 to 65,536")?;
    check_range("graph.entry_points", graph.entry_points, 1..=4096, "1 to 4,096")?;
    check_range("graph.sample_neighbours", graph.sample_neighbours, 2..=4096, "2 to 4,096")?;
    check_range("graph.query_heads", graph.query_heads, 1..=MOST_HEADS, "1 to 128")?;
    let clusters = &params.clusters;
    check_range("clusters.segment", clusters.segment, 64..=65_536, "64 to 65,536")?;
    check_range("clusters.keys_per_cluster", clusters.keys_per_cluster, 1..=1024, "1 to 1,024")?;
    check_range("clusters.iterations", clusters.iterations, 1..=100, "1 to 100")?;
    check_range("ivf.lists", params.ivf.lists, 0..=65_536, "0 to 65,536")
}

fn check_range(
    name: &'static str,
    value: usize,
    range: std::ops::RangeInclusive<usize>,
    expected: &'static str,
) -> Result<(), IndexError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(IndexError::BadParameter { name, value, expected })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_build_that_nobody_wants_ends_early() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let keys: Vec<f32> = (0..3000 * 4).map(|i| ((i * 7919) % 100_003) as f32 / 100_003.0).collect();
        for kind in IndexKind::ALL.into_iter().filter(|kind| kind.is_built_in()) {
            let params = IndexParams { kind, ..IndexParams::default() };
            let never = build_while(4, &keys, &[], &params, &|| false);
            assert!(matches!(never, Err(IndexError::Cancelled)), "{kind}");
            assert_eq!(build_while(4, &keys, &[], &params, &|| true).unwrap().len(), 3000, "{kind}");
        }
        let params = IndexParams { kind: IndexKind::Hnsw, ..IndexParams::default() };
        let asks = |upto: usize| {
            let asked = AtomicUsize::new(0);
            let built = build_while(4, &keys, &[], &params, &|| asked.fetch_add(1, Ordering::Relaxed) < upto);
            (built.err(), asked.into_inner())
        };
        let (none, all) = asks(usize::MAX);
        assert!(none.is_none() && all > 1000, "{all}");
        // Among the first keys, among those that several threads insert, and among those that are looked up at last.
        for upto in [100, all / 2, all - 10] {
            let (given_up, asked) = asks(upto);
            assert_eq!(given_up, Some(IndexError::Cancelled), "{upto} of {all}");
            assert!(asked <= upto + 64, "{asked}: it goes on behind {upto}");
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let refused = |dim, params: &IndexParams| build(dim, &[], &[], params).unwrap_err();
        let good = IndexParams::default();
        assert!(refused(0, &good).to_string().contains("`dim` is 0"));
        for m in [0, 1, 256] {
            let params = IndexParams { hnsw_m: m, ..good.clone() };
            assert!(refused(4, &params).to_string().contains("`hnsw_m`"));
        }
        let params = IndexParams { hnsw_ef_construction: 0, ..good };
        assert!(refused(4, &params).to_string().contains("ef_construction"));
    }

    #[test]
    fn sample_queries_are_checked() {
        let params = IndexParams::default();
        assert!(build(2, &[], &[1.0], &params).is_err());
        assert!(build(2, &[], &[1.0, f32::NAN], &params).is_err());
        assert!(build(2, &[], &[1.0, 2.0], &params).is_ok());
    }
}

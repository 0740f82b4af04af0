//! From settings to an index.

use half::bf16;

use crate::check::check_rows;
use crate::error::IndexError;
use crate::flat::FlatIndex;
use crate::hnsw::HnswIndex;
use crate::key_index::{IndexKind, IndexParams, KeyIndex, KeyPrecision};

/// Builds an index over `keys`, rows of `dim` numbers; no rows at all gives an empty index to
/// append to.
///
/// `sample_queries` are rows of `dim` numbers drawn from the queries to come, for indexes that
/// shape themselves after them. They are checked and then not used by `flat` and `hnsw`.
///
/// # Errors
/// [`IndexError::BadParameter`] when `dim` is 0 or a setting is out of range, and what
/// [`KeyIndex::append`] refuses.
pub fn build(
    dim: usize,
    keys: &[f32],
    sample_queries: &[f32],
    params: &IndexParams,
) -> Result<Box<dyn KeyIndex>, IndexError> {
    check_range("dim", dim, 1..=65_536, "1 to 65,536")?;
    check_range("hnsw_m", params.hnsw_m, 2..=255, "2 to 255")?;
    let ef = params.hnsw_ef_construction;
    check_range("hnsw_ef_construction", ef, 1..=65_536, "1 to 65,536")?;
    check_rows("sample queries", dim, sample_queries)?;
    Ok(match (params.kind, params.precision) {
        (IndexKind::Flat, KeyPrecision::F32) => Box::new(FlatIndex::<f32>::build(dim, keys)?),
        (IndexKind::Flat, KeyPrecision::Bf16) => Box::new(FlatIndex::<bf16>::build(dim, keys)?),
        (IndexKind::Hnsw, KeyPrecision::F32) => Box::new(HnswIndex::<f32>::build(dim, keys, params)?),
        (IndexKind::Hnsw, KeyPrecision::Bf16) => Box::new(HnswIndex::<bf16>::build(dim, keys, params)?),
    })
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

//! What may enter an index.

use crate::error::IndexError;

/// The longest norm taken. The product of two such norms, and four times its square, stay finite
/// in f32, so neither inner products nor squared distances overflow.
const MAX_NORM: f64 = (1u64 << 61) as f64;

/// Refuses anything but whole rows of `dim` finite numbers of bearable norm.
pub(crate) fn check_rows(what: &'static str, dim: usize, values: &[f32]) -> Result<(), IndexError> {
    if !values.len().is_multiple_of(dim) {
        return Err(IndexError::NotRows { what, dim, found: values.len() });
    }
    for (row, numbers) in values.chunks_exact(dim).enumerate() {
        let squares: f64 = numbers.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if squares <= MAX_NORM * MAX_NORM {
            continue;
        }
        if let Some(column) = numbers.iter().position(|x| !x.is_finite()) {
            return Err(IndexError::NotFinite { what, row, column, value: numbers[column] });
        }
        return Err(IndexError::TooLong { what, row, norm: squares.sqrt(), limit: MAX_NORM });
    }
    Ok(())
}

/// Refuses a query that is not one bearable row of `dim` numbers.
pub(crate) fn check_query(dim: usize, query: &[f32]) -> Result<(), IndexError> {
    check_len("query", dim, query.len())?;
    check_rows("query", dim, query)
}

/// Refuses a length other than `dim`.
pub(crate) fn check_len(what: &'static str, dim: usize, found: usize) -> Result<(), IndexError> {
    if found == dim {
        return Ok(());
    }
    Err(IndexError::DimensionMismatch { what, expected: dim, found })
}

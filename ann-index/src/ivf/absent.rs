//! What stands in for the inverted lists in a program that is built without faiss.

use super::unavailable;
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::KeyIndex;
use crate::params::IvfParams;
use crate::storage::{Parts, Wrong};

/// Whether this program has the kind.
pub(crate) const BUILT_IN: bool = false;

/// Says how to get it.
pub(crate) fn build<T: Element>(_: usize, _: &[f32], _: &IvfParams) -> Result<Box<dyn KeyIndex>, IndexError> {
    Err(unavailable())
}

/// Says how to get it.
pub(crate) fn read<T: Element>(_: &Parts, _: &dyn Fn(Wrong) -> IndexError) -> Result<Box<dyn KeyIndex>, IndexError> {
    Err(unavailable())
}

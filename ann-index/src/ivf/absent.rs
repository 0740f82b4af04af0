//! What stands in for the inverted lists in a program that is built without faiss.

use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::KeyIndex;
use crate::params::{IndexKind, IvfParams};
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

fn unavailable() -> IndexError {
    IndexError::Unsupported {
        what: "implementation in this program, which is built without faiss",
        kind: IndexKind::Ivf,
        instead: "build it with `cargo build --release -p quire --features faiss` (needs cmake and OpenBLAS), or take `clusters`, which also scores centroids and then members",
    }
}

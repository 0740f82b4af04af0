//! The inverted lists of faiss: there only where the cargo feature `faiss` is, for the library is C++ that takes longer to
//! build than everything else here.
//!
//! This line is the only place that asks for the feature; everything else asks [`BUILT_IN`].

#[cfg_attr(not(feature = "faiss-api"), path = "ivf/absent.rs")]
mod index;

use crate::error::IndexError;
use crate::params::IndexKind;

pub(crate) use index::{BUILT_IN, build, read};

/// Says how to get it.
pub(crate) fn unavailable() -> IndexError {
    IndexError::Unsupported {
        what: "implementation in this program, which is built without faiss",
        kind: IndexKind::Ivf,
        instead: "build it with `cargo build --release -p quire -p quire-bench --features faiss` (needs cmake and OpenBLAS), or take `clusters`, which also scores centroids and then members",
    }
}

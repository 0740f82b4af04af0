//! The inverted lists of faiss: not part of this build.

use crate::error::IndexError;
use crate::params::IndexKind;

/// Says what to take instead.
pub(crate) fn unavailable() -> IndexError {
    IndexError::Unsupported {
        what: "implementation in this program, which is built without faiss",
        kind: IndexKind::Ivf,
        instead: "take `clusters`, which also scores centroids and then members, or compare with faiss itself (PyPI `faiss-cpu`) through `quire bench index`",
    }
}

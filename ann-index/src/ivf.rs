//! The inverted lists of faiss: there only where the cargo feature `faiss` is, for the library is C++ that takes longer to
//! build than everything else here.
//!
//! This line is the only place that asks for the feature; everything else asks [`BUILT_IN`].

#[cfg_attr(not(feature = "faiss"), path = "ivf/absent.rs")]
mod index;

pub(crate) use index::{BUILT_IN, build, read};

//! What can go wrong when something is measured, and the exit codes.

use documents::DocumentsError;
use engine::EngineError;
use eval::EvalError;
use settings::QuireError;

/// This program's result type.
pub(crate) type Result<T, E = BenchError> = std::result::Result<T, E>;

/// What can go wrong when something is measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// What is measured failed, or a setting is wrong.
    #[error(transparent)]
    Quire(#[from] QuireError),

    /// The measurement failed.
    #[error(transparent)]
    Eval(#[from] EvalError),
}

macro_rules! of_what_is_measured {
    ($($type:ty),*) => { $(impl From<$type> for BenchError {
        fn from(error: $type) -> BenchError {
            QuireError::from(error).into()
        }
    })* }
}
of_what_is_measured!(EngineError, chunk_cache::StoreError, DocumentsError);

impl BenchError {
    /// As [`QuireError::exit_code`]: 2 for wrong usage, 1 for everything else.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            BenchError::Quire(error) => error.exit_code(),
            BenchError::Eval(
                EvalError::BadOption { .. }
                | EvalError::UnknownName { .. }
                | EvalError::Engine(EngineError::Sampling { .. }),
            ) => 2,
            BenchError::Eval(_) => 1,
        }
    }
}

//! Everything that can go wrong in the engine, each with what was expected, what came and what to do.

use std::path::{Path, PathBuf};

/// The engine's result type.
pub type Result<T> = std::result::Result<T, EngineError>;

/// What can go wrong while loading a model or answering with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A file that a model must have is absent.
    #[error("{} is missing: {needed_for}. {advice}", path.display())]
    MissingFile {
        /// The absent file.
        path: PathBuf,
        /// What it would have been read for.
        needed_for: &'static str,
        /// What to do about it.
        advice: &'static str,
    },

    /// A file is there but could not be read.
    #[error("cannot read {}: {source}. Check that it is a readable regular file", path.display())]
    Io {
        /// The unreadable file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// A field of a JSON file that describes the model is absent, of the wrong type or out of range.
    #[error(
        "{}: field `{field}`: expected {expected}, found {found}. Correct the file, or fetch the model again",
        file.display()
    )]
    Config {
        /// The file that holds the field.
        file: PathBuf,
        /// The field's name; dots separate nested fields.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What the file says.
        found: String,
    },

    /// The model needs something that this engine does not do.
    #[error("unsupported {what}: found {found}, supported: {supported}. {advice}")]
    Unsupported {
        /// The kind of thing ("architecture", "RoPE scaling", ...).
        what: &'static str,
        /// What the model asks for.
        found: String,
        /// What there is instead.
        supported: String,
        /// Why it is refused or what to do.
        advice: &'static str,
    },

    /// The weights lack a tensor that the model's configuration calls for.
    #[error(
        "tensor `{name}` is missing from the weights in {}: expected one of shape {expected:?}, found none. \
         config.json and the weights do not belong together, or the download is incomplete: fetch the model again",
        dir.display()
    )]
    MissingTensor {
        /// The tensor's name.
        name: String,
        /// The shape the configuration calls for.
        expected: Vec<usize>,
        /// The model's folder.
        dir: PathBuf,
    },

    /// A tensor's shape contradicts the model's configuration.
    #[error(
        "tensor `{name}`: expected shape {expected:?} (from config.json), found {found:?}. \
         config.json and the weights do not belong together: fetch both from the same model"
    )]
    TensorShape {
        /// The tensor's name.
        name: String,
        /// The shape the configuration calls for.
        expected: Vec<usize>,
        /// The shape the file states.
        found: Vec<usize>,
    },

    /// A tensor is stored in a number format that is not read here.
    #[error("tensor `{name}`: expected F32, F16 or BF16, found {found}. Convert the weights to one of these formats")]
    TensorDtype {
        /// The tensor's name.
        name: String,
        /// The format the file states.
        found: String,
    },

    /// A weights file is truncated or its contents contradict each other.
    #[error("{} is damaged: {why}. Fetch the file again", path.display())]
    CorruptWeights {
        /// The damaged file.
        path: PathBuf,
        /// What was expected and what was found.
        why: String,
    },

    /// The tokenizer could not be loaded, or failed on a text.
    #[error("tokenizer {}: {why}. A tokenizer.json of the Hugging Face `tokenizers` format is expected", path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What went wrong.
        why: String,
    },

    /// The tokenizer makes ids that the model has no embedding for.
    #[error(
        "tokenizer and model do not belong together: expected ids below the model's vocabulary of {vocab}, \
         found token `{token}` with id {id} in {}. Fetch tokenizer.json and the weights from the same model",
        path.display()
    )]
    TokenizerMismatch {
        /// The tokenizer's file.
        path: PathBuf,
        /// The token with the largest id.
        token: String,
        /// That token's id.
        id: u32,
        /// The model's vocabulary size.
        vocab: usize,
    },

    /// The chat template is absent, wrong, exceeds its limits, or refused the messages.
    #[error("chat template: {0}")]
    ChatTemplate(String),

    /// A sampling parameter is outside its range.
    #[error("sampling parameter `{parameter}`: expected {expected}, found {found}")]
    Sampling {
        /// The parameter's name, as in a request.
        parameter: &'static str,
        /// The allowed range.
        expected: &'static str,
        /// What was given.
        found: String,
    },

    /// A setting of a request's attention or blending is outside its range.
    #[error("{of} {parameter}: {problem}")]
    RequestSetting {
        /// What it is a setting of: "attention" or "blending".
        of: &'static str,
        /// The setting's name, as in a request.
        parameter: &'static str,
        /// What was expected and what came.
        problem: String,
    },

    /// The model produced a logit that is not a number: broken weights or a broken kernel.
    #[error(
        "the model produced a logit that is {value} for token {token}: expected finite numbers. \
         The weights may be damaged: compare their checksum with the publisher's"
    )]
    BadLogits {
        /// The token whose logit it is.
        token: usize,
        /// The value found.
        value: f32,
    },

    /// The model computed keys or values that are no finite numbers: damaged weights, or an overflow.
    #[error(
        "layer {layer}: the model computed keys or values that are not finite; nothing was stored. \
         The weights may be damaged: compare their checksum with the publisher's"
    )]
    NotFinite {
        /// The first such layer.
        layer: usize,
    },

    /// A prompt and one token of its answer exceed the model's context.
    #[error(
        "a prompt of {tokens} tokens leaves no room in the context for an answer: the limit is {limit}. \
         Shorten the prompt, or retrieve fewer chunks"
    )]
    ContextLimit {
        /// The prompt's tokens.
        tokens: usize,
        /// Tokens of the context.
        limit: usize,
    },

    /// A text whose bytes exceed the model's context, whatever tokens they become.
    #[error(
        "a prompt of {bytes} bytes has at least {tokens} tokens: the limit is {limit}. \
         Shorten the prompt, or retrieve fewer chunks"
    )]
    TextTooLong {
        /// Bytes of the messages.
        bytes: usize,
        /// Tokens that they become at least.
        tokens: usize,
        /// Tokens of the context.
        limit: usize,
    },

    /// Something would exceed the memory it was given.
    #[error(
        "{what} needs {needed} bytes of memory, the budget leaves {budget}. \
         Raise the budget, or use a shorter context or a smaller model"
    )]
    OutOfMemory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        budget: u64,
    },

    /// KV that no memory but a larger one will ever hold.
    #[error(
        "the request's KV, indexes included, needs {needed} bytes of {memory} memory, more than the budget of {budget}: shorten the prompt \
         or the answer, or raise the budget"
    )]
    NeverFits {
        /// `host` or `device`.
        memory: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes of the whole budget.
        budget: u64,
    },

    /// A GPU was asked for, and it or a library that it needs is missing.
    #[error("no usable GPU: {why}. Run `quire doctor` for details, or set the device to `cpu`")]
    NoDevice {
        /// What was looked for and not found.
        why: String,
    },

    /// A call to the GPU failed.
    #[error("the GPU failed to {action}: {reason}. If it stays so, restart the process")]
    Device {
        /// What was tried.
        action: &'static str,
        /// The driver's reason.
        reason: String,
    },

    /// A kernel could not be compiled for this GPU.
    #[error(
        "kernel {kernel}: {why}. This is a defect of the program, or the CUDA libraries are too old: please report it"
    )]
    Kernel {
        /// Its source file.
        kernel: String,
        /// The compiler's words.
        why: String,
    },

    /// An index over keys refused its input.
    #[error("key index: {0}")]
    Index(#[from] ann_index::IndexError),

    /// The source of cached chunks failed.
    #[error("chunk source: {0}")]
    ChunkSource(#[source] Box<dyn std::error::Error + Send + Sync>),

    /// A request contradicts itself or names something that is not there.
    #[error("invalid request: {0}")]
    InvalidRequest(String),

    /// As many requests wait as may.
    #[error("the queue is full: {limit} requests are waiting. Try again later")]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
    },

    /// The one who asked went away.
    #[error("the request was cancelled")]
    Cancelled,

    /// The program panicked while it worked for this request; others go on.
    #[error(
        "internal error while {doing}: {message}. This is a defect of the program: please report it. Other requests go on"
    )]
    Panicked {
        /// What was being done.
        doing: &'static str,
        /// What the panic says.
        message: String,
    },

    /// The engine's thread has stopped and takes no more requests.
    #[error("the engine has stopped: {0}. Restart the process")]
    Stopped(String),

    /// Something that should not happen happened.
    #[error("internal error: {0}. This is a defect of the program: please report it")]
    Internal(String),
}

impl EngineError {
    /// An [`EngineError::Io`], or [`EngineError::MissingFile`] when the system says "not found".
    pub(crate) fn reading(path: &Path, source: std::io::Error, needed_for: &'static str) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            return EngineError::MissingFile {
                path: path.to_path_buf(),
                needed_for,
                advice: "Point the model path at a folder as Hugging Face publishes it",
            };
        }
        EngineError::Io { path: path.to_path_buf(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_told_from_an_unreadable_one() {
        let path = Path::new("/nowhere/config.json");
        let missing = EngineError::reading(path, std::io::ErrorKind::NotFound.into(), "it states the model's shape");
        assert!(missing.to_string().starts_with("/nowhere/config.json is missing: it states"), "{missing}");
        let denied = EngineError::reading(path, std::io::ErrorKind::PermissionDenied.into(), "x");
        assert!(denied.to_string().starts_with("cannot read /nowhere/config.json: permission denied"), "{denied}");
    }
}

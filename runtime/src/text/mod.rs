//! Text to token ids and back, as the model's own file defines it.
//!
//! Everything here comes from the GGUF metadata: vocabulary, merges, pre-tokenizer, special tokens and
//! chat template. Nothing is guessed: a file that names a pre-tokenizer we do not know is refused, since
//! a generic one gives wrong ids without any error.

pub mod declared;
pub mod detokenizer;
pub mod metadata;
pub mod quote;
pub mod stop;
pub mod template;
pub mod tokenizer;

/// What is wrong with the text part of a model file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A key that must be there is not, or has another type.
    #[error("the model file has no usable metadata `{key}` ({expected} expected)")]
    Metadata {
        /// GGUF key.
        key: &'static str,
        /// What it should have held.
        expected: &'static str,
    },
    /// Another family of tokenizers than byte-level BPE.
    #[error("the model file's tokenizer is `{0}`; this runtime reads `gpt2` (byte-level BPE)")]
    Model(String),
    /// A pre-tokenizer whose rules we do not have.
    #[error(
        "the model file's pre-tokenizer is `{name}`, which this runtime does not know (known: \
         {known}); a generic one would give wrong token ids, so the file is refused"
    )]
    PreTokenizer {
        /// `tokenizer.ggml.pre`.
        name: String,
        /// Names that would work.
        known: String,
    },
    /// Vocabulary or merges that contradict each other.
    #[error("the model file's vocabulary cannot be used: {0}")]
    Vocabulary(String),
    /// The chat template does not compile.
    #[error("the model file's chat template does not compile: {0}")]
    Template(String),
}

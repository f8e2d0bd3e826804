//! The metadata of a GGUF file that text needs, checked and in our own types.

use super::TextError;
use crate::weights::gguf::Metadata;

const KINDS: &str = "tokenizer.ggml.token_type";

/// `tokenizer.*` of a model file.
#[derive(Debug, Clone, Default)]
pub struct TextMetadata {
    /// Family: `gpt2` is byte-level BPE.
    pub model: String,
    /// Name of the rules that cut text into words before the merges.
    pub pre: String,
    /// Text of each token in the byte-level alphabet; the index is the id.
    pub tokens: Vec<String>,
    /// Kind of each token, as long as `tokens`.
    pub kinds: Vec<TokenKind>,
    /// Pairs to merge, the first first.
    pub merges: Vec<(String, String)>,
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// Further tokens that end a turn (`eot`, `eom`), where the file names them.
    pub end_of_turn: Vec<u32>,
    /// Whether prompts begin with `bos`; the pre-tokenizer's habit where the file is silent.
    pub add_bos: Option<bool>,
    /// Jinja source.
    pub chat_template: Option<String>,
}

/// What a token is, by GGUF's numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenKind {
    /// Text.
    #[default]
    Normal,
    /// Structure of the prompt: never made from a user's text.
    Control,
    /// Text that is always one token, found before all else.
    UserDefined,
    /// In the vocabulary, but never produced from text.
    Unused,
}

impl TokenKind {
    fn from_gguf(number: i64) -> Self {
        match number {
            2 | 3 => Self::Control, // "Unknown" tokens are structure as well: llama.cpp parses them so.
            4 => Self::UserDefined,
            5 => Self::Unused,
            _ => Self::Normal,
        }
    }
}

impl TextMetadata {
    /// Reads and checks what text needs from all metadata of a file.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, TextError> {
        let tokens: Vec<String> =
            strings(metadata, "tokenizer.ggml.tokens")?.into_iter().map(str::to_owned).collect();
        let merges = strings(metadata, "tokenizer.ggml.merges")?
            .into_iter()
            .map(|line| match line.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(TextError::Vocabulary(format!("merge `{line}` is not a pair"))),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let kinds = match metadata.i64s(KINDS) {
            Some(kinds) => kinds.into_iter().map(TokenKind::from_gguf).collect(),
            None if metadata.contains(KINDS) => {
                return Err(TextError::Metadata { key: KINDS, expected: "a list of numbers" });
            }
            None => vec![TokenKind::Normal; tokens.len()],
        };
        if kinds.len() != tokens.len() {
            return Err(TextError::Vocabulary(format!(
                "{} tokens but {} token types",
                tokens.len(),
                kinds.len()
            )));
        }
        let token_id = |key: &'static str| match metadata.i64(key) {
            None => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                _ => Err(TextError::Vocabulary(format!(
                    "`{key}` is {id}, the vocabulary has {} tokens",
                    tokens.len()
                ))),
            },
        };
        let bos = token_id("tokenizer.ggml.bos_token_id")?;
        let eos = token_id("tokenizer.ggml.eos_token_id")?;
        let mut end_of_turn = Vec::new();
        end_of_turn.extend(token_id("tokenizer.ggml.eot_token_id")?);
        end_of_turn.extend(token_id("tokenizer.ggml.eom_token_id")?);
        Ok(Self {
            model: string(metadata, "tokenizer.ggml.model")?,
            pre: string(metadata, "tokenizer.ggml.pre")?,
            bos,
            eos,
            end_of_turn,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token"),
            chat_template: metadata.str("tokenizer.chat_template").map(str::to_owned),
            tokens,
            kinds,
            merges,
        })
    }
}

fn string(metadata: &Metadata, key: &'static str) -> Result<String, TextError> {
    metadata.str(key).map(str::to_owned).ok_or(TextError::Metadata { key, expected: "a string" })
}

fn strings<'m>(metadata: &'m Metadata, key: &'static str) -> Result<Vec<&'m str>, TextError> {
    metadata.strings(key).ok_or(TextError::Metadata { key, expected: "a list of strings" })
}

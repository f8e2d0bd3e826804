//! Byte-level BPE, built from a model file's metadata.
//!
//! Text becomes ids in three steps: special tokens are cut out where the caller allows it, the rest is
//! cut into words by the pre-tokenizer that the file *names*, and the words are merged. The `tokenizers`
//! crate does the second and third; its own handling of special tokens is not used, because whether a
//! piece of text may become one depends on who wrote it ([`Specials`], [`super::quote`]).
//!
//! A byte that the vocabulary cannot express (SmolLM2 lacks six control characters) is left out, as in
//! llama.cpp.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer as Bpe};

use super::TextError;
use super::metadata::{TextMetadata, TokenKind};

/// Texts of tokens that end a turn in the families we serve. Files name only one of them as their
/// end-of-text, yet a model may emit any (llama.cpp keeps the same kind of list).
const END_OF_TURN_TEXTS: [&str; 8] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
];

/// Llama 3's words: contractions in any case, up to three digits, line ends kept together.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's words: as Llama 3's, but each digit on its own.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Rules that cut text into words; each is the exact rule of the models that name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    /// GPT-2's regular expression.
    Gpt2,
    /// Each digit on its own, then GPT-2's.
    Smollm,
    /// Llama 3's; words that are in the vocabulary whole are not built by merges.
    Llama3,
    /// Qwen 2's, after Unicode composition (NFC), as in the models' own tokenizer.
    Qwen2,
}

impl PreTokenizer {
    /// Names as files give them in `tokenizer.ggml.pre`.
    const NAMES: [(&'static str, PreTokenizer); 6] = [
        ("gpt-2", Self::Gpt2),
        ("smollm", Self::Smollm),
        ("llama-bpe", Self::Llama3),
        ("llama3", Self::Llama3),
        ("llama-v3", Self::Llama3),
        ("qwen2", Self::Qwen2),
    ];

    fn by_name(name: &str) -> Result<Self, TextError> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, pre)| *pre).ok_or_else(|| {
            TextError::PreTokenizer {
                name: name.to_owned(),
                known: Self::NAMES.map(|(known, _)| known).join(", "),
            }
        })
    }

    fn wrapper(self) -> Result<PreTokenizerWrapper, TextError> {
        let words = |pattern: &str| {
            Split::new(
                SplitPattern::Regex(pattern.to_owned()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map(PreTokenizerWrapper::Split)
            .map_err(|error| TextError::Vocabulary(format!("word pattern: {error}")))
        };
        let bytes =
            |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, use_regex));
        Ok(match self {
            Self::Gpt2 => bytes(true),
            Self::Smollm => PreTokenizerWrapper::Sequence(Sequence::new(vec![
                PreTokenizerWrapper::Digits(Digits::new(true)),
                bytes(true),
            ])),
            Self::Llama3 => PreTokenizerWrapper::Sequence(Sequence::new(vec![
                words(LLAMA3_WORDS)?,
                bytes(false),
            ])),
            Self::Qwen2 => PreTokenizerWrapper::Sequence(Sequence::new(vec![
                words(QWEN2_WORDS)?,
                bytes(false),
            ])),
        })
    }
}

/// Whether text may become control tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Yes: the text is ours (a rendered template) or the caller says so (`/tokenize`).
    Parse,
    /// No: `<|im_end|>` is eleven ordinary characters.
    Text,
}

/// A model's tokenizer. Invariant: every id that [`Tokenizer::encode`] returns is below
/// [`Tokenizer::vocabulary_size`].
pub struct Tokenizer {
    bpe: Bpe,
    /// Bytes of each token; a control token's are its text.
    bytes: Vec<Box<[u8]>>,
    kinds: Vec<TokenKind>,
    /// Control and user-defined tokens, found in text from the left, the longest first.
    control: SpecialTokens,
    user_defined: SpecialTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    end_of_turn: Vec<u32>,
    token_bytes_max: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary_size", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

/// A set of token texts to find in text.
struct SpecialTokens {
    finder: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl SpecialTokens {
    fn new(tokens: &[(u32, &str)]) -> Result<Self, TextError> {
        let tokens: Vec<_> = tokens.iter().filter(|(_, text)| !text.is_empty()).collect();
        let finder = if tokens.is_empty() {
            None // An empty automaton would match nothing; skipping it says so.
        } else {
            let finder = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|(_, text)| text))
                .map_err(|error| TextError::Vocabulary(format!("special tokens: {error}")))?;
            Some(finder)
        };
        Ok(Self { finder, ids: tokens.iter().map(|(id, _)| *id).collect() })
    }

    /// Calls `each` for the special tokens and for what lies between them, in order.
    fn cut<'t>(&self, text: &'t str, mut each: impl FnMut(Piece<'t>)) {
        let mut rest = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            if found.start() > rest {
                each(Piece::Text(&text[rest..found.start()]));
            }
            each(Piece::Token(self.ids[found.pattern().as_usize()]));
            rest = found.end();
        }
        if rest < text.len() {
            each(Piece::Text(&text[rest..]));
        }
    }
}

/// Part of a text that was cut at special tokens.
pub(super) enum Piece<'t> {
    Token(u32),
    Text(&'t str),
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    pub fn new(metadata: &TextMetadata) -> Result<Self, TextError> {
        if metadata.model != "gpt2" {
            return Err(TextError::Model(metadata.model.clone()));
        }
        let pre = PreTokenizer::by_name(&metadata.pre)?;
        let vocabulary: Vocab = metadata
            .tokens
            .iter()
            .enumerate()
            .map(|(id, text)| (text.clone(), id as u32))
            .collect();
        let model = BPE::builder()
            .vocab_and_merges(vocabulary, metadata.merges.clone())
            .ignore_merges(pre == PreTokenizer::Llama3)
            .build()
            .map_err(|error| TextError::Vocabulary(error.to_string()))?;
        let mut bpe = Bpe::new(model);
        bpe.with_pre_tokenizer(Some(pre.wrapper()?));
        if pre == PreTokenizer::Qwen2 {
            bpe.with_normalizer(Some(NFC))
                .map_err(|error| TextError::Vocabulary(error.to_string()))?;
        }
        let alphabet = ByteAlphabet::new();
        let bytes: Vec<Box<[u8]>> = metadata
            .tokens
            .iter()
            .zip(&metadata.kinds)
            .map(|(text, kind)| match kind {
                TokenKind::Normal | TokenKind::Unused => alphabet.bytes(text),
                TokenKind::Control | TokenKind::UserDefined => text.as_bytes().into(),
            })
            .collect();
        let of_kind = |wanted: TokenKind| -> Vec<(u32, &str)> {
            let tokens = metadata.tokens.iter().zip(&metadata.kinds).enumerate();
            tokens
                .filter(|(_, (_, kind))| **kind == wanted)
                .map(|(id, (text, _))| (id as u32, text.as_str()))
                .collect()
        };
        let control = of_kind(TokenKind::Control);
        let mut end_of_turn = metadata.end_of_turn.clone();
        end_of_turn.extend(metadata.eos);
        end_of_turn.extend(
            control.iter().filter(|(_, text)| END_OF_TURN_TEXTS.contains(text)).map(|(id, _)| id),
        );
        end_of_turn.sort_unstable();
        end_of_turn.dedup();
        Ok(Self {
            control: SpecialTokens::new(&control)?,
            user_defined: SpecialTokens::new(&of_kind(TokenKind::UserDefined))?,
            token_bytes_max: bytes.iter().map(|token| token.len()).max().unwrap_or(1).max(1),
            add_bos: metadata.add_bos.unwrap_or(pre == PreTokenizer::Llama3),
            bos: metadata.bos,
            eos: metadata.eos,
            kinds: metadata.kinds.clone(),
            bpe,
            bytes,
            end_of_turn,
        })
    }

    /// Ids of `text`, without a beginning-of-text token.
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        match specials {
            Specials::Text => self.encode_text(text, &mut ids),
            Specials::Parse => self.cut_at_control_tokens(text, |piece| match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => self.encode_text(text, &mut ids),
            }),
        }
        ids
    }

    /// See [`SpecialTokens::cut`].
    pub(super) fn cut_at_control_tokens<'t>(&self, text: &'t str, each: impl FnMut(Piece<'t>)) {
        self.control.cut(text, each);
    }

    /// Appends the ids of text that holds no control tokens. User-defined tokens are text, so they are
    /// found whoever wrote it (as in llama.cpp).
    pub(super) fn encode_text(&self, text: &str, ids: &mut Vec<u32>) {
        self.user_defined.cut(text, |piece| match piece {
            Piece::Token(id) => ids.push(id),
            Piece::Text(text) => {
                // Without a normalizer that rejects and with constant patterns there is nothing that can
                // fail but our own set-up, so an error here is a bug, not an input.
                let words =
                    self.bpe.encode_fast(text, false).expect("byte-level BPE takes any text");
                ids.extend_from_slice(words.get_ids());
            }
        });
    }

    /// Puts the beginning-of-text token before `ids` where the model wants one and none is there yet
    /// (templates often write it themselves).
    pub fn with_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.bos
            && self.add_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// Where control tokens' texts begin in `text`, in bytes.
    pub fn control_texts(&self, text: &str) -> impl Iterator<Item = usize> {
        self.control
            .finder
            .iter()
            .flat_map(move |finder| finder.find_iter(text))
            .map(|found| found.start())
    }

    /// Bytes of a token; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// Whether a token is structure, which replies do not show.
    pub fn is_control(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&TokenKind::Control)
    }

    /// Text of `ids`, control tokens included; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Number of ids.
    pub fn vocabulary_size(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of the longest token: a text of more than `n` times as many bytes has more than `n` tokens.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// Tokens that end a reply, ascending.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }

    /// Text of the beginning-of-text token, for templates.
    pub fn bos_text(&self) -> String {
        self.bos.map_or_else(String::new, |id| self.decode(&[id]))
    }

    /// Text of the end-of-text token, for templates.
    pub fn eos_text(&self) -> String {
        self.eos.map_or_else(String::new, |id| self.decode(&[id]))
    }
}

/// GPT-2's alphabet: each byte as a printable character.
struct ByteAlphabet {
    of_char: std::collections::HashMap<char, u8>,
}

impl ByteAlphabet {
    fn new() -> Self {
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut of_char = std::collections::HashMap::with_capacity(256);
        let mut moved = 0;
        for byte in 0..=u8::MAX {
            if printable(byte) {
                of_char.insert(char::from(byte), byte);
            } else {
                // The others follow 255 in order; at most 68 of them, all valid characters.
                of_char
                    .insert(char::from_u32(0x100 + moved).expect("a character below 0x200"), byte);
                moved += 1;
            }
        }
        Self { of_char }
    }

    /// Bytes that `text` stands for; a character outside the alphabet stands for its own UTF-8.
    fn bytes(&self, text: &str) -> Box<[u8]> {
        let mut bytes = Vec::with_capacity(text.len());
        for character in text.chars() {
            match self.of_char.get(&character) {
                Some(byte) => bytes.push(*byte),
                None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        bytes.into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The 256 bytes, a few merges, three control tokens and a user-defined one.
    pub(crate) fn tiny_metadata() -> TextMetadata {
        let alphabet = ByteAlphabet::new();
        let mut letters: Vec<(u8, char)> = alphabet.of_char.iter().map(|(c, b)| (*b, *c)).collect();
        letters.sort_unstable();
        let mut tokens: Vec<String> = letters.iter().map(|(_, c)| c.to_string()).collect();
        let mut kinds = vec![TokenKind::Normal; tokens.len()];
        let merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2")];
        for (left, right) in merges {
            tokens.push(format!("{left}{right}"));
            kinds.push(TokenKind::Normal);
        }
        for (text, kind) in [
            ("<|endoftext|>", TokenKind::Control),
            ("<|im_start|>", TokenKind::Control),
            ("<|im_end|>", TokenKind::Control),
            ("<tool>", TokenKind::UserDefined),
        ] {
            tokens.push(text.to_owned());
            kinds.push(kind);
        }
        let id = |text: &str| tokens.iter().position(|t| t == text).map(|i| i as u32);
        TextMetadata {
            model: "gpt2".to_owned(),
            pre: "smollm".to_owned(),
            bos: id("<|im_start|>"),
            eos: id("<|im_end|>"),
            end_of_turn: Vec::new(),
            add_bos: Some(false),
            chat_template: None,
            merges: merges.map(|(l, r)| (l.to_owned(), r.to_owned())).to_vec(),
            tokens,
            kinds,
        }
    }

    pub(crate) fn tiny() -> Tokenizer {
        Tokenizer::new(&tiny_metadata()).unwrap()
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_by_name() {
        let metadata = TextMetadata { pre: "poro-chat".to_owned(), ..tiny_metadata() };
        let error = Tokenizer::new(&metadata).unwrap_err().to_string();
        assert!(error.contains("`poro-chat`"), "{error}");
        assert!(error.contains("smollm"), "{error}");
    }

    #[test]
    fn another_family_of_tokenizers_is_refused() {
        let metadata = TextMetadata { model: "llama".to_owned(), ..tiny_metadata() };
        assert!(
            matches!(Tokenizer::new(&metadata), Err(TextError::Model(name)) if name == "llama")
        );
    }

    #[test]
    fn merges_apply_within_words_and_bytes_survive() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.decode(&tokenizer.encode("hello", Specials::Text)), "hello");
        assert_eq!(tokenizer.encode("hello", Specials::Text).len(), 1);
        for text in ["", " ", "hello world", "naïve 日本 👩‍👩‍👧", "a\u{0}\u{1f}b", "\r\n\t  x"]
        {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text, Specials::Text)), text);
        }
    }

    #[test]
    fn digits_split_or_not_as_the_named_rules_say() {
        let count = |pre: &str| {
            let metadata = TextMetadata { pre: pre.to_owned(), ..tiny_metadata() };
            Tokenizer::new(&metadata).unwrap().encode("12", Specials::Text).len()
        };
        assert_eq!([count("smollm"), count("qwen2")], [2, 2]);
        assert_eq!([count("gpt-2"), count("llama-bpe")], [1, 1]);
    }

    #[test]
    fn control_tokens_are_parsed_only_where_allowed() {
        let tokenizer = tiny();
        let text = "hello<|im_end|>";
        assert_eq!(tokenizer.encode(text, Specials::Parse).len(), 2);
        let as_text = tokenizer.encode(text, Specials::Text);
        assert!(as_text.len() > 2);
        assert!(as_text.iter().all(|id| !tokenizer.is_control(*id)));
        assert_eq!(tokenizer.decode(&as_text), text);
    }

    #[test]
    fn user_defined_tokens_are_found_in_any_text() {
        assert_eq!(tiny().encode("<tool>", Specials::Text).len(), 1);
    }

    #[test]
    fn bos_is_added_once() {
        let metadata = TextMetadata { add_bos: Some(true), ..tiny_metadata() };
        let tokenizer = Tokenizer::new(&metadata).unwrap();
        let once = tokenizer.with_bos(tokenizer.encode("hello", Specials::Text));
        assert_eq!(once[0], metadata.bos.unwrap());
        assert_eq!(tokenizer.with_bos(once.clone()), once);
    }

    #[test]
    fn every_way_to_end_a_turn_stops_a_reply() {
        let tokenizer = tiny();
        let texts: Vec<_> =
            tokenizer.end_of_turn().iter().map(|id| tokenizer.decode(&[*id])).collect();
        assert_eq!(texts, ["<|endoftext|>", "<|im_end|>"]);
    }
}

//! Token ids back to text, as they arrive: bytes of a character that is not complete yet are held back.

use super::tokenizer::Tokenizer;

/// Bytes that may wait for the rest of their character: UTF-8 has at most 4, so at most 3 are open.
const OPEN_BYTES_MAX: usize = 3;

/// State of one reply's text. The concatenation of everything it returns is the reply's text.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character; at most [`OPEN_BYTES_MAX`] bytes.
    open: Vec<u8>,
}

impl Detokenizer {
    /// Text that is certain after one more token. Control tokens have none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if !tokenizer.is_control(id) {
            self.open.extend_from_slice(tokenizer.token_bytes(id));
        }
        let mut text = String::new();
        let mut rest = self.open.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    let Some(bad) = error.error_len() else {
                        rest = after; // May still become a character.
                        break;
                    };
                    // Never a character: say so and go on behind it.
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[bad..];
                }
            }
        }
        self.open = rest.to_vec();
        debug_assert!(self.open.len() <= OPEN_BYTES_MAX);
        text
    }

    /// Whether no character is incomplete.
    pub fn is_whole(&self) -> bool {
        self.open.is_empty()
    }

    /// What is left at the end: a replacement character for a character that never became whole.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.open).into_owned();
        self.open.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::{Specials, tests::tiny};

    fn replay(ids: &[u32]) -> (Vec<String>, String) {
        let (tokenizer, mut detokenizer) = (tiny(), Detokenizer::default());
        let parts = ids.iter().map(|id| detokenizer.push(&tokenizer, *id)).collect();
        (parts, detokenizer.finish())
    }

    #[test]
    fn a_character_appears_when_its_last_byte_has_come() {
        let ids = tiny().encode("é日👍", Specials::Text);
        let (parts, rest) = replay(&ids);
        assert_eq!(parts, ["", "é", "", "", "日", "", "", "", "👍"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn bytes_that_are_no_character_become_replacements_and_hold_nothing_back() {
        // 0xE6 opens a character of three bytes, `h` closes it wrongly.
        let (parts, rest) = replay(&[0xE6, u32::from(b'h'), 0xFF, 0xF0, 0x9F]);
        assert_eq!(parts, ["", "\u{FFFD}h", "\u{FFFD}", "", ""]);
        assert_eq!(rest, "\u{FFFD}");
    }

    #[test]
    fn control_tokens_have_no_text() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("<|im_start|>hello<|im_end|>", Specials::Parse);
        assert_eq!(replay(&ids).0, ["", "hello", ""]);
    }

    #[test]
    fn the_parts_of_any_text_make_the_text() {
        for text in ["naïve café", "日本語 and עברית", "👩‍👩‍👧‍👦 é", "\u{FFFD}"]
        {
            let (parts, rest) = replay(&tiny().encode(text, Specials::Text));
            assert_eq!(parts.concat() + &rest, text);
        }
    }
}

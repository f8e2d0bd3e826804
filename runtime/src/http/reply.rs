//! A reply as it grows: token ids become text, stop strings end it. One state for streams and whole
//! answers, so that both are the same text.

use crate::batch::TokenLogprob;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::{Progress, StopMatcher};
use crate::text::tokenizer::Tokenizer;

/// One generation's text so far.
#[derive(Debug)]
pub struct Reply {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// All that was released.
    text: String,
    /// Bytes of text that the detokenizer gave, released or not.
    text_bytes: usize,
    tokens: Vec<u32>,
    /// Bytes of text after each token; `None` while a character was incomplete.
    ends: Vec<Option<usize>>,
    /// Reports whose text is not released yet, with the place where it begins.
    reports: Vec<(usize, TokenReport)>,
    stopped: bool,
}

/// A token with its probability and its rivals'.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenReport {
    /// The token that was drawn.
    pub chosen: TokenLogprob,
    /// The likeliest ones.
    pub alternatives: Vec<TokenLogprob>,
}

/// What one more event released.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    /// Text to show; may be empty.
    pub text: String,
    /// Reports of the tokens that this text completes.
    pub reports: Vec<TokenReport>,
}

impl Delta {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.reports.is_empty()
    }
}

impl Reply {
    /// An empty reply that ends at any of `stops`.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(stops),
            text: String::new(),
            text_bytes: 0,
            tokens: Vec::new(),
            ends: Vec::new(),
            reports: Vec::new(),
            stopped: false,
        }
    }

    /// Takes the next token. After it, [`Reply::is_stopped`] says whether a stop string came.
    pub fn push(&mut self, tokenizer: &Tokenizer, report: TokenReport) -> Delta {
        debug_assert!(!self.stopped);
        let part = self.detokenizer.push(tokenizer, report.chosen.token);
        self.tokens.push(report.chosen.token);
        self.reports.push((self.text_bytes, report));
        self.text_bytes += part.len();
        self.ends.push(self.detokenizer.is_whole().then_some(self.text_bytes));
        let progress = self.stops.push(&part);
        self.release(progress)
    }

    /// The end: what was held back, incomplete characters included.
    pub fn finish(&mut self) -> Delta {
        if self.stopped {
            return Delta::default();
        }
        let part = self.detokenizer.finish();
        self.text_bytes += part.len();
        if let Some(end) = self.ends.last_mut() {
            *end = Some(self.text_bytes);
        }
        let delta = match self.stops.push(&part) {
            Progress::Text(text) => Progress::Text(text + &self.stops.finish()),
            stopped @ Progress::Stopped(_) => stopped,
        };
        self.release(delta)
    }

    fn release(&mut self, progress: Progress) -> Delta {
        let text = match progress {
            Progress::Text(text) => text,
            Progress::Stopped(text) => {
                self.stopped = true;
                text
            }
        };
        self.text.push_str(&text);
        // A token is reported with the text that holds its beginning; tokens of a stop string never are.
        let shown = self.text.len();
        let whole = self.text_bytes == shown && !self.stopped;
        let count = self.reports.partition_point(|(start, _)| *start < shown || whole);
        let reports = self.reports.drain(..count).map(|(_, report)| report).collect();
        Delta { text, reports }
    }

    /// Whether a stop string ended the reply: what the engine still sends is not part of it.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// The text released so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tokens generated, those of a stop string included.
    pub fn token_count(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens whose text the client has seen, all and nothing but, and the bytes of that text: less than
    /// the whole where a stop string cut a token in two.
    pub fn seen_tokens(&self) -> (&[u32], usize) {
        let mut seen = (0, 0);
        for (index, end) in self.ends.iter().enumerate() {
            match end {
                Some(end) if *end <= self.text.len() => seen = (index + 1, *end),
                _ => {}
            }
        }
        (&self.tokens[..seen.0], seen.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::{Specials, tests::tiny};

    fn report(token: u32) -> TokenReport {
        TokenReport { chosen: TokenLogprob { token, logprob: -1.0 }, alternatives: Vec::new() }
    }

    /// Released parts, number of reports, and the reply.
    fn run(text: &str, stops: &[&str]) -> (Vec<String>, usize, Reply) {
        let tokenizer = tiny();
        let mut reply = Reply::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let (mut parts, mut reports) = (Vec::new(), 0);
        for token in tokenizer.encode(text, Specials::Text) {
            let delta = reply.push(&tokenizer, report(token));
            parts.push(delta.text);
            reports += delta.reports.len();
            if reply.is_stopped() {
                break;
            }
        }
        let delta = reply.finish();
        parts.push(delta.text);
        (parts, reports + delta.reports.len(), reply)
    }

    #[test]
    fn without_stops_every_token_is_seen_and_reported() {
        let (parts, reports, reply) = run("hello wé", &[]);
        assert_eq!(parts.concat(), "hello wé");
        assert_eq!(reports, reply.token_count());
        assert_eq!(reply.seen_tokens().0.len(), reply.token_count());
    }

    #[test]
    fn a_stop_string_cuts_text_reports_and_seen_tokens() {
        // `hello` is one token: the stop string cuts it in two.
        let (parts, reports, reply) = run("x hello", &["lo"]);
        assert_eq!(parts.concat(), "x hel");
        assert!(reply.is_stopped());
        assert_eq!(reply.seen_tokens().1, 2, "`x ` only");
        assert_eq!(reports, reply.token_count(), "its beginning was shown");
    }

    #[test]
    fn tokens_of_the_stop_string_itself_are_not_reported() {
        let (parts, reports, reply) = run("ab", &["b"]);
        assert_eq!(parts.concat(), "a");
        assert_eq!((reports, reply.token_count()), (1, 2));
    }

    #[test]
    fn an_incomplete_character_at_the_end_becomes_a_replacement() {
        let tokenizer = tiny();
        let mut reply = Reply::new(Vec::new());
        let mut text = reply.push(&tokenizer, report(0xE6)).text;
        text += &reply.finish().text;
        assert_eq!(text, "\u{FFFD}");
        assert_eq!(reply.seen_tokens().0, [0xE6]);
    }
}

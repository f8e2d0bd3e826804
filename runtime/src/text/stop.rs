//! Stop strings: found across token borders, never shown, and held back while they may still come.

/// Finds the first of several strings in a text that arrives in parts.
#[derive(Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far that may be the beginning of a stop string.
    held: String,
}

/// What one more part of the text brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Text that can be shown; possibly empty.
    Text(String),
    /// A stop string came: this text precedes it, and nothing follows.
    Stopped(String),
}

impl StopMatcher {
    /// Empty strings are ignored: they would match before the first token.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next part of the text.
    pub fn push(&mut self, part: &str) -> Progress {
        if self.stops.is_empty() {
            return Progress::Text(part.to_owned());
        }
        self.held.push_str(part);
        // The leftmost match wins; of two at one place the text before is the same.
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return Progress::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Progress::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The end of the text: what was held back belongs to it after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper beginning of `stop` with which `text` ends.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|n| stop.is_char_boundary(*n) && text.as_bytes().ends_with(&stop.as_bytes()[..*n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shown text, and whether it was stopped.
    fn run(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()));
        let mut shown = String::new();
        for part in parts {
            match matcher.push(part) {
                Progress::Text(text) => shown.push_str(&text),
                Progress::Stopped(text) => return (shown + &text, true),
            }
        }
        (shown + &matcher.finish(), false)
    }

    #[test]
    fn a_stop_string_is_found_across_parts_and_not_shown() {
        assert_eq!(run(&["STOP"], &["ab S", "T", "OP cd"]), ("ab ".to_owned(), true));
    }

    #[test]
    fn the_leftmost_of_several_wins() {
        assert_eq!(run(&["late", "b"], &["abc late"]), ("a".to_owned(), true));
    }

    #[test]
    fn what_only_began_like_a_stop_string_is_shown_in_the_end() {
        assert_eq!(run(&["STOP"], &["a ST", "x ST"]), ("a STx ST".to_owned(), false));
    }

    #[test]
    fn a_possible_beginning_is_held_back() {
        let mut matcher = StopMatcher::new(["\n\n".to_owned()]);
        assert_eq!(matcher.push("a\n"), Progress::Text("a".to_owned()));
        assert_eq!(matcher.push("b"), Progress::Text("\nb".to_owned()));
    }

    #[test]
    fn repeated_beginnings_and_wide_characters_do_not_confuse_it() {
        assert_eq!(run(&["aab"], &["aa", "ab"]), ("a".to_owned(), true));
        assert_eq!(run(&["é。"], &["x", "é", "。"]), ("x".to_owned(), true));
        assert_eq!(run(&["日本"], &["日", "曜"]), ("日曜".to_owned(), false));
    }

    #[test]
    fn an_empty_stop_string_stops_nothing() {
        assert_eq!(run(&[""], &["abc"]), ("abc".to_owned(), false));
    }
}

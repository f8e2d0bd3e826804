//! `Span`: a length of time as people write it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What the API server accepts. Six digits of days are 2,700 years: enough, and far from overflow.
const PATTERN: &str = "^(0|[1-9][0-9]{0,5}(s|m|h|d))$";

/// Longest text that `PATTERN` matches.
const LENGTH_MAX: usize = 7;

/// Largest first: the order in which the canonical form is looked for.
const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];

/// A length of time in whole seconds: `90s`, `15m`, `24h`, `7d`; `0` means "without end".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(u64);

impl Span {
    /// `count` hours.
    pub const fn hours(count: u64) -> Self {
        Self(count * 3_600)
    }

    /// Whole seconds; 0 means "without end".
    pub const fn seconds(self) -> u64 {
        self.0
    }
}

impl From<Span> for Duration {
    fn from(span: Span) -> Self {
        Self::from_secs(span.0)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, seconds)| self.0 > 0 && self.0.is_multiple_of(*seconds)) {
            Some((unit, seconds)) => write!(f, "{}{unit}", self.0 / seconds),
            None => write!(f, "0"),
        }
    }
}

/// Why a text is not a length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a length of time; write 0 or a whole number with s, m, h or d, such as 24h")]
pub struct ParseSpanError(String);

impl FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseSpanError(text.to_owned());
        if text == "0" {
            return Ok(Self(0));
        }
        let (digits, seconds) = UNITS
            .iter()
            .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)))
            .ok_or_else(refused)?;
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        let count: u64 = digits.parse().map_err(|_| refused())?;
        count.checked_mul(seconds).map(Self).ok_or_else(refused)
    }
}

impl TryFrom<String> for Span {
    type Error = ParseSpanError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl JsonSchema for Span {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Span".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": PATTERN, "maxLength": LENGTH_MAX})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_read_in_seconds_and_written_in_its_largest_unit() {
        for (text, seconds, canonical) in [
            ("0", 0, "0"),
            ("90s", 90, "90s"),
            ("60m", 3600, "1h"),
            ("24h", 86400, "1d"),
            ("7d", 604_800, "7d"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.seconds(), span.to_string().as_str()), (seconds, canonical));
        }
    }

    #[test]
    fn a_number_without_a_unit_is_refused() {
        for text in ["", "10", "h", "1.5h", "-1h", "1w", "1h30m"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}

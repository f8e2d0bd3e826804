//! `ByteSize`: a number of bytes as Kubernetes writes it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What the API server accepts: whole numbers only. At most six digits before a suffix and fifteen
/// without one, so that every accepted size fits in a `u64` (999999Ti < 2^60) and one object with
/// an absurd number can never make the whole watch undecodable.
const PATTERN: &str = "^([1-9][0-9]{0,5}(Ki|Mi|Gi|Ti|k|M|G|T)|[1-9][0-9]{0,14})$";

/// Longest text that `PATTERN` matches; told to the API server so that CEL knows its cost.
const LENGTH_MAX: usize = 15;

/// Binary first and largest first: the order in which the canonical form is looked for.
const SUFFIXES: [(&str, u64); 8] = [
    ("Ti", 1 << 40),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
    ("T", 1_000_000_000_000),
    ("G", 1_000_000_000),
    ("M", 1_000_000),
    ("k", 1_000),
];

/// A number of bytes: `512Mi`, `2Gi`, `1000000`. Equal sizes are equal however they were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(u64);

impl ByteSize {
    /// `count` times 2^20 bytes.
    pub const fn mebibytes(count: u64) -> Self {
        Self(count << 20)
    }

    /// `count` times 2^30 bytes.
    pub const fn gibibytes(count: u64) -> Self {
        Self(count << 30)
    }

    /// `count` bytes.
    pub const fn bytes(count: u64) -> Self {
        Self(count)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The same size for a container's resources or a volume claim.
    pub fn quantity(self) -> Quantity {
        Quantity(self.to_string())
    }
}

impl std::ops::Add for ByteSize {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SUFFIXES[..4].iter().find(|(_, factor)| self.0.is_multiple_of(*factor));
        match binary {
            Some((suffix, factor)) if self.0 > 0 => write!(f, "{}{suffix}", self.0 / factor),
            _ => write!(f, "{}", self.0),
        }
    }
}

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size; write a whole number with a suffix, such as 512Mi or 2Gi")]
pub struct ParseSizeError(String);

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseSizeError(text.to_owned());
        let (digits, factor) = SUFFIXES
            .iter()
            .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
            .unwrap_or((text, 1));
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        let count: u64 = digits.parse().map_err(|_| refused())?;
        count.checked_mul(factor).map(Self).ok_or_else(refused)
    }
}

impl TryFrom<String> for ByteSize {
    type Error = ParseSizeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl JsonSchema for ByteSize {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": PATTERN, "maxLength": LENGTH_MAX})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("512Mi", 512 << 20),
            ("2Gi", 2 << 30),
            ("1k", 1000),
            ("7", 7),
            ("999999Ti", 999_999 << 40),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().get(), bytes, "{text}");
        }
    }

    #[test]
    fn a_size_is_written_in_its_canonical_form() {
        for (text, canonical) in [
            ("1024Mi", "1Gi"),
            ("1536Mi", "1536Mi"),
            ("1000", "1000"),
            ("1M", "1000000"),
            ("2048", "2Ki"),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn what_is_not_a_whole_number_of_bytes_is_refused_with_the_text_in_the_message() {
        for text in ["", "Mi", "1.5Gi", "-1Gi", "1 Gi", "1GiB", "+1", "99999999999999999999"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}

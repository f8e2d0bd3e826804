//! How a block was computed: labels that stand beside its key.

use std::fmt;

/// Bytes of an encoded [`Variant`].
pub const VARIANT_BYTES: usize = 32;
/// Bytes of an encoded [`NumericsTag`].
pub const NUMERICS_BYTES: usize = 16;

/// Which sublayers were skipped when the block, and all before it, were computed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// None.
    Exact,
    /// One fixed set: digest of its sublayers and scales.
    Skip([u8; VARIANT_BYTES - 8]),
    /// Decode extras, or anything before the block was of another variant.
    Mixed,
}

/// A variant whose code is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("variant has the unknown code {code}")]
pub struct UnknownVariant {
    /// Read.
    pub code: u8,
}

impl Variant {
    /// Names a skip set by whatever bytes describe it (sublayers and scales, in a fixed order).
    pub fn skip(description: &[u8]) -> Self {
        let hash = blake3::derive_key("colloquy 2026-09 skip set", description);
        let mut digest = [0; VARIANT_BYTES - 8];
        digest.copy_from_slice(&hash[..VARIANT_BYTES - 8]);
        Variant::Skip(digest)
    }

    /// Code in the first byte, digest from byte 8 on.
    pub fn encode(&self) -> [u8; VARIANT_BYTES] {
        let mut bytes = [0; VARIANT_BYTES];
        match self {
            Variant::Exact => bytes[0] = 1,
            Variant::Skip(digest) => {
                bytes[0] = 2;
                bytes[8..].copy_from_slice(digest);
            }
            Variant::Mixed => bytes[0] = 3,
        }
        bytes
    }

    /// Reads what [`Variant::encode`] wrote.
    pub fn decode(bytes: &[u8; VARIANT_BYTES]) -> Result<Self, UnknownVariant> {
        match bytes[0] {
            1 => Ok(Variant::Exact),
            2 => {
                let mut digest = [0; VARIANT_BYTES - 8];
                digest.copy_from_slice(&bytes[8..]);
                Ok(Variant::Skip(digest))
            }
            3 => Ok(Variant::Mixed),
            code => Err(UnknownVariant { code }),
        }
    }
}

impl fmt::Debug for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Variant::Exact => f.write_str("exact"),
            Variant::Skip(digest) => write!(f, "skip-{:02x}{:02x}", digest[0], digest[1]),
            Variant::Mixed => f.write_str("mixed"),
        }
    }
}

/// What decides the last bits of a result besides the model: backend, kernel generation, instruction class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NumericsTag(pub [u8; NUMERICS_BYTES]);

impl NumericsTag {
    /// Tag of a description such as `"cpu 1 avx512-vnni"`.
    pub fn of(description: &str) -> Self {
        let hash = blake3::derive_key("colloquy 2026-09 numerics", description.as_bytes());
        let mut tag = [0; NUMERICS_BYTES];
        tag.copy_from_slice(&hash[..NUMERICS_BYTES]);
        Self(tag)
    }
}

/// Which blocks a reader takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// Only what it would compute itself, bit for bit (reuse `Own`).
    Own {
        /// Its variant.
        variant: Variant,
        /// Its numerics.
        numerics: NumericsTag,
    },
    /// Whatever has the layers it runs (reuse `Any`).
    Any,
}

impl Accept {
    /// Whether a block with these labels may be read.
    pub fn takes(&self, variant: &Variant, numerics: &NumericsTag) -> bool {
        match self {
            Accept::Own { variant: own_variant, numerics: own_numerics } => {
                variant == own_variant && numerics == own_numerics
            }
            Accept::Any => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variant_reads_back() {
        for variant in [Variant::Exact, Variant::skip(b"ffn 3, ffn 7"), Variant::Mixed] {
            assert_eq!(Variant::decode(&variant.encode()), Ok(variant));
        }
        assert_eq!(Variant::decode(&[9; VARIANT_BYTES]), Err(UnknownVariant { code: 9 }));
    }

    #[test]
    fn own_takes_neither_another_variant_nor_other_numerics() {
        let numerics = NumericsTag::of("cpu");
        let own = Accept::Own { variant: Variant::Exact, numerics };
        assert!(own.takes(&Variant::Exact, &numerics));
        assert!(!own.takes(&Variant::Mixed, &numerics));
        assert!(!own.takes(&Variant::Exact, &NumericsTag::of("cuda")));
        assert!(Accept::Any.takes(&Variant::Mixed, &numerics));
    }
}

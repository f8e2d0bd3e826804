//! Shape of a block: what both sides must agree on before a byte of KV is exchanged.
//!
//! A frame holds the rows of one block, packed: one row a *present* layer, `[kv_head][K|V][token][head_dim]`.

/// OS page and O_DIRECT unit: frames start and end on it.
pub const FRAME_ALIGNMENT: u64 = 4096;
/// Most layers a geometry can list; the largest llama-family model has 126.
pub const LAYERS_MAX: u16 = 256;
/// Most tokens a block: the header's token list and a lookup's tail stay small.
pub const TOKENS_PER_BLOCK_MAX: u16 = 256;
/// Most bytes a frame: one value of the disk tier, and one unit of eviction.
pub const FRAME_BYTES_MAX: u64 = 1 << 28;
/// Bytes of an encoded geometry.
pub const GEOMETRY_BYTES: usize = 64;

/// Type of the stored K and V values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dtype {
    /// IEEE half.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
}

impl Dtype {
    /// Bytes of one value.
    pub fn value_bytes(self) -> u64 {
        match self {
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// How K is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KEncoding {
    /// Before rotary embedding: positions are applied when K is read.
    BeforeRope = 1,
}

/// The layers whose rows a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LayerSet([u64; 4]);

impl LayerSet {
    /// Layers 0 up to `layers`.
    pub fn all(layers: u16) -> Self {
        let mut set = Self::default();
        for layer in 0..layers.min(LAYERS_MAX) {
            set.insert(layer);
        }
        set
    }

    /// Adds a layer; layers from [`LAYERS_MAX`] on are ignored.
    pub fn insert(&mut self, layer: u16) {
        if let Some(word) = self.0.get_mut(usize::from(layer / 64)) {
            *word |= 1 << (layer % 64);
        }
    }

    /// Whether the layer's row is stored.
    pub fn contains(&self, layer: u16) -> bool {
        self.0.get(usize::from(layer / 64)).is_some_and(|word| word & (1 << (layer % 64)) != 0)
    }

    /// How many layers.
    pub fn len(&self) -> u16 {
        self.0.iter().map(|word| word.count_ones() as u16).sum()
    }

    /// Whether no layer is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ascending: packed row `r` is the `r`-th layer of this.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..LAYERS_MAX).filter(|&layer| self.contains(layer))
    }
}

impl FromIterator<u16> for LayerSet {
    fn from_iter<I: IntoIterator<Item = u16>>(layers: I) -> Self {
        let mut set = Self::default();
        for layer in layers {
            set.insert(layer);
        }
        set
    }
}

/// Shape of a block and of its frame. Valid by construction: fields are private, [`Geometry::new`] checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    tokens_per_block: u16,
    layers: u16,
    kv_heads: u16,
    head_dim: u16,
    dtype: Dtype,
    k_encoding: KEncoding,
    present: LayerSet,
}

/// Why numbers do not describe a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// A count is zero or over its bound.
    #[error("geometry refused: {field} is {value}, must be 1 to {limit}")]
    OutOfRange {
        /// Which.
        field: &'static str,
        /// Given.
        value: u64,
        /// Largest allowed.
        limit: u64,
    },
    /// A layer is listed that the model does not have.
    #[error("geometry refused: layer {layer} is listed as present, the model has {layers} layers")]
    NoSuchLayer {
        /// Listed.
        layer: u16,
        /// Of the model.
        layers: u16,
    },
    /// A byte names no dtype, or no K encoding.
    #[error("geometry refused: {field} has the unknown code {code}")]
    UnknownCode {
        /// Which.
        field: &'static str,
        /// Read.
        code: u8,
    },
}

impl Geometry {
    /// Checks each count and that the frame stays below [`FRAME_BYTES_MAX`].
    pub fn new(
        tokens_per_block: u16,
        layers: u16,
        kv_heads: u16,
        head_dim: u16,
        dtype: Dtype,
        present: LayerSet,
    ) -> Result<Self, GeometryError> {
        let bounded = |field, value: u16, limit: u16| {
            if value == 0 || value > limit {
                return Err(GeometryError::OutOfRange {
                    field,
                    value: value.into(),
                    limit: limit.into(),
                });
            }
            Ok(())
        };
        bounded("tokens per block", tokens_per_block, TOKENS_PER_BLOCK_MAX)?;
        bounded("layers", layers, LAYERS_MAX)?;
        bounded("kv heads", kv_heads, 1024)?;
        bounded("head dim", head_dim, 1024)?;
        bounded("present layers", present.len(), layers)?;
        if let Some(layer) = present.iter().find(|&layer| layer >= layers) {
            return Err(GeometryError::NoSuchLayer { layer, layers });
        }
        let geometry = Self {
            tokens_per_block,
            layers,
            kv_heads,
            head_dim,
            dtype,
            k_encoding: KEncoding::BeforeRope,
            present,
        };
        if geometry.frame_bytes() > FRAME_BYTES_MAX {
            return Err(GeometryError::OutOfRange {
                field: "frame bytes",
                value: geometry.frame_bytes(),
                limit: FRAME_BYTES_MAX,
            });
        }
        Ok(geometry)
    }

    /// Tokens of a full block.
    pub fn tokens_per_block(&self) -> u16 {
        self.tokens_per_block
    }

    /// Layers of the model.
    pub fn layers(&self) -> u16 {
        self.layers
    }

    /// KV heads a layer.
    pub fn kv_heads(&self) -> u16 {
        self.kv_heads
    }

    /// Values a head.
    pub fn head_dim(&self) -> u16 {
        self.head_dim
    }

    /// Type of the values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How K is stored.
    pub fn k_encoding(&self) -> KEncoding {
        self.k_encoding
    }

    /// Layers whose rows are stored.
    pub fn present(&self) -> &LayerSet {
        &self.present
    }

    /// Rows of a frame.
    pub fn present_count(&self) -> u16 {
        self.present.len()
    }

    /// Bytes of one layer of one block.
    pub fn row_bytes(&self) -> u64 {
        u64::from(self.kv_heads)
            * 2
            * u64::from(self.tokens_per_block)
            * u64::from(self.head_dim)
            * self.dtype.value_bytes()
    }

    /// Bytes of all rows of a block.
    pub fn payload_bytes(&self) -> u64 {
        self.row_bytes() * u64::from(self.present_count())
    }

    /// Bytes of a frame: the payload, rounded up to pages.
    pub fn frame_bytes(&self) -> u64 {
        self.payload_bytes().next_multiple_of(FRAME_ALIGNMENT)
    }

    /// As written into the region's header, the handshake and the disk index.
    pub fn encode(&self) -> [u8; GEOMETRY_BYTES] {
        let mut bytes = [0; GEOMETRY_BYTES];
        bytes[0..2].copy_from_slice(&self.tokens_per_block.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.layers.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.kv_heads.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.head_dim.to_le_bytes());
        bytes[8] = self.dtype as u8;
        bytes[9] = self.k_encoding as u8;
        for (chunk, word) in bytes[16..48].chunks_exact_mut(8).zip(self.present.0) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Geometry::encode`] wrote; anything else is an error.
    pub fn decode(bytes: &[u8; GEOMETRY_BYTES]) -> Result<Self, GeometryError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let dtype = match bytes[8] {
            1 => Dtype::F16,
            2 => Dtype::Bf16,
            code => return Err(GeometryError::UnknownCode { field: "dtype", code }),
        };
        if bytes[9] != KEncoding::BeforeRope as u8 {
            return Err(GeometryError::UnknownCode { field: "k_encoding", code: bytes[9] });
        }
        // A later version may say something there that this one must not pass over.
        if let Some(at) = (10..16).chain(48..GEOMETRY_BYTES).find(|at| bytes[*at] != 0) {
            return Err(GeometryError::UnknownCode { field: "reserved", code: bytes[at] });
        }
        let mut present = LayerSet::default();
        for (word, chunk) in present.0.iter_mut().zip(bytes[16..48].chunks_exact(8)) {
            let mut word_bytes = [0; 8];
            word_bytes.copy_from_slice(chunk);
            *word = u64::from_le_bytes(word_bytes);
        }
        Self::new(u16_at(0), u16_at(2), u16_at(4), u16_at(6), dtype, present)
    }
}

impl std::fmt::Display for Geometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} tokens x {} of {} layers x {} kv heads x {} ({:?})",
            self.tokens_per_block,
            self.present_count(),
            self.layers,
            self.kv_heads,
            self.head_dim,
            self.dtype
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn smollm2() -> Geometry {
        Geometry::new(64, 30, 3, 64, Dtype::F16, LayerSet::all(30)).unwrap()
    }

    #[test]
    fn smollm2_has_48_kib_rows_and_1_4_mib_frames() {
        assert_eq!(smollm2().row_bytes(), 48 << 10);
        assert_eq!(smollm2().frame_bytes(), 30 * (48 << 10));
    }

    #[test]
    fn an_encoded_geometry_reads_back() {
        assert_eq!(Geometry::decode(&smollm2().encode()), Ok(smollm2()));
    }

    #[test]
    fn a_layer_the_model_lacks_is_refused() {
        let refused = Geometry::new(64, 2, 1, 8, Dtype::F16, [0, 5].into_iter().collect());
        assert_eq!(refused, Err(GeometryError::NoSuchLayer { layer: 5, layers: 2 }));
    }

    #[test]
    fn absent_layers_make_frames_smaller() {
        let packed: LayerSet = [0, 2, 3].into_iter().collect();
        let geometry = Geometry::new(16, 4, 2, 64, Dtype::F16, packed).unwrap();
        assert_eq!(geometry.payload_bytes(), 3 * geometry.row_bytes());
        assert_eq!(geometry.present().iter().collect::<Vec<_>>(), [0, 2, 3]);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_an_error_or_to_themselves(bytes: [u8; GEOMETRY_BYTES]) {
            if let Ok(geometry) = Geometry::decode(&bytes) {
                prop_assert!(geometry.frame_bytes() <= FRAME_BYTES_MAX);
                prop_assert_eq!(geometry.encode(), bytes);
            }
        }
    }
}

//! The sizes of a decoder of the llama family, from a file's metadata.

use crate::weights::gguf::{Metadata, Problem};

/// Bounds on what a file may claim: above any known model, and small enough that products of two
/// sizes fit comfortably in 64 bits and layers and heads in 16.
const LAYERS_MAX: usize = 1024;
const WIDTH_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: usize = 1 << 24;
const HEAD_DIM_MAX: usize = 256;

/// Sizes that the kernels' blocks of 32 must divide.
const UNIT: usize = 32;

/// A family of decoders that this version computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama, Mistral, SmolLM2.
    Llama,
    /// Qwen 2 and 2.5: biases on Q, K and V.
    Qwen2,
}

impl Architecture {
    /// As `general.architecture` spells it; also the prefix of its keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// In which order a file's Q and K rows hold the pairs that rotate together. Kernels rotate halves;
/// neighbours are reordered when the weights are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeOrder {
    /// Rows `2 i` and `2 i + 1` (files of architecture `llama`).
    Neighbours,
    /// Rows `i` and `i + D / 2`.
    Halves,
}

/// What the tensors' shapes and the arithmetic follow from.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Family.
    pub architecture: Architecture,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads; divides `heads`.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Width of the FFN.
    pub ffn: usize,
    /// Token ids.
    pub vocab: usize,
    /// Tokens of context that the model was trained for.
    pub context_max: usize,
    /// Added to the mean square in norms.
    pub norm_epsilon: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Order of rotating pairs in the file.
    pub rope_order: RopeOrder,
    /// Q, K and V have biases.
    pub qkv_bias: bool,
}

impl Config {
    /// Values of Q a token.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values of K (or V) a token.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub(crate) fn from_metadata(
        metadata: &Metadata,
        has_tensor: impl Fn(&str) -> bool,
    ) -> Result<Self, Problem> {
        let name = metadata
            .str("general.architecture")
            .ok_or_else(|| Problem::Damaged("general.architecture is missing".to_owned()))?;
        let architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            other => {
                return Err(Problem::Unsupported(format!(
                    "its architecture is {other:?}, this version computes \"llama\" and \"qwen2\""
                )));
            }
        };
        let keys = Keys { metadata, prefix: architecture.name() };
        keys.refuse_what_we_lack()?;

        let hidden = keys.size("embedding_length", WIDTH_MAX)?;
        let heads = keys.size("attention.head_count", WIDTH_MAX)?;
        let kv_heads = keys.size_or("attention.head_count_kv", WIDTH_MAX, heads)?;
        let head_dim = keys.size_or("attention.key_length", HEAD_DIM_MAX, hidden / heads)?;
        let value_dim = keys.size_or("attention.value_length", HEAD_DIM_MAX, head_dim)?;
        let rotated = keys.size_or("rope.dimension_count", HEAD_DIM_MAX, head_dim)?;
        let vocab = match metadata.i64(&keys.name("vocab_size")) {
            Some(_) => keys.size("vocab_size", VOCAB_MAX)?,
            None => metadata.strings("tokenizer.ggml.tokens").map_or(0, |tokens| tokens.len()),
        };
        let epsilon = keys.float("attention.layer_norm_rms_epsilon")?;
        let config = Self {
            architecture,
            layers: keys.size("block_count", LAYERS_MAX)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: keys.size("feed_forward_length", WIDTH_MAX)?,
            vocab,
            context_max: keys.size("context_length", CONTEXT_MAX)?,
            norm_epsilon: epsilon as f32,
            rope_theta: metadata.f64(&keys.name("rope.freq_base")).unwrap_or(10_000.0),
            rope_order: match architecture {
                Architecture::Llama => RopeOrder::Neighbours,
                Architecture::Qwen2 => RopeOrder::Halves,
            },
            qkv_bias: has_tensor("blk.0.attn_q.bias"),
        };
        config.check(value_dim, rotated)?;
        Ok(config)
    }

    fn check(&self, value_dim: usize, rotated: usize) -> Result<(), Problem> {
        if self.vocab == 0 {
            return Err(Problem::Damaged("it has no vocabulary".to_owned()));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Err(Problem::Damaged(format!(
                "its {heads} query heads cannot share {kv_heads} KV heads"
            )));
        }
        if value_dim != self.head_dim || rotated != self.head_dim {
            return Err(Problem::Unsupported(format!(
                "its heads have {} key values of which {rotated} rotate, and {value_dim} values; \
                 this version needs all three to be equal",
                self.head_dim
            )));
        }
        for (what, size) in
            [("hidden size", self.hidden), ("head size", self.head_dim), ("FFN size", self.ffn)]
        {
            if !size.is_multiple_of(UNIT) {
                return Err(Problem::Unsupported(format!(
                    "its {what} is {size}, this version needs a multiple of {UNIT}"
                )));
            }
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(Problem::Damaged(format!("its rope.freq_base is {}", self.rope_theta)));
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            return Err(Problem::Damaged(format!("its norm epsilon is {}", self.norm_epsilon)));
        }
        Ok(())
    }
}

/// Keys below the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    /// A size in `1 ..= max`.
    fn size(&self, key: &str, max: usize) -> Result<usize, Problem> {
        let name = self.name(key);
        let value = self
            .metadata
            .i64(&name)
            .ok_or_else(|| Problem::Damaged(format!("{name} is missing or no integer")))?;
        usize::try_from(value)
            .ok()
            .filter(|size| (1..=max).contains(size))
            .ok_or_else(|| Problem::Damaged(format!("{name} is {value}, expected 1 to {max}")))
    }

    fn size_or(&self, key: &str, max: usize, absent: usize) -> Result<usize, Problem> {
        if self.metadata.contains(&self.name(key)) { self.size(key, max) } else { Ok(absent) }
    }

    fn float(&self, key: &str) -> Result<f64, Problem> {
        let name = self.name(key);
        self.metadata
            .f64(&name)
            .ok_or_else(|| Problem::Damaged(format!("{name} is missing or no float")))
    }

    /// Files of a known architecture may still ask for arithmetic that is not there yet.
    fn refuse_what_we_lack(&self) -> Result<(), Problem> {
        let scaling = self.metadata.str(&self.name("rope.scaling.type")).unwrap_or("none");
        if scaling != "none" {
            return Err(Problem::Unsupported(format!(
                "it scales rotary positions by {scaling:?}, this version knows only \"none\" and \
                 the factors of Llama 3.1"
            )));
        }
        let experts = self.metadata.i64(&self.name("expert_count")).unwrap_or(0);
        if experts != 0 {
            return Err(Problem::Unsupported(format!(
                "it has {experts} experts a layer, this version computes dense models only"
            )));
        }
        Ok(())
    }
}

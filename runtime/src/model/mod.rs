//! A decoder as data: its sizes, its tensors' names, its identity. Backends walk it with their own
//! kernels; nothing here computes.

mod config;
pub mod fingerprint;

pub use config::{Architecture, Config, RopeOrder};
pub use fingerprint::fingerprint;

use candle_core::quantized::GgmlDType;

use crate::weights::gguf::{Model, Problem};

/// Names of a layer's tensors, as GGUF files spell them.
#[derive(Debug, Clone)]
pub struct LayerNames {
    /// Norm before attention.
    pub attention_norm: String,
    /// Query, key and value projections.
    pub qkv: [String; 3],
    /// Their biases, where [`Config::qkv_bias`] says so.
    pub qkv_bias: [String; 3],
    /// Projection back to the residual stream.
    pub attention_output: String,
    /// Norm before the FFN.
    pub ffn_norm: String,
    /// Gate and up projections.
    pub gate_up: [String; 2],
    /// Projection back to the residual stream.
    pub down: String,
}

impl LayerNames {
    /// Of one layer.
    pub fn new(layer: usize) -> Self {
        let name = |part: &str| format!("blk.{layer}.{part}");
        Self {
            attention_norm: name("attn_norm.weight"),
            qkv: ["attn_q", "attn_k", "attn_v"].map(|part| name(&format!("{part}.weight"))),
            qkv_bias: ["attn_q", "attn_k", "attn_v"].map(|part| name(&format!("{part}.bias"))),
            attention_output: name("attn_output.weight"),
            ffn_norm: name("ffn_norm.weight"),
            gate_up: ["ffn_gate", "ffn_up"].map(|part| name(&format!("{part}.weight"))),
            down: name("ffn_down.weight"),
        }
    }
}

/// Token embedding; also the output projection where the file has none of its own.
pub const EMBEDDING: &str = "token_embd.weight";
/// Output projection.
pub const OUTPUT: &str = "output.weight";
/// Norm before the output projection.
pub const OUTPUT_NORM: &str = "output_norm.weight";
/// Divisors of the rotary frequencies (Llama 3.1).
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Weight types that the kernels compute with.
const SUPPORTED: [GgmlDType; 3] = [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0];

/// Every tensor that a decoder of this config needs is there, with its shape and a known type.
pub(crate) fn check_tensors(model: &Model) -> Result<(), Problem> {
    let config = model.config();
    let (hidden, ffn) = (config.hidden, config.ffn);
    let (queries, kv) = (config.query_width(), config.kv_width());
    check_matrix(model, EMBEDDING, [config.vocab, hidden])?;
    check_vector(model, OUTPUT_NORM, hidden)?;
    if model.tensor(OUTPUT).is_some() {
        check_matrix(model, OUTPUT, [config.vocab, hidden])?;
    }
    if model.tensor(ROPE_FACTORS).is_some() {
        check_vector(model, ROPE_FACTORS, config.head_dim / 2)?;
    }
    for layer in 0..config.layers {
        let names = LayerNames::new(layer);
        check_vector(model, &names.attention_norm, hidden)?;
        for (width, (name, bias)) in
            [queries, kv, kv].into_iter().zip(names.qkv.iter().zip(&names.qkv_bias))
        {
            check_matrix(model, name, [width, hidden])?;
            if config.qkv_bias {
                check_vector(model, bias, width)?;
            }
        }
        check_matrix(model, &names.attention_output, [hidden, queries])?;
        check_vector(model, &names.ffn_norm, hidden)?;
        for name in &names.gate_up {
            check_matrix(model, name, [ffn, hidden])?;
        }
        check_matrix(model, &names.down, [hidden, ffn])?;
    }
    Ok(())
}

fn check_shape(model: &Model, name: &str, expected: &[usize]) -> Result<GgmlDType, Problem> {
    let tensor = model
        .tensor(name)
        .ok_or_else(|| Problem::Damaged(format!("the tensor {name} is missing")))?;
    if tensor.shape != expected {
        let got = tensor.shape;
        return Err(Problem::Damaged(format!(
            "the tensor {name} has the shape {got:?}, its config implies {expected:?}"
        )));
    }
    Ok(tensor.dtype)
}

fn check_matrix(model: &Model, name: &str, expected: [usize; 2]) -> Result<(), Problem> {
    let dtype = check_shape(model, name, &expected)?;
    if !SUPPORTED.contains(&dtype) {
        return Err(Problem::Unsupported(format!(
            "the tensor {name} is stored as {dtype:?}, this version computes with Q4_0, Q4_1 and \
             Q8_0; take a file quantised to one of these"
        )));
    }
    Ok(())
}

fn check_vector(model: &Model, name: &str, expected: usize) -> Result<(), Problem> {
    let dtype = check_shape(model, name, &[expected])?;
    if dtype != GgmlDType::F32 {
        return Err(Problem::Unsupported(format!(
            "the tensor {name} is stored as {dtype:?}, expected F32"
        )));
    }
    Ok(())
}

//! A tiny model with random weights, for tests that need KV and tokens but no sense: three layers,
//! Q4_1 and Q8_0 weights, a byte-level tokenizer, a template. It loads in milliseconds.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use crate::model::{EMBEDDING, LayerNames, OUTPUT_NORM};

const LAYERS: usize = 3;
const HIDDEN: usize = 128;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const FFN: usize = 256;
const CONTEXT: u32 = 4096;

/// First ids, as in SmolLM2: end of text, start of a message, end of a message.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Pairs that the tokenizer joins; each side is a token too.
const MERGES: [(&str, &str); 4] = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġt", "he")];

const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// Why the file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the random model {path}: {source}")]
pub struct WriteError {
    path: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Writes the model of `seed`; the same seed gives the same file.
pub fn write_tiny_gguf(path: &Path, seed: u64) -> Result<(), WriteError> {
    write_random_gguf(path, seed, LAYERS)
}

/// As [`write_tiny_gguf`], with so many layers. With one, a token's KV depends on nothing before it.
pub fn write_random_gguf(path: &Path, seed: u64, layers: usize) -> Result<(), WriteError> {
    let error = |source: Box<dyn std::error::Error + Send + Sync>| WriteError {
        path: path.display().to_string(),
        source,
    };
    let tensors = tensors(seed, layers).map_err(|source| error(source.into()))?;
    let metadata = metadata(layers);
    let file = std::fs::File::create(path).map_err(|source| error(source.into()))?;
    let mut file = std::io::BufWriter::new(file);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).map_err(|source| error(source.into()))?;
    std::io::Write::flush(&mut file).map_err(|source| error(source.into()))
}

struct Random(u64);

impl Random {
    /// In -1 … 1 (SplitMix64).
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

fn tensors(seed: u64, layers: usize) -> candle_core::Result<Vec<(String, QTensor)>> {
    let mut random = Random(seed);
    let mut out = Vec::new();
    let mut put = |name: &str, shape: &[usize], dtype: GgmlDType, scale: f32, middle: f32| {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|_| middle + random.unit() * scale).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        out.push((name.to_owned(), QTensor::quantize(&tensor, dtype)?));
        candle_core::Result::Ok(())
    };
    // Uniform in ±√(3 / K): products keep the size of their input.
    let scale = |inner: usize| (3.0 / inner as f32).sqrt();
    let vocab = tokens().len();
    put(EMBEDDING, &[vocab, HIDDEN], GgmlDType::Q8_0, 0.5, 0.0)?;
    put(OUTPUT_NORM, &[HIDDEN], GgmlDType::F32, 0.1, 1.0)?;
    for layer in 0..layers {
        let names = LayerNames::new(layer);
        let widths = [HEADS, KV_HEADS, KV_HEADS].map(|heads| heads * HEAD_DIM);
        put(&names.attention_norm, &[HIDDEN], GgmlDType::F32, 0.1, 1.0)?;
        for (name, width) in names.qkv.iter().zip(widths) {
            put(name, &[width, HIDDEN], GgmlDType::Q4_1, scale(HIDDEN), 0.0)?;
        }
        let attention_width = HEADS * HEAD_DIM;
        let output_scale = scale(attention_width);
        put(
            &names.attention_output,
            &[HIDDEN, attention_width],
            GgmlDType::Q4_1,
            output_scale,
            0.0,
        )?;
        put(&names.ffn_norm, &[HIDDEN], GgmlDType::F32, 0.1, 1.0)?;
        for name in &names.gate_up {
            put(name, &[FFN, HIDDEN], GgmlDType::Q4_1, scale(HIDDEN), 0.0)?;
        }
        put(&names.down, &[HIDDEN, FFN], GgmlDType::Q8_0, scale(FFN), 0.0)?;
    }
    Ok(out)
}

/// The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for code
/// points from 256 on.
fn byte_tokens() -> Vec<String> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..=255)
        .map(|byte| {
            let code = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("below 0x200").to_string()
        })
        .collect()
}

fn tokens() -> Vec<String> {
    let mut tokens: Vec<String> = SPECIAL.iter().map(ToString::to_string).collect();
    tokens.extend(byte_tokens());
    tokens.extend(MERGES.iter().map(|(left, right)| format!("{left}{right}")));
    tokens
}

fn metadata(layers: usize) -> Vec<(String, Value)> {
    let text = |text: &str| Value::String(text.to_owned());
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let tokens = tokens();
    let kinds = (0..tokens.len()).map(|id| Value::I32(if id < SPECIAL.len() { 3 } else { 1 }));
    let merges = MERGES.iter().map(|(left, right)| format!("{left} {right}")).collect();
    let pairs = [
        ("general.architecture", text("llama")),
        ("general.name", text("Tiny random")),
        ("llama.block_count", Value::U32(layers as u32)),
        ("llama.context_length", Value::U32(CONTEXT)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(FFN as u32)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.attention.key_length", Value::U32(HEAD_DIM as u32)),
        ("llama.attention.value_length", Value::U32(HEAD_DIM as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1.0e-5)),
        ("llama.rope.dimension_count", Value::U32(HEAD_DIM as u32)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.vocab_size", Value::U32(tokens.len() as u32)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.token_type", Value::Array(kinds.collect())),
        ("tokenizer.ggml.merges", strings(merges)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        ("tokenizer.ggml.padding_token_id", Value::U32(2)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.ggml.add_space_prefix", Value::Bool(false)),
        ("tokenizer.chat_template", text(TEMPLATE)),
        ("tokenizer.ggml.tokens", strings(tokens)),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::write_tiny_gguf;
    use crate::weights::gguf::Model;

    #[test]
    fn the_file_opens_and_the_same_seed_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
        write_tiny_gguf(&a, 5).unwrap();
        write_tiny_gguf(&b, 5).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let model = Model::open(&a).unwrap();
        assert_eq!(model.config().vocab, 263);
        assert_eq!(model.metadata().strings("tokenizer.ggml.tokens").unwrap()[3], "Ā");
    }
}

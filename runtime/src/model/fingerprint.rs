//! Identity of everything that decides what K and V hold: the root of all block keys.
//!
//! Two files with the same fingerprint give interchangeable KV. In it: the weights (every tensor,
//! by role, type, shape and bytes), the architecture's fields, dtype and encoding of stored KV, and
//! tokens per block. Not in it: file name, tokenizer, template, device, thread count.

use super::RopeOrder;
use crate::weights::gguf::Model;

/// Changes when the list below does, or what the stored KV means.
const DOMAIN: &str = "colloquy 2026-11 model fingerprint 1";

/// How K and V are stored by all backends of this version: f16, K before rotation, pairs that
/// rotate together half a head apart.
const KV_ENCODING: &str = "f16 k_encoding=none pairs=halves layout=layer,kv_head,kv,token,dim";

/// Digest of a model as it is served with `tokens_per_block`.
pub fn fingerprint(model: &Model, tokens_per_block: u16) -> [u8; 32] {
    let mut list = blake3::Hasher::new_derive_key(DOMAIN);
    let mut put = |bytes: &[u8]| {
        list.update(&(bytes.len() as u64).to_le_bytes());
        list.update(bytes);
    };
    let config = model.config();
    put(config.architecture.name().as_bytes());
    for size in [
        config.layers,
        config.hidden,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.ffn,
        config.vocab,
    ] {
        put(&(size as u64).to_le_bytes());
    }
    put(&config.norm_epsilon.to_bits().to_le_bytes());
    put(&config.rope_theta.to_bits().to_le_bytes());
    put(&[u8::from(config.qkv_bias), u8::from(config.rope_order == RopeOrder::Halves)]);
    put(KV_ENCODING.as_bytes());
    put(&tokens_per_block.to_le_bytes());
    for name in model.tensor_names() {
        let tensor = model.tensor(name).expect("the name came from the model");
        put(name.as_bytes());
        put(format!("{:?} {:?}", tensor.dtype, tensor.shape).as_bytes());
        put(blake3::hash(tensor.bytes).as_bytes());
    }
    *list.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::fingerprint;
    use crate::weights::gguf::Model;
    use crate::weights::random::write_tiny_gguf;

    #[test]
    fn it_follows_weights_and_block_size_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, seed| {
            let path = folder.path().join(name);
            write_tiny_gguf(&path, seed).unwrap();
            Model::open(&path).unwrap()
        };
        let (one, same, other) = (open("a.gguf", 1), open("b.gguf", 1), open("c.gguf", 2));
        assert_eq!(fingerprint(&one, 64), fingerprint(&same, 64));
        assert_ne!(fingerprint(&one, 64), fingerprint(&other, 64));
        assert_ne!(fingerprint(&one, 64), fingerprint(&one, 16));
    }
}

//! A model's weights, packed for the kernels.

use candle_core::quantized::GgmlDType;
use kernels::LaunchError;
use kernels::matmul::Matrix;
use kernels::matmul_q4_1::MatrixQ4_1;
use kernels::matmul_q8_0::MatrixQ8_0;

use crate::model::{Config, EMBEDDING, LayerNames, OUTPUT, OUTPUT_NORM, RopeOrder};
use crate::weights::gguf::Model;

/// One layer.
#[derive(Debug)]
pub struct Layer {
    pub attention_norm: Vec<f32>,
    pub qkv: [Matrix; 3],
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    pub attention_output: Matrix,
    pub ffn_norm: Vec<f32>,
    pub gate_up: [Matrix; 2],
    pub down: Matrix,
}

/// All of them.
#[derive(Debug)]
pub struct Weights {
    pub embedding: Matrix,
    /// `None`: the embedding serves as output projection too.
    pub output: Option<Matrix>,
    pub output_norm: Vec<f32>,
    pub layers: Vec<Layer>,
}

impl Weights {
    /// Packs an open model, whose tensors `Model::open` has checked.
    pub fn pack(model: &Model) -> Result<Self, LaunchError> {
        let config = model.config();
        let as_stored = |row| row;
        Ok(Self {
            embedding: matrix(model, EMBEDDING, as_stored)?,
            output: model.tensor(OUTPUT).map(|_| matrix(model, OUTPUT, as_stored)).transpose()?,
            output_norm: vector(model, OUTPUT_NORM),
            layers: (0..config.layers)
                .map(|layer| pack_layer(model, config, layer))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Output projection.
    pub fn head(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}

fn pack_layer(model: &Model, config: &Config, layer: usize) -> Result<Layer, LaunchError> {
    let names = LayerNames::new(layer);
    let as_stored = |row| row;
    let halves = |row| source_of_half_order(config, row);
    let [q, k, v] = &names.qkv;
    let bias = |name: &String, source: &dyn Fn(usize) -> usize| {
        let values = vector(model, name);
        (0..values.len()).map(|row| values[source(row)]).collect()
    };
    let [bias_q, bias_k, bias_v] = &names.qkv_bias;
    Ok(Layer {
        attention_norm: vector(model, &names.attention_norm),
        qkv: [matrix(model, q, halves)?, matrix(model, k, halves)?, matrix(model, v, as_stored)?],
        qkv_bias: config
            .qkv_bias
            .then(|| [bias(bias_q, &halves), bias(bias_k, &halves), bias(bias_v, &as_stored)]),
        attention_output: matrix(model, &names.attention_output, as_stored)?,
        ffn_norm: vector(model, &names.ffn_norm),
        gate_up: [
            matrix(model, &names.gate_up[0], as_stored)?,
            matrix(model, &names.gate_up[1], as_stored)?,
        ],
        down: matrix(model, &names.down, as_stored)?,
    })
}

/// Which row of the file's Q or K becomes row `row`, so that pairs that rotate together lie half a
/// head apart.
fn source_of_half_order(config: &Config, row: usize) -> usize {
    match config.rope_order {
        RopeOrder::Halves => row,
        RopeOrder::Neighbours => {
            let (head, i, half) =
                (row / config.head_dim, row % config.head_dim, config.head_dim / 2);
            head * config.head_dim + 2 * (i % half) + i / half
        }
    }
}

fn matrix(
    model: &Model,
    name: &str,
    source: impl Fn(usize) -> usize,
) -> Result<Matrix, LaunchError> {
    let tensor = model.tensor(name).expect("Model::open has checked all tensors");
    let (rows, inner) = (tensor.shape[0], tensor.shape[1]);
    match tensor.dtype {
        GgmlDType::Q4_0 => {
            MatrixQ4_1::pack_q4_0(rows, inner, tensor.bytes, source).map(Matrix::Q4_1)
        }
        GgmlDType::Q4_1 => MatrixQ4_1::pack(rows, inner, tensor.bytes, source).map(Matrix::Q4_1),
        GgmlDType::Q8_0 => MatrixQ8_0::pack(rows, inner, tensor.bytes, source).map(Matrix::Q8_0),
        other => unreachable!("Model::open let a matrix of {other:?} pass"),
    }
}

fn vector(model: &Model, name: &str) -> Vec<f32> {
    let tensor = model.tensor(name).expect("Model::open has checked all tensors");
    tensor.floats().expect("Model::open has checked all types")
}

#[cfg(test)]
mod tests {
    use super::source_of_half_order;
    use crate::model::RopeOrder;
    use crate::weights::{gguf::Model, random::write_tiny_gguf};

    #[test]
    fn neighbours_become_halves_of_the_same_head() {
        let folder = tempfile::tempdir().unwrap();
        write_tiny_gguf(&folder.path().join("a.gguf"), 1).unwrap();
        let model = Model::open(folder.path()).unwrap();
        let config = model.config();
        assert_eq!(config.rope_order, RopeOrder::Neighbours);
        assert_eq!(config.head_dim, 32);
        let sources: Vec<usize> =
            [0, 1, 16, 17, 31, 32, 48].map(|row| source_of_half_order(config, row)).to_vec();
        assert_eq!(sources, [0, 2, 1, 3, 31, 32, 33]);
    }
}

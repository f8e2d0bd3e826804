//! The definition, in plain loops.

use super::Table;

/// See the module.
pub fn rotate(table: &Table, position: usize, scale: f32, heads: &mut [f32]) {
    let half = table.head_dim() / 2;
    let (cos, sin) = table.at(position);
    let (cos, sin) = (cos.as_flattened(), sin.as_flattened());
    for head in heads.chunks_exact_mut(2 * half) {
        for i in 0..half {
            let (low, high) = (head[i], head[half + i]);
            head[i] = (low * cos[i] - high * sin[i]) * scale;
            head[half + i] = (high * cos[i] + low * sin[i]) * scale;
        }
    }
}

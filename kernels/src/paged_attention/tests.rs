use proptest::prelude::*;

use super::{Item, KvBlocks, KvShape, Part, TOLERANCE, attend, reference, store, tokens_max};
use crate::disjoint::Disjoint;
use crate::rope::Table;
use crate::simd::{Class, tests::Random};

struct Case {
    blocks: KvBlocks,
    block_table: Vec<u32>,
    rope: Table,
    heads: usize,
    tokens: usize,
    queries: Vec<f32>, // [tokens, heads, D]
}

impl Case {
    /// A sequence of `tokens` tokens whose blocks lie in reverse order, among garbage.
    fn new(seed: u64, shape: KvShape, heads: usize, tokens: usize) -> Self {
        let mut random = Random(seed);
        let count = tokens.div_ceil(shape.tokens_per_block);
        let blocks = KvBlocks::new(2, count + 1, shape).unwrap();
        let block_table: Vec<u32> = (0..count as u32).rev().collect();
        for block in 0..=count {
            // SAFETY: this test owns the pool.
            let row = unsafe { blocks.row_mut(1, block) };
            row.fill(0x7E00); // NaN: reading a value that is not there would show.
        }
        for position in 0..tokens {
            let block = block_table[position / shape.tokens_per_block] as usize;
            for kv_head in 0..shape.kv_heads {
                for part in [Part::Key, Part::Value] {
                    let values = random.floats(shape.head_dim, 2.0);
                    let token = position % shape.tokens_per_block;
                    // SAFETY: this test owns the pool.
                    let to = unsafe { blocks.token_mut((1, block), kv_head, part, token) };
                    store(Class::detect(), &values, to).unwrap();
                }
            }
        }
        let rope = Table::new(shape.head_dim, 1.0e4, None, tokens).unwrap();
        let queries = random.floats(tokens * heads * shape.head_dim, 1.0);
        Self { blocks, block_table, rope, heads, tokens, queries }
    }

    /// Positions `first ..`, in items of `cut` tokens.
    fn run(&self, class: Class, first: usize, cut: usize) -> Vec<u32> {
        let shape = self.blocks.shape();
        let width = self.heads * shape.head_dim;
        let mut out = vec![0.0; (self.tokens - first) * width];
        {
            let out = Disjoint::new(&mut out);
            let mut position = first;
            while position < self.tokens {
                let tokens = cut.min(self.tokens - position);
                for kv_head in 0..shape.kv_heads {
                    let item = Item {
                        blocks: &self.blocks,
                        layer: 1,
                        block_table: &self.block_table,
                        kv_head,
                        heads: self.heads,
                        queries: &self.queries[position * width..],
                        query_stride: width,
                        first_position: position,
                        tokens,
                        rope: &self.rope,
                        out: &out,
                        out_row: position - first,
                    };
                    // SAFETY: this thread alone touches the pool and `out`.
                    unsafe { attend(class, &item) }.unwrap();
                }
                position += tokens;
            }
        }
        out.iter().map(|f| f.to_bits()).collect()
    }
}

const SHAPES: [(KvShape, usize); 4] = [
    (KvShape { kv_heads: 1, head_dim: 64, tokens_per_block: 64 }, 1),
    (KvShape { kv_heads: 3, head_dim: 64, tokens_per_block: 64 }, 9),
    (KvShape { kv_heads: 2, head_dim: 32, tokens_per_block: 16 }, 4),
    (KvShape { kv_heads: 2, head_dim: 96, tokens_per_block: 128 }, 10),
];

#[test]
fn scores_and_mixtures_are_near_the_reference() {
    for (shape, heads) in SHAPES {
        for tokens in [1, 15, 65, 131] {
            let case = Case::new(61, shape, heads, tokens);
            let got = case.run(Class::detect(), 0, tokens_max(heads, shape.kv_heads));
            let group = heads / shape.kv_heads;
            for (row, got) in got.chunks(shape.head_dim).enumerate() {
                let (position, head) = (row / heads, row % heads);
                let query = &case.queries[row * shape.head_dim..(row + 1) * shape.head_dim];
                let mut want = vec![0.0; shape.head_dim];
                let kv = (&case.blocks, 1, case.block_table.as_slice());
                // SAFETY: nobody writes the pool.
                unsafe {
                    reference::attend(kv, head / group, &case.rope, position, query, &mut want);
                }
                for (got, want) in got.iter().zip(want) {
                    let got = f32::from_bits(*got);
                    assert!((got - want).abs() <= TOLERANCE, "{shape:?} {position} {got} {want}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn chunking_and_class_do_not_change_a_bit(
        which in 0..SHAPES.len(),
        tokens in 1_usize..150,
        first in 0_usize..150,
        cut in 1_usize..17,
        seed in 0_u64..1000,
    ) {
        let (shape, heads) = SHAPES[which];
        let first = first % tokens;
        let cut = cut.min(tokens_max(heads, shape.kv_heads));
        let case = Case::new(seed, shape, heads, tokens);
        let want = case.run(Class::scalar(), first, 1);
        for class in Class::available() {
            prop_assert_eq!(&case.run(class, first, cut), &want, "class {}", class.name());
        }
    }
}

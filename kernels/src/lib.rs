//! The arithmetic of a decoder on a CPU, on quantised weights as stored.
//!
//! One folder a kernel: `mod.rs` says what it computes and checks shapes, `reference.rs` defines it
//! in plain loops, `cpu.rs` is the fast form over [`simd::Simd`], `tests.rs` holds the fast form to
//! the reference.
//!
//! **Invariant: same bits.** A row's result depends on that row alone: not on how many rows stand
//! beside it, how work is cut among threads, or the CPU's instruction class. So a token computed in
//! a chunk of 512, alone in decode, or on another machine gives the same KV, which is what lets a
//! cached history stand in for a computed one (docs/adr/0004).
//!
//! Shapes are written with the legend of [`simd`].

#![expect(
    clippy::inline_always,
    reason = "an operation that is not inlined into its class's function is compiled without it"
)]

pub mod disjoint;
pub mod error;
pub mod log_sum_exp;
pub mod math;
pub mod matmul;
pub mod matmul_q4_1;
pub mod matmul_q8_0;
pub mod paged_attention;
pub mod pool;
pub mod quantise;
pub mod rmsnorm;
pub mod rope;
pub mod simd;
pub mod swiglu;

pub use error::LaunchError;
pub use simd::Class;

//! Model files: what lies in them, checked before anything is believed.

pub mod gguf;
pub mod random;

//! Where a model is computed: implementations of [`crate::batch::Backend`].

pub mod cpu;

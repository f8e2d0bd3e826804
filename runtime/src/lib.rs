//! The inference server: http → scheduler → engine → backend, with AdaSkip and the cache client.
//!
//! Reading order: [`http`], [`request`], [`engine`], [`scheduler`], [`batch`], [`backend`].

pub mod adaskip;
pub mod batch;
pub mod block_pool;
pub mod engine;
pub mod doorbell;
pub mod request;
pub mod text;

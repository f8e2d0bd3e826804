//! The inference server: http → scheduler → engine → backend, with AdaSkip and the cache client.
//!
//! Reading order: [`http`], [`request`], [`engine`], [`scheduler`], [`batch`], [`backend`].

pub mod adaskip;
pub mod batch;
pub mod block_pool;
pub mod cache_client;
pub mod engine;
pub mod overlap;
pub mod request;
pub mod scheduler;
pub mod sequence;
pub mod text;
pub mod variant;
pub mod backend;
pub mod model;
pub mod sampler;
pub mod weights;
pub mod config;
pub mod http;
pub mod server;
pub mod telemetry;

//! The inference server: http → scheduler → engine → backend, with AdaSkip and the cache client.
//!
//! Reading order: [`server`], [`http`], [`request`], [`engine`], [`scheduler`], [`sequence`],
//! [`block_pool`], [`batch`], [`backend`].

pub mod account;
pub mod adaskip;
pub mod backend;
pub mod batch;
pub mod block_pool;
pub mod cache_client;
pub mod changes;
pub mod config;
pub mod engine;
pub mod http;
pub mod model;
pub mod overlap;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod server;
pub mod shared_prefix;
pub mod telemetry;
pub mod text;
pub mod variant;
pub mod weights;

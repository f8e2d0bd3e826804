//! Tests and demonstrations of what crosses a process: the local Kubernetes, a client of the API.

#![forbid(unsafe_code)]

pub mod bars;
pub mod client;
pub mod cluster;
pub mod conversation;
pub mod deployment;
pub mod figures;
pub mod progress;
pub mod stepping;

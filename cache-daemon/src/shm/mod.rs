//! The region's memory in this process.

pub mod direct;
pub mod map;

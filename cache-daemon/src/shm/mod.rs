//! The region's memory in this process.

pub mod map;

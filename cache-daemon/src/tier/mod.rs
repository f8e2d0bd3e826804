//! Where blocks are: [`host`] frames in the region, and the [`disk`].

pub mod disk;
pub mod free_frames;
pub mod host;
pub mod remote;

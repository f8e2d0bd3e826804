//! The simulator: the daemon's own directory, queue, ranks and index, driven by a trace and a virtual clock.
//!
//! [`trace`] is the file format, [`generate`] makes traces from lengths and [`convert`] from recordings;
//! [`schedule`] is the server (who starts when), [`replay`] the tiers (what is where by then).
//!
//! What it does not model: frames in shared memory, checksums, RocksDB, and a turn's KV arriving block by
//! block: all of it is committed when the turn ends. A turn starts when the schedule says, whether its
//! history is there or not, so that all policies see the same turns at the same times.

pub mod convert;
pub mod generate;
pub mod replay;
pub mod schedule;
pub mod trace;

//! The simulator: the daemon's own directory, queue, ranks and index, driven by a trace and a virtual clock.
//!
//! [`trace`] is the file format, [`generate`] makes traces from lengths and [`convert`] from recordings;
//! [`schedule`] is the server (who starts when), [`prepare`] what each turn reads and makes, [`replay`] the tiers
//! (what is where by then), under [`settings`] that may have runtimes die and the disk fail.
//!
//! What it does not model: frames in shared memory, checksums, RocksDB, and a turn's KV arriving block by
//! block: all of it is committed when the turn ends. A turn starts when the schedule says, whether its
//! history is there or not, so that all policies see the same turns at the same times.

pub mod convert;
mod faults;
pub mod generate;
mod pauses;
pub mod prepare;
pub mod replay;
pub mod schedule;
pub mod settings;
pub mod trace;

#[cfg(test)]
mod tests;

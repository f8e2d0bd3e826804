//! The cache daemon: keeps conversations' KV in a shared region and on disk, and moves it by what the
//! runtime's queue says.
//!
//! Reading order: [`supervise`], [`worker`], [`daemon`] (the loop), [`attachment`], [`store`],
//! [`transfer`], [`directory`], [`queue`], [`policy`], [`tier`]; for conversations [`records`], [`outline`], [`admin`]. [`sim`] drives the middle of it without the rest.
//!
//! **Invariant:** the daemon never parses weights, never speaks to a GPU, and knows no model but by
//! its geometry and fingerprint.

pub mod admin;
pub mod attachment;
pub mod config;
pub mod conversation;
pub mod daemon;
pub mod deletion;
pub mod directory;
pub mod doomed;
pub mod export;
pub mod foresight;
pub mod handback;
pub mod http;
pub mod import;
pub mod inventory;
pub mod key_map;
pub mod listen;
pub mod metrics;
pub mod migrate;
mod moves;
pub mod outline;
pub mod policy;
pub mod queue;
pub mod reconfigure;
pub mod records;
pub mod shm;
pub mod sim;
pub mod stock;
pub mod store;
pub mod supervise;
pub mod tier;
pub mod tombstone;
pub mod transfer;
pub mod verify;
pub mod worker;

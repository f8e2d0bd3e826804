//! Conversations that move: between two real daemons, to an object store and back, with kills in between. The
//! runtime's cache client is at both ends: every byte that arrives is compared with the byte that its block's
//! key gives.

#[path = "../support/mod.rs"]
mod support;

mod between;
mod kills;
mod proxy;
mod remote;
mod replica;

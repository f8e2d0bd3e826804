//! Conversations that move between daemons.
//!
//! ```text
//!   source daemon                                  this daemon
//!   loop ◄─ Ask ─ server ◄── HTTP/2, signed ─────── pull ─ Ask ─► loop
//!     │ hold, copy  └── sealed sections, paced ──►    │ place       │ frame, check, enter
//!   frames, disk                                    bounded      frames, write-behind
//! ```
//!
//! The daemon that wants a conversation pulls it (docs/adr/0013): it knows what it has already, so a transfer
//! that broke goes on by asking for the rest. [`bundle`] is the format, [`secret`] says who may ask and
//! proves who answered, [`bucket`] paces, [`ask`] is how both ends speak with the loop, which owns all state.

pub mod ask;
pub mod bucket;
pub mod bundle;
pub mod client;
pub mod describe;
pub mod desk;
pub mod pace;
pub mod pull;
pub mod secret;
pub mod server;
pub mod start;

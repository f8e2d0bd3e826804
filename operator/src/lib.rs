//! The operator of Colloquy: turns a `ConversationModel` into pods, volumes and a service.
//!
//! observe → plan → apply. [`plan`] is pure and is where the rules live; [`observe`] and [`apply`]
//! talk to the API server; [`desired`] says what a model's objects look like; [`reconcile`] is the
//! one screen that ties them together. Reading order: [`api`], [`desired`], [`plan`],
//! [`conditions`], [`reconcile`].
//!
//! **Invariant:** nothing is remembered between two looks. Whatever an operator was doing when it
//! was killed, the next one sees from the cluster alone.
//!
//! **Invariant:** no Secret is read, no command is run in a pod, no role is written.
#![forbid(unsafe_code)]

pub mod api;
pub mod apply;
pub mod conditions;
pub mod config;
pub mod controller;
pub mod desired;
pub mod error;
#[cfg(test)]
mod fixtures;
pub mod lease;
pub mod observe;
pub mod plan;
pub mod problem;
pub mod reconcile;
pub mod story;
pub mod strict;
pub mod telemetry;

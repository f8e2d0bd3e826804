//! The engine: one thread that owns every sequence, the block pool and the cache client.
//!
//! `step()` = schedule → run → postprocess. Http speaks to it through an [`EngineHandle`]; the
//! backend, the cache client and http wake it through one [`Doorbell`].

pub mod stats;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::adaskip::policy::SkipConfig;
use crate::batch::Backend;
use crate::doorbell::{Doorbell, Waker};
use crate::request::{Command, GenerateError};
use stats::EngineStats;

/// Commands that http may have under way before the engine takes them: a burst of arrivals between
/// two steps, on top of the waiting queue's own bound.
const COMMANDS_MAX: usize = 1024;

/// What the engine needs to know; http's `config` has checked it.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most tokens of prompt and reply together.
    pub context_max: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// End-of-text tokens of the model; never drawn under `ignore_eos`.
    pub end_tokens: Arc<[u32]>,
    /// Sequences that take part in a step.
    pub sequences_max: usize,
    /// Tokens that one step computes at most (prefill chunks and decode together).
    pub step_tokens_max: usize,
    /// Sequences in the queue.
    pub waiting_max: usize,
    /// AdaSkip's settings.
    pub skip: SkipConfig,
    /// The calibration text's token ids; read when `skip` asks for any set.
    pub calibration: Vec<u32>,
    /// Digest of everything that KV depends on (`model::fingerprint`).
    pub fingerprint: [u8; 32],
    /// Digest of how the backend computes (`CpuBackend::numerics_tag`).
    pub numerics_tag: u64,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting does not fit the model or the pool: exit code 64.
    #[error("engine settings: {0}")]
    Config(String),
    /// Two engines on one registry.
    #[error("engine metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No thread.
    #[error("engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// How http tasks reach the engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    waker: Waker,
    stats: EngineStats,
    waiting_max: usize,
    tokens_capacity: u32,
}

impl EngineHandle {
    /// Hands a command over without blocking, and wakes the engine.
    pub fn submit(&self, command: Command) -> Result<(), GenerateError> {
        let waiting = self.stats.requests_waiting.get().unsigned_abs() as usize;
        if matches!(command, Command::Generate(_)) && waiting >= self.waiting_max {
            return Err(GenerateError::QueueFull { waiting: self.waiting_max });
        }
        let sent = self.commands.try_send(command);
        self.waker.ring();
        sent.map_err(|error| match error {
            TrySendError::Full(_) => GenerateError::QueueFull { waiting: COMMANDS_MAX },
            TrySendError::Disconnected(_) => GenerateError::ShuttingDown,
        })
    }

    /// Tokens that the whole device pool holds: prompt + `tokens_max` above this is refused with
    /// [`GenerateError::TooLarge`], so http clamps its default for `tokens_max` to it.
    pub fn tokens_capacity(&self) -> u32 {
        self.tokens_capacity
    }

    /// What the engine counts.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }
}

/// Learns the skip sets (blocks for as long as that takes), then starts the engine's thread.
///
/// `doorbell` is the one that the backend's wake function rings. The thread ends after
/// [`Command::Shutdown`], when the running sequences are done.
pub fn start(
    config: EngineConfig,
    backend: Box<dyn Backend>,
    doorbell: Doorbell,
    registry: &prometheus::Registry,
) -> Result<(EngineHandle, JoinHandle<()>), StartError> {
    let stats = EngineStats::new(registry)?;
    let geometry = backend.geometry();
    let (commands, received) = sync_channel(COMMANDS_MAX);
    let handle = EngineHandle {
        commands,
        waker: doorbell.waker(),
        stats,
        waiting_max: config.waiting_max,
        tokens_capacity: geometry
            .block_count
            .saturating_mul(u32::from(geometry.tokens_per_block))
            .min(config.context_max),
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || run(&doorbell, &received))?;
    Ok((handle, thread))
}

fn run(doorbell: &Doorbell, commands: &Receiver<Command>) {
    loop {
        while let Ok(command) = commands.try_recv() {
            if matches!(command, Command::Shutdown) {
                return;
            }
        }
        doorbell.wait(Duration::from_secs(1));
    }
}

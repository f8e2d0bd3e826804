//! What the engine counts, registered with the registry that http serves.
//!
//! Names follow vLLM's where it has one; the registry adds our prefix and the model's label.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::account::Account;

/// Seconds from arrival to admission.
const QUEUE_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Seconds of one step: compute, and waits for loads.
const STEP_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Tokens of one step.
const STEP_TOKENS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Counters of one engine; written by its thread, read by whoever gathers the registry.
#[derive(Debug, Clone)]
pub struct EngineStats {
    /// Sequences that take part in steps.
    pub requests_running: IntGauge,
    /// Sequences in the queue.
    pub requests_waiting: IntGauge,
    /// Device blocks that sequences, loads or saves hold.
    pub blocks_used: IntGauge,
    /// Device blocks of the pool.
    pub blocks: IntGauge,
    /// Tokens of prompts whose KV is complete.
    pub cache_query_tokens: IntCounter,
    /// Of those: found, by tier.
    pub cache_hit_tokens: IntCounterVec,
    /// Of those: computed, by reason.
    pub cache_miss_tokens: IntCounterVec,
    /// Tokens sampled.
    pub generated_tokens: IntCounter,
    /// Tokens computed a second time: preempted, or their load failed.
    pub recomputed_tokens: IntCounter,
    /// Sequences put back into the queue because the pool had no block left.
    pub preemptions: IntCounter,
    /// Sequences whose client went away.
    pub cancelled: IntCounter,
    /// Loads by outcome.
    pub loads: IntCounterVec,
    /// Blocks saved to frames, by outcome.
    pub saves: IntCounterVec,
    /// Turns foretold by their clients, and what became of them.
    pub anticipations: IntCounterVec,
    /// Turns of truncated conversations: whether what was kept was used or computed anew.
    pub truncated: IntCounterVec,
    /// Whether a cache daemon is attached.
    pub cache_attached: IntGauge,
    /// Seconds from arrival to admission.
    pub queue_seconds: Histogram,
    /// Seconds of compute a step.
    pub step_seconds: Histogram,
    /// Seconds a step's layers stood waiting for loads.
    pub load_wait_seconds: Histogram,
    /// Tokens a step.
    pub step_tokens: Histogram,
    /// Sublayers skipped in prefill, decode, and as a sequence's extras.
    pub skipped_sublayers: prometheus::IntGaugeVec,
    /// Sequences that got extra skipped sublayers in decode.
    pub extras_sequences: IntCounter,
}

impl EngineStats {
    /// Registers everything with `registry`; fails when a name is taken.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, label: &str| -> prometheus::Result<IntCounterVec> {
            let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let histogram =
            |name: &str, help: &str, buckets: &[f64]| -> prometheus::Result<Histogram> {
                let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
                let metric = Histogram::with_opts(options)?;
                registry.register(Box::new(metric.clone()))?;
                Ok(metric)
            };
        let skipped_sublayers = prometheus::IntGaugeVec::new(
            Opts::new("adaskip_sublayers", "Sublayers skipped by AdaSkip, by phase."),
            &["phase"],
        )?;
        registry.register(Box::new(skipped_sublayers.clone()))?;
        Ok(Self {
            requests_running: gauge("num_requests_running", "Sequences that take part in steps.")?,
            requests_waiting: gauge("num_requests_waiting", "Sequences in the queue.")?,
            blocks_used: gauge(
                "device_blocks_used",
                "Device blocks held by sequences and copies.",
            )?,
            blocks: gauge("device_blocks", "Device blocks of the pool.")?,
            cache_query_tokens: counter(
                "cache_query_tokens_total",
                "Prompt tokens, counted when the KV of their prompt is complete: the sum of hits and misses.",
            )?,
            cache_hit_tokens: counters(
                "cache_hit_tokens_total",
                "Prompt tokens whose KV was found, by the tier that held it.",
                "tier",
            )?,
            cache_miss_tokens: counters(
                "cache_miss_tokens_total",
                "Prompt tokens that had to be computed, by reason.",
                "reason",
            )?,
            generated_tokens: counter("engine_generated_tokens_total", "Tokens sampled.")?,
            recomputed_tokens: counter(
                "recomputed_tokens_total",
                "Tokens computed again after a preemption or a failed load.",
            )?,
            preemptions: counter("num_preemptions_total", "Sequences put back into the queue.")?,
            cancelled: counter("requests_cancelled_total", "Sequences whose client went away.")?,
            loads: counters("cache_loads_total", "Loads of histories, by outcome.", "outcome")?,
            saves: counters("cache_saves_total", "Saves of blocks, by outcome.", "outcome")?,
            anticipations: counters(
                "anticipations_total",
                "Turns foretold by their clients: told, and of those came, expired, gave_way.",
                "outcome",
            )?,
            truncated: counters(
                "truncated_turns_total",
                "Turns of truncated conversations: found what was kept, or computed it anew.",
                "outcome",
            )?,
            cache_attached: gauge("cache_attached", "1 while a cache daemon is attached.")?,
            queue_seconds: histogram(
                "request_queue_time_seconds",
                "Time from arrival to admission.",
                QUEUE_SECONDS,
            )?,
            step_seconds: histogram("step_seconds", "Compute time of a step.", STEP_SECONDS)?,
            load_wait_seconds: histogram(
                "step_load_wait_seconds",
                "Time in a step that layers stood waiting for loads.",
                STEP_SECONDS,
            )?,
            step_tokens: histogram("iteration_tokens_total", "Tokens of a step.", STEP_TOKENS)?,
            skipped_sublayers,
            extras_sequences: counter(
                "adaskip_extras_sequences_total",
                "Sequences that skip further FFNs in decode.",
            )?,
        })
    }

    /// The KV of a prompt is complete.
    pub fn count_prompt(&self, account: &Account) {
        self.cache_query_tokens.inc_by(account.total().into());
        for (tier, tokens) in account.cached.by_tier() {
            self.cache_hit_tokens.with_label_values(&[tier]).inc_by(tokens.into());
        }
        for (reason, tokens) in account.misses() {
            self.cache_miss_tokens.with_label_values(&[reason.label()]).inc_by(tokens.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_engines_cannot_share_a_registry() {
        let registry = Registry::new();
        assert!(EngineStats::new(&registry).is_ok());
        assert!(EngineStats::new(&registry).is_err());
    }
}

//! What the outside of the runtime counts; names follow vLLM's, under the registry's prefix
//! `colloquy_runtime_` and its label `model_name`. The engine adds its own to the same registry.

use std::collections::HashMap;
use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use tokio::time::Instant;

use super::conversations::Divergence;
use crate::request::FinishReason;

/// From a cached turn on a GPU to a long cold prompt on a few cores.
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];
/// From one decode step of a small batch to one that shares its step with a long prefill.
const INTER_TOKEN_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Whole requests.
const REQUEST_SECONDS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// Tokens of prompts and replies.
const TOKENS: &[f64] = &[
    1.0, 8.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    131_072.0,
];

/// Counters and histograms of http.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    answers: IntCounterVec,
    finished: IntCounterVec,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    request_seconds: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    diverged: IntCounterVec,
    truncated: IntCounter,
    retokenised: IntCounter,
    conversations: IntGauge,
}

/// A registry whose metrics are named `colloquy_runtime_…` and labelled with the model.
pub fn registry(model_name: &str) -> prometheus::Result<Registry> {
    let labels = HashMap::from([("model_name".to_owned(), model_name.to_owned())]);
    Registry::new_custom(Some("colloquy_runtime".to_owned()), Some(labels))
}

impl Metrics {
    /// Registers everything; fails when a name is taken.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            prometheus::Result::Ok(metric)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let metric =
                Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(metric.clone()))?;
            prometheus::Result::Ok(metric)
        };
        let conversations = IntGauge::new("conversations", "Conversations on record.")?;
        registry.register(Box::new(conversations.clone()))?;
        Ok(Self {
            registry: registry.clone(),
            conversations,
            answers: counters(
                "http_requests_total",
                "Answers by route and status; of a stream, the status it began with.",
                &["route", "status"],
            )?,
            finished: counters(
                "request_success_total",
                "Generations by how they ended: stop, length, abort (the client left), error.",
                &["finished_reason"],
            )?,
            prompt_tokens: counter("prompt_tokens_total", "Tokens of prompts.")?,
            generation_tokens: counter("generation_tokens_total", "Tokens of replies.")?,
            first_token_seconds: histogram(
                "time_to_first_token_seconds",
                "From the request's arrival to the first token of its reply.",
                FIRST_TOKEN_SECONDS,
            )?,
            inter_token_seconds: histogram(
                "inter_token_latency_seconds",
                "From one token of a reply to the next.",
                INTER_TOKEN_SECONDS,
            )?,
            request_seconds: histogram(
                "e2e_request_latency_seconds",
                "From the request's arrival to the end of its reply.",
                REQUEST_SECONDS,
            )?,
            request_prompt_tokens: histogram("request_prompt_tokens", "Tokens a prompt.", TOKENS)?,
            request_generation_tokens: histogram(
                "request_generation_tokens",
                "Tokens a reply.",
                TOKENS,
            )?,
            truncated: counter(
                "history_truncations_total",
                "Turns whose history lost its earliest half to fit the context.",
            )?,
            diverged: counters(
                "turns_diverged_total",
                "Turns of a named conversation that could not go on from its record, by reason.",
                &["reason"],
            )?,
            retokenised: counter(
                "reply_tokens_retokenised_total",
                "Tokens of earlier replies that were made from text, not taken from a record.",
            )?,
        })
    }

    /// All metrics of the registry, in Prometheus' text form.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be written");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// An answer began.
    pub fn answered(&self, route: &str, status: u16) {
        self.answers.with_label_values(&[route, &status.to_string()]).inc();
    }

    /// A history was cut to fit.
    pub fn truncated(&self) {
        self.truncated.inc();
    }

    /// A turn left its conversation's record.
    pub fn diverged(&self, reason: Divergence) {
        self.diverged.with_label_values(&[reason.label()]).inc();
    }

    /// Tokens of replies were made from text.
    pub fn retokenised(&self, tokens: usize) {
        self.retokenised.inc_by(tokens as u64);
    }

    /// Conversations on record.
    pub fn conversations(&self, count: usize) {
        self.conversations.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

/// Watches one generation; counts it as aborted when it is dropped before its end.
#[derive(Debug)]
pub struct Watch {
    metrics: Metrics,
    arrived: Instant,
    token_last: Option<Instant>,
    tokens: u64,
    ended: bool,
}

impl Watch {
    /// A request that arrived at `arrived` is handed to the engine.
    pub fn new(metrics: &Metrics, arrived: Instant, prompt_tokens: usize) -> Self {
        metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        metrics.request_prompt_tokens.observe(prompt_tokens as f64);
        Self { metrics: metrics.clone(), arrived, token_last: None, tokens: 0, ended: false }
    }

    /// A token of the reply came.
    pub fn token(&mut self) {
        let now = Instant::now();
        let seconds = |since: Instant| Duration::as_secs_f64(&now.duration_since(since));
        match self.token_last.replace(now) {
            None => self.metrics.first_token_seconds.observe(seconds(self.arrived)),
            Some(last) => self.metrics.inter_token_seconds.observe(seconds(last)),
        }
        self.tokens += 1;
        self.metrics.generation_tokens.inc();
    }

    /// The reply is whole.
    pub fn finished(&mut self, reason: FinishReason) {
        self.end(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
    }

    /// The engine gave up.
    pub fn failed(&mut self) {
        self.end("error");
    }

    fn end(&mut self, how: &str) {
        self.ended = true;
        self.metrics.finished.with_label_values(&[how]).inc();
        self.metrics.request_seconds.observe(self.arrived.elapsed().as_secs_f64());
        self.metrics.request_generation_tokens.observe(self.tokens as f64);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_is_dropped_counts_as_aborted() {
        let registry = registry("tiny").unwrap();
        let metrics = Metrics::new(&registry).unwrap();
        drop(Watch::new(&metrics, Instant::now(), 3));
        let text = metrics.text();
        let line = "colloquy_runtime_request_success_total{finished_reason=\"abort\",model_name=\"tiny\"} 1";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn http_and_engine_share_a_registry() {
        let registry = registry("tiny").unwrap();
        assert!(Metrics::new(&registry).is_ok());
        assert!(crate::engine::stats::EngineStats::new(&registry).is_ok());
    }
}

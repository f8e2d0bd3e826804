//! Metrics, health and logs of the operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::error::Class;
use crate::observe::Kind;
use crate::plan::Change;

/// Prefix of all metrics.
const PREFIX: &str = "colloquy_operator";

/// What the operator counts.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Time of one reconciliation.
    pub reconcile_seconds: Histogram,
    /// 1 while this process holds the lease.
    pub leader: IntGauge,
    /// Models that the operator knows.
    pub models: IntGauge,
    changes: IntCounterVec,
    errors: IntCounterVec,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics on a registry of their own.
    pub fn new() -> Self {
        let registry = Registry::new_custom(Some(PREFIX.into()), None).expect("a valid prefix");
        let metrics = Self {
            reconcile_seconds: Histogram::with_opts(
                HistogramOpts::new("reconcile_seconds", "Time of one reconciliation.")
                    .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0]),
            )
            .expect("valid options"),
            leader: IntGauge::new("leader", "1 while this process holds the lease.")
                .expect("valid options"),
            models: IntGauge::new("models", "ConversationModels that the operator knows.")
                .expect("valid options"),
            changes: IntCounterVec::new(
                Opts::new("changes_total", "Changes that were carried out, by kind."),
                &["change"],
            )
            .expect("valid options"),
            errors: IntCounterVec::new(
                Opts::new("errors_total", "Errors, by who can do something about them."),
                &["class"],
            )
            .expect("valid options"),
            registry,
        };
        let collectors: [Box<dyn prometheus::core::Collector>; 5] = [
            Box::new(metrics.reconcile_seconds.clone()),
            Box::new(metrics.leader.clone()),
            Box::new(metrics.models.clone()),
            Box::new(metrics.changes.clone()),
            Box::new(metrics.errors.clone()),
        ];
        for collector in collectors {
            metrics.registry.register(collector).expect("each name is registered once");
        }
        for class in [Class::Retry, Class::UserMustFix, Class::Bug] {
            metrics.errors.with_label_values(&[class_label(class)]); // Shown as 0 from the start.
        }
        metrics
    }

    /// Counts a change that was carried out.
    pub fn change(&self, change: &Change) {
        let label = match change {
            Change::AddFinalizer => "add_finalizer",
            Change::RemoveFinalizer => "remove_finalizer",
            Change::ApplyService(_) => "apply_service",
            Change::ApplyClaim(_) => "apply_volume",
            Change::CreatePod(_) => "create_pod",
            Change::Delete { kind: Kind::Pod, .. } => "delete_pod",
            Change::Delete { kind: Kind::Service, .. } => "delete_service",
            Change::Delete { kind: Kind::Claim, .. } => "delete_volume",
        };
        self.changes.with_label_values(&[label]).inc();
    }

    /// Counts an error.
    pub fn error(&self, class: Class) {
        self.errors.with_label_values(&[class_label(class)]).inc();
    }

    fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn class_label(class: Class) -> &'static str {
    match class {
        Class::Retry => "retry",
        Class::UserMustFix => "user_must_fix",
        Class::Bug => "bug",
    }
}

/// Whether the operator can work: it has reached the API server at least once. Leader or not does
/// not matter, or a rollout of two operators would never end.
#[derive(Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// From now on `/readyz` answers 200.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed); // A flag on its own: nothing is published by it.
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// `/metrics`, `/healthz` and `/readyz`.
pub fn router(metrics: Metrics, readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(ready).with_state(readiness))
        .route("/metrics", get(scrape).with_state(metrics))
}

async fn ready(State(readiness): State<Readiness>) -> (StatusCode, &'static str) {
    if readiness.get() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the API server was not reached yet\n")
    }
}

async fn scrape(State(metrics): State<Metrics>) -> Result<String, (StatusCode, String)> {
    metrics.text().map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_bears_the_operator_s_prefix() {
        let metrics = Metrics::new();
        metrics.change(&Change::AddFinalizer);
        let text = metrics.text().unwrap();
        assert!(text.contains("colloquy_operator_changes_total{change=\"add_finalizer\"} 1"));
        let named = text.lines().filter(|line| !line.starts_with('#'));
        assert!(named.clone().count() > 5);
        assert!(named.into_iter().all(|line| line.starts_with("colloquy_operator_")), "{text}");
    }
}

//! Leader election by a Lease: of several operators one works, the others stand by.
//!
//! Correctness does not hang on it (every change is guarded by a uid or a resource version, and two
//! operators would plan the same); it keeps two of them from telling every story twice.
//!
//! Clocks are never compared between machines: a standby measures by its own clock how long it has
//! seen the same record, and takes over when that is longer than the record's own duration.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout};

/// Name of the lease in the operator's namespace.
pub const LEASE_NAME: &str = "colloquy-operator";

/// How long a record holds when it is not renewed.
const DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long steps down.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// How often a leader renews and a standby looks.
const PERIOD: Duration = Duration::from_secs(3);
/// Longest wait for one answer, so that a hanging connection cannot outlive the deadline.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);
const _: () = assert!(RENEW_DEADLINE.as_secs() < DURATION.as_secs()); // Down before another is up.
const _: () = assert!(
    PERIOD.as_secs() + REQUEST_TIMEOUT.as_secs() < RENEW_DEADLINE.as_secs() // One failure is no loss.
);

/// What to do about the lease now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is none: make one.
    Create,
    /// It is nobody's, or its holder is silent: take it.
    Take,
    /// It is ours: renew it.
    Renew,
    /// Another holds it.
    Wait,
}

/// Decides from the lease as read, and for how long the same record has been seen.
fn step(lease: Option<&Lease>, me: &str, unchanged_for: Duration) -> Step {
    let Some(spec) = lease.map(|lease| lease.spec.clone().unwrap_or_default()) else {
        return Step::Create;
    };
    let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    match spec.holder_identity.as_deref() {
        None | Some("") => Step::Take,
        Some(holder) if holder == me => Step::Renew,
        Some(_) if unchanged_for >= duration.map_or(DURATION, Duration::from_secs) => Step::Take,
        Some(_) => Step::Wait,
    }
}

/// One candidate for the lease.
pub struct Elector {
    api: Api<Lease>,
    me: String,
    /// The record as last seen, and since when.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Elector {
    /// A candidate named `me`, which must be unique (the pod's name).
    pub fn new(client: Client, namespace: &str, me: String) -> Self {
        Self { api: Api::namespaced(client, namespace), me, seen: None }
    }

    /// Waits until this candidate leads.
    pub async fn acquire(&mut self) {
        loop {
            match self.round().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::info!(%error, "the lease cannot be had yet"),
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews until that has failed for too long, or another has taken the lease.
    pub async fn hold(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            sleep(PERIOD).await;
            match self.round().await {
                Ok(true) => renewed = Instant::now(),
                Ok(false) => return,
                Err(error) => tracing::warn!(%error, "the lease was not renewed"),
            }
        }
    }

    /// Gives the lease back, so that a standby need not wait for it to run out.
    pub async fn release(&self) {
        let Ok(Ok(Some(mut lease))) = timeout(REQUEST_TIMEOUT, self.api.get_opt(LEASE_NAME)).await
        else {
            return;
        };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&self.me) {
            return;
        }
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        let params = PostParams::default();
        let replaced = self.api.replace(LEASE_NAME, &params, &lease);
        if !matches!(timeout(REQUEST_TIMEOUT, replaced).await, Ok(Ok(_))) {
            tracing::info!("the lease was not given back; it runs out by itself");
        }
    }

    /// One look, one step. True when this candidate leads now.
    async fn round(&mut self) -> Result<bool, kube::Error> {
        match timeout(REQUEST_TIMEOUT, self.try_round()).await {
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() => Ok(false), // Another was faster.
            Ok(outcome) => outcome,
            Err(_) => Err(kube::Error::Service("no answer about the lease in time".into())),
        }
    }

    async fn try_round(&mut self) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(LEASE_NAME).await?;
        let unchanged_for = self.look(lease.as_ref());
        let step = step(lease.as_ref(), &self.me, unchanged_for);
        let mut lease = lease.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(LEASE_NAME.into()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_default();
        let now = MicroTime(Timestamp::now());
        match step {
            Step::Wait => return Ok(false),
            Step::Renew => {}
            Step::Create | Step::Take => {
                spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count + 1));
                spec.acquire_time = Some(now.clone());
                spec.holder_identity = Some(self.me.clone());
            }
        }
        spec.lease_duration_seconds = Some(DURATION.as_secs() as i32);
        spec.renew_time = Some(now);
        // Both calls fail with a conflict when another has been faster: create by the name, replace
        // by the resource version that was read.
        let params = PostParams::default();
        let written = match step {
            Step::Create => self.api.create(&params, &lease).await?,
            _ => self.api.replace(LEASE_NAME, &params, &lease).await?,
        };
        tracing::debug!(lease = %written.name_any(), ?step);
        Ok(true)
    }

    /// For how long the record has been the same, by our own clock.
    fn look(&mut self, lease: Option<&Lease>) -> Duration {
        let spec = lease.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        match &self.seen {
            Some((seen, since)) if *seen == spec => since.elapsed(),
            _ => {
                self.seen = Some((spec, Instant::now()));
                Duration::ZERO
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: Option<&str>) -> Lease {
        Lease {
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                lease_duration_seconds: Some(15),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        }
    }

    #[test]
    fn the_first_candidate_makes_the_lease() {
        assert_eq!(step(None, "a", Duration::ZERO), Step::Create);
    }

    #[test]
    fn a_lease_of_nobody_is_taken_at_once() {
        assert_eq!(step(Some(&held_by(None)), "a", Duration::ZERO), Step::Take);
        assert_eq!(step(Some(&held_by(Some(""))), "a", Duration::ZERO), Step::Take);
        assert_eq!(step(Some(&Lease::default()), "a", Duration::ZERO), Step::Take);
    }

    #[test]
    fn the_holder_renews_however_late_it_is() {
        assert_eq!(step(Some(&held_by(Some("a"))), "a", Duration::from_secs(99)), Step::Renew);
    }

    #[test]
    fn a_standby_takes_over_only_after_the_record_s_own_duration() {
        let lease = held_by(Some("b"));
        assert_eq!(step(Some(&lease), "a", Duration::from_secs(14)), Step::Wait);
        assert_eq!(step(Some(&lease), "a", Duration::from_secs(15)), Step::Take);
    }
}

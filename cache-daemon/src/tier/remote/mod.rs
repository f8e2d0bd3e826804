//! The remote tier: an object store that outlives the node, for drains and cold conversations.
//!
//! Nothing waits for it: the loop sends a [`Job`] that is refused when too many wait, and a store that fails
//! is not asked again for a while. What it has is a miss until it has arrived here, through the same checks as
//! an import from another daemon ([`crate::migrate::pull`]).

pub mod store;
mod url;

pub use store::{Offloaded, RemoteError, RemoteStore};
pub use url::{RemoteUrl, UrlError};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use kv_protocol::{BlockKey, ConversationId, RootKey};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::daemon::unix_ms;
use crate::migrate::pull::{Described, Puller, Report, Source, SourceError};

/// Jobs that may wait; more are refused.
const JOBS_MAX: usize = 256;
/// Records asked for at once.
const FETCHES_MAX: usize = 8;
/// How long a record may take. The runtime waits a quarter of that; the next turn finds it here.
const RECORD_MAX: Duration = Duration::from_secs(1);
/// Conversations offloaded at once when the daemon stops.
const OFFLOADS_MAX: usize = 2;
/// Deletions that are tried again and again while the store is down; more are given up.
const DELETES_MAX: usize = 4096;
/// First pause after a failure in which no record is asked for, doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// How long a deletion is tried, with the same pauses. After that the objects stay, and a metric says so.
pub const DELETE_MAX: Duration = Duration::from_hours(1);

/// Work for the remote tier.
#[derive(Debug)]
pub enum Job {
    /// Get a conversation that a runtime asks for, and then its blocks.
    Fetch(ConversationId),
    /// Delete a conversation's objects: those that its record there names and no record here does.
    Delete {
        /// Which.
        id: ConversationId,
        /// And these blocks, under that root, that are known to be nobody else's.
        known: Option<(RootKey, Vec<BlockKey>)>,
    },
    /// Offload these, the first first, as many as can be until then.
    Offload(Vec<ConversationId>, std::time::Instant),
}

/// The loop's end: never waits.
pub struct Remote {
    jobs: mpsc::Sender<Job>,
    health: Arc<Health>,
}

/// Whether the store answers.
#[derive(Debug, Default)]
struct Health {
    /// Unix milliseconds until which it is left alone.
    down_until_ms: AtomicU64,
    pause_ms: AtomicU64,
}

impl Health {
    fn failed(&self) {
        let [least, most] = [PAUSE_MIN, PAUSE_MAX].map(|pause| pause.as_millis() as u64);
        let pause_ms = (2 * self.pause_ms.load(Ordering::Relaxed)).clamp(least, most);
        self.pause_ms.store(pause_ms, Ordering::Relaxed);
        self.down_until_ms.store(unix_ms() + pause_ms, Ordering::Relaxed);
    }

    fn answered(&self) {
        self.pause_ms.store(0, Ordering::Relaxed);
        self.down_until_ms.store(0, Ordering::Relaxed);
    }
}

impl Remote {
    /// Starts the tier's tasks on `runtime`.
    pub fn spawn(runtime: &Handle, store: RemoteStore, puller: Puller) -> Self {
        let (jobs, waiting) = mpsc::channel(JOBS_MAX);
        let health = Arc::new(Health::default());
        let worker = Worker {
            store,
            puller,
            health: health.clone(),
            fetches: Arc::new(Semaphore::new(FETCHES_MAX)),
            deletes: Arc::new(Semaphore::new(DELETES_MAX)),
        };
        runtime.spawn(worker.run(waiting));
        Self { jobs, health }
    }

    /// Asks for a conversation; the loop hears of it, or that there is none. `false` if the store is not
    /// asked now.
    pub fn fetch(&self, id: ConversationId) -> bool {
        let is_up = unix_ms() >= self.health.down_until_ms.load(Ordering::Relaxed);
        is_up && self.send(Job::Fetch(id))
    }

    /// `false` if too many jobs wait.
    pub fn send(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

#[derive(Clone)]
struct Worker {
    store: RemoteStore,
    puller: Puller,
    health: Arc<Health>,
    fetches: Arc<Semaphore>,
    deletes: Arc<Semaphore>,
}

impl Worker {
    async fn run(self, mut waiting: mpsc::Receiver<Job>) {
        while let Some(job) = waiting.recv().await {
            match job {
                Job::Fetch(id) => {
                    let permit = self.fetches.clone().acquire_owned().await;
                    let worker = self.clone();
                    tokio::spawn(async move {
                        let described = worker.fetch(id).await;
                        drop(permit); // Imports have a bound of their own.
                        if let Some(described) = described {
                            worker.import(described).await;
                        }
                    });
                }
                Job::Delete { id, known } => match self.deletes.clone().try_acquire_owned() {
                    Ok(permit) => {
                        let worker = self.clone();
                        tokio::spawn(async move {
                            worker.delete(id, known).await;
                            drop(permit);
                        });
                    }
                    Err(_) => self.not_deleted(&id, "too many deletions wait"),
                },
                Job::Offload(ids, until) => {
                    tokio::spawn(self.clone().offload(ids, until));
                }
            }
        }
    }

    fn count(&self, what: &str) {
        self.puller.metrics.remote.with_label_values(&[what]).inc();
    }

    /// The record, kept here; the loop answers who asked for it.
    async fn fetch(&self, id: ConversationId) -> Option<Described> {
        let fetched = timeout(RECORD_MAX, self.store.describe(id)).await;
        let described = match fetched {
            Ok(Ok(described)) => {
                self.health.answered();
                let kept = self.puller.keep(id, &described).await;
                kept.map(|_| described).map_err(|error| error.to_string())
            }
            Ok(Err(SourceError::Unknown { .. })) => {
                self.health.answered();
                self.count("fetch_unknown");
                self.puller.state.not_fetched(id);
                return None;
            }
            Ok(Err(error)) => {
                self.health.failed();
                Err(error.to_string())
            }
            Err(_) => {
                self.health.failed();
                Err(format!("no record within {} s", RECORD_MAX.as_secs()))
            }
        };
        described
            .inspect_err(|error| {
                tracing::warn!(%id, %error, "nothing came from the remote tier");
                self.count("fetch_failed");
                self.puller.state.not_fetched(id);
            })
            .ok()
    }

    async fn import(&self, described: Described) {
        let id = described.manifest.conversation;
        let shown = watch::Sender::new(Report::default());
        match self.puller.blocks(&self.store, described, Report::default(), &shown).await {
            Ok(_) => self.count("fetched"),
            Err(error) => {
                tracing::warn!(%id, %error, "not all came from the remote tier");
                self.count("fetch_failed");
            }
        }
    }

    async fn delete(&self, id: ConversationId, known: Option<(RootKey, Vec<BlockKey>)>) {
        let begin = Instant::now();
        let mut pause = PAUSE_MIN;
        let state = &self.puller.state;
        while let Err(error) = self.store.delete_conversation(state, &id, known.as_ref()).await {
            if begin.elapsed() + pause > DELETE_MAX {
                return self.not_deleted(&id, &error.to_string());
            }
            tracing::warn!(%id, %error, "the remote tier's objects are not deleted yet");
            tokio::time::sleep(pause).await;
            pause = PAUSE_MAX.min(2 * pause);
        }
        self.count("deleted");
    }

    fn not_deleted(&self, id: &ConversationId, error: &str) {
        tracing::error!(%id, error, "the remote tier's objects of a deleted conversation stay");
        self.count("delete_failed");
    }

    async fn offload(self, ids: Vec<ConversationId>, until: std::time::Instant) {
        let state = &self.puller.state;
        let offloads = ids.into_iter().map(|id| self.offload_one(id));
        let all = futures::stream::iter(offloads).buffer_unordered(OFFLOADS_MAX);
        if timeout_at(until.into(), all.collect::<()>()).await.is_err() {
            tracing::warn!("the time to stop is over: not all conversations are offloaded");
        }
        state.offloaded();
    }

    async fn offload_one(&self, id: ConversationId) {
        match self.store.offload(&self.puller.state, id).await {
            Ok(_) => self.count("offloaded"),
            Err(error) => {
                tracing::warn!(%id, %error, "not offloaded");
                self.count("offload_failed");
            }
        }
    }
}

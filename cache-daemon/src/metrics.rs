//! Counters of the loop, and the snapshot that http shows. The loop writes, http reads; neither waits.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};
use serde::Serialize;

use crate::tier::host::FrameCounts;

/// Seconds that a promoted block waits for its lookup: from a queue that moves at once to a user who reads on.
const LEAD_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Seconds that a lookup waits for disk: one block of a fast drive to a long history of a slow one.
const STALL_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Seconds from a block's eviction to the lookup that wants it: a busy minute to a day's return.
const REGRET_SECONDS: &[f64] =
    &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 604_800.0];

/// What `/status` shows: the state after the loop's last turn.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Snapshot {
    /// Shape of the blocks, once a runtime has attached.
    pub geometry: Option<String>,
    /// Fingerprint of the model attached last, shortened.
    pub fingerprint: Option<String>,
    /// Formats of the region so far.
    pub format_epoch: u64,
    /// Starts of a worker on this region.
    pub worker_starts: u64,
    /// Bytes of the region.
    pub region_bytes: u64,
    /// Of those, faulted.
    pub faulted_bytes: u64,
    /// Frames by state.
    pub frames: FrameCounts,
    /// Blocks by tier; a block may be in both.
    pub blocks: BlockCounts,
    /// Runtimes attached.
    pub attachments: u32,
    /// Sequences waiting, by hints.
    pub sequences: u32,
    /// Conversation records known.
    pub conversations: u64,
    /// Deleted conversations that the disk has not erased yet.
    pub deletions: DeletionStatus,
    /// Policy in force.
    pub policy: String,
    /// How the disk tier is.
    pub disk: DiskStatus,
    /// Blocks promoted for a hint, before their turn.
    pub promotes_by_hint: u64,
    /// Blocks promoted for a lookup.
    pub promotes_by_lookup: u64,
    /// Blocks demoted from host.
    pub evictions_host: u64,
    /// Blocks dropped from disk.
    pub evictions_disk: u64,
    /// Blocks written to disk.
    pub writes: u64,
}

/// Blocks by tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BlockCounts {
    /// Known at all.
    pub known: u64,
    /// In frames.
    pub host: u64,
    /// On disk.
    pub disk: u64,
}

/// Deleted conversations that the disk has not erased yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DeletionStatus {
    /// How many.
    pub waiting: u64,
    /// When the oldest of them was deleted, Unix milliseconds.
    pub oldest_ms: Option<u64>,
}

/// How the disk tier is.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DiskStatus {
    /// `none`, `opening`, `ready` or `failed`.
    pub state: &'static str,
    /// Bytes of the blocks stored.
    pub stored_bytes: u64,
    /// Bytes of files.
    pub physical_bytes: u64,
    /// Allowed.
    pub bytes_max: u64,
    /// `slots`, `segments` or `blobdb`.
    pub engine: &'static str,
    /// Whether payloads pass the page cache by.
    pub direct_io: bool,
    /// Why the last write was not done; gone when one is.
    pub error: Option<String>,
}

/// All metrics of the daemon, prefixed `colloquy_cache_`.
pub struct Metrics {
    registry: Registry,
    snapshot: Mutex<(Snapshot, Instant)>,
    frames: IntGaugeVec,
    blocks: IntGaugeVec,
    attachments: IntGauge,
    sequences: IntGauge,
    conversations: IntGauge,
    deletions_waiting: IntGauge,
    worker_starts: IntGauge,
    region_bytes: IntGauge,
    disk_stored_bytes: IntGauge,
    disk_physical_bytes: IntGauge,
    disk_failed: IntGauge,
    disk_busy_seconds: CounterVec,
    storage_written_bytes: IntCounter,
    /// Hints received.
    pub hints: IntCounter,
    /// Lookups received.
    pub lookups: IntCounter,
    /// Tokens of whole blocks that lookups asked for.
    pub lookup_tokens: IntCounter,
    /// Of those: found, by tier.
    pub hit_tokens: IntCounterVec,
    /// Of those: not had, by reason.
    pub miss_tokens: IntCounterVec,
    /// Payload that went from one tier to another.
    pub moved_bytes: IntCounterVec,
    /// From a hint's promote to the lookup that found the block.
    pub prefetch_lead_seconds: Histogram,
    /// Payload that a hint brought and no lookup found.
    pub prefetch_wasted_bytes: IntCounter,
    /// Turns that hints foretold, by kind of hint and by what became of them.
    pub hinted_turns: IntCounterVec,
    /// How long lookups waited for disk.
    pub late_stall_seconds: Histogram,
    /// From a block's eviction to the lookup that missed it.
    pub evicted_then_wanted_seconds: Histogram,
    /// Lookups that ended before the end of their list, by reason.
    pub misses: IntCounterVec,
    /// Commits, by outcome.
    pub commits: IntCounterVec,
    /// Promotes, by cause.
    pub promotes: IntCounterVec,
    /// Promotes that failed, by reason.
    pub promote_failures: IntCounterVec,
    /// Blocks that left a tier to make room, by tier.
    pub evictions: IntCounterVec,
    /// Blocks that ran out of time.
    pub expirations: IntCounter,
    /// Blocks written to disk.
    pub writes: IntCounter,
    /// Blocks not written, by reason: no room that may be taken, the drive's budget, or a failure.
    pub writes_skipped: IntCounterVec,
    /// What was said of blocks and does not count, by why.
    pub retentions_refused: IntCounterVec,
    /// Failed calls of the disk tier.
    pub disk_errors: IntCounter,
    /// Corrupt things found, by where.
    pub corrupt: IntCounterVec,
    /// Exports to other daemons, by end.
    pub exports: IntCounterVec,
    /// Blocks sent in exports that came to their end.
    pub exported_blocks: IntCounter,
    /// Bytes handed to connections of exports.
    pub exported_bytes: IntCounter,
    /// Imports, by end.
    pub imports: IntCounterVec,
    /// Blocks that arrived in imports and are kept.
    pub imported_blocks: IntCounter,
    /// Their bytes.
    pub imported_bytes: IntCounter,
    /// What the remote tier did, by end.
    pub remote: IntCounterVec,
    /// Attachments made.
    pub attaches: IntCounter,
    /// Attachments refused, by reason.
    pub refusals: IntCounterVec,
    /// Attachments ended because the peer wrote nonsense.
    pub protocol_errors: IntCounter,
}

/// Makes metrics and registers them.
struct Registrar<'a>(&'a Registry);

impl Registrar<'_> {
    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.by(name, help, &[label])
    }

    fn by(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn seconds(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<CounterVec, prometheus::Error> {
        self.register(CounterVec::new(Opts::new(name, help), &[label])?)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(options)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(name, help)?)
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<IntGaugeVec, prometheus::Error> {
        self.register(IntGaugeVec::new(Opts::new(name, help), &[label])?)
    }
}

impl Metrics {
    /// Registers everything.
    #[expect(clippy::too_many_lines, reason = "a list: some lines for each metric")]
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new_custom(Some("colloquy_cache".into()), None)?;
        let new = Registrar(&registry);
        let metrics = Self {
            snapshot: Mutex::new((Snapshot::default(), Instant::now())),
            frames: new.gauges("frames", "Frames of the region, by state.", "state")?,
            blocks: new.gauges("blocks", "Blocks known, by tier.", "tier")?,
            attachments: new.gauge("attachments", "Runtimes attached.")?,
            sequences: new.gauge("sequences", "Turns that wait or run, as hints and lookups tell.")?,
            deletions_waiting: new
                .gauge("deletions_waiting", "Deleted conversations whose bytes are still to be erased.")?,
            conversations: new.gauge("conversations", "Conversation records known.")?,
            worker_starts: new.gauge("worker_starts", "Starts of a worker on this region.")?,
            region_bytes: new.gauge("region_bytes", "Bytes of the shared region.")?,
            disk_stored_bytes: new.gauge("disk_stored_bytes", "Bytes of the blocks on disk.")?,
            disk_physical_bytes: new.gauge("disk_physical_bytes", "Bytes of the disk tier's files.")?,
            disk_failed: new.gauge("disk_failed", "1 while the disk tier takes no writes.")?,
            disk_busy_seconds: new.seconds(
                "disk_busy_seconds_total",
                "Time in which a disk job ran, by kind of job.",
                "job",
            )?,
            storage_written_bytes: new.counter(
                "storage_written_bytes_total",
                "Bytes that this process had written to storage devices, index and logs included.",
            )?,
            hints: new.counter("hints_total", "Hints received.")?,
            lookups: new.counter("lookups_total", "Lookups received.")?,
            lookup_tokens: new.counter(
                "lookup_tokens_total",
                "Tokens of the whole blocks that lookups asked for: the sum of hits, misses and what is on its way.",
            )?,
            hit_tokens: new.counters("hit_tokens_total", "Tokens found, by the tier that held them.", "tier")?,
            miss_tokens: new.counters("miss_tokens_total", "Tokens not had, by reason.", "reason")?,
            moved_bytes: new.by(
                "moved_bytes_total",
                "Payload that went from one tier to another.",
                &["from", "to"],
            )?,
            prefetch_lead_seconds: new.histogram(
                "prefetch_lead_seconds",
                "From the end of a hint's promote to the lookup that found the block.",
                LEAD_SECONDS,
            )?,
            prefetch_wasted_bytes: new.counter(
                "prefetch_wasted_bytes_total",
                "Payload that hints brought from disk and that left host memory unread.",
            )?,
            hinted_turns: new.by(
                "hinted_turns_total",
                "Turns that hints foretold, by kind of hint, that came or left.",
                &["kind", "outcome"],
            )?,
            late_stall_seconds: new.histogram(
                "late_stall_seconds",
                "How long lookups waited for blocks on disk.",
                STALL_SECONDS,
            )?,
            evicted_then_wanted_seconds: new.histogram(
                "evicted_then_wanted_seconds",
                "From a block's eviction to the lookup that missed it.",
                REGRET_SECONDS,
            )?,
            misses: new.counters("misses_total", "Lookups that ended early, by reason.", "reason")?,
            commits: new.counters("commits_total", "Blocks committed, by outcome.", "outcome")?,
            promotes: new.counters("promotes_total", "Blocks promoted, by cause.", "cause")?,
            promote_failures: new.counters(
                "promote_failures_total",
                "Blocks that did not arrive from disk, by reason.",
                "reason",
            )?,
            evictions: new.counters("evictions_total", "Blocks that made room, by tier.", "tier")?,
            expirations: new.counter("expirations_total", "Blocks whose time ran out.")?,
            writes: new.counter("disk_writes_total", "Blocks written to disk.")?,
            writes_skipped: new.counters(
                "disk_writes_skipped_total",
                "Blocks not written to disk, by reason.",
                "reason",
            )?,
            retentions_refused: new.counters(
                "retentions_refused_total",
                "Pins and times to live of blocks over their bound.",
                "what",
            )?,
            disk_errors: new.counter("disk_errors_total", "Failed calls of the disk tier.")?,
            corrupt: new.counters("corrupt_total", "Corrupt things found, by where.", "where")?,
            exports: new.counters("exports_total", "Answers to other daemons, by end.", "end")?,
            exported_blocks: new.counter("exported_blocks_total", "Blocks sent to other daemons.")?,
            exported_bytes: new.counter("exported_bytes_total", "Bytes sent to other daemons.")?,
            imports: new.counters("imports_total", "Conversations imported, by end.", "end")?,
            imported_blocks: new.counter("imported_blocks_total", "Blocks imported and kept.")?,
            imported_bytes: new.counter("imported_bytes_total", "Bytes of blocks imported.")?,
            remote: new.counters("remote_total", "Conversations of the remote tier.", "end")?,
            attaches: new.counter("attaches_total", "Attachments made.")?,
            refusals: new.counters("attach_refusals_total", "Attachments refused.", "reason")?,
            protocol_errors: new.counter(
                "protocol_errors_total",
                "Attachments ended because the peer wrote nonsense.",
            )?,
            registry: registry.clone(),
        };
        Ok(Arc::new(metrics))
    }

    /// After each turn of the loop.
    pub fn publish(&self, snapshot: Snapshot) {
        let set = |gauges: &IntGaugeVec, label: &str, value: u64| {
            let gauge: IntGauge = gauges.with_label_values(&[label]);
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.frames, "free", snapshot.frames.free.into());
        set(&self.frames, "filling", snapshot.frames.filling.into());
        set(&self.frames, "ready", snapshot.frames.ready.into());
        set(&self.frames, "pinned", snapshot.frames.pinned.into());
        set(&self.blocks, "host", snapshot.blocks.host);
        set(&self.blocks, "disk", snapshot.blocks.disk);
        for (gauge, value) in [
            (&self.attachments, snapshot.attachments.into()),
            (&self.sequences, snapshot.sequences.into()),
            (&self.conversations, snapshot.conversations),
            (&self.deletions_waiting, snapshot.deletions.waiting),
            (&self.worker_starts, snapshot.worker_starts),
            (&self.region_bytes, snapshot.region_bytes),
            (&self.disk_stored_bytes, snapshot.disk.stored_bytes),
            (&self.disk_physical_bytes, snapshot.disk.physical_bytes),
            (&self.disk_failed, u64::from(snapshot.disk.state == "failed")),
        ] {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = (snapshot, Instant::now());
    }

    /// The last snapshot, and when it was taken.
    pub fn snapshot(&self) -> (Snapshot, Instant) {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long the disk's threads have been at work.
    pub fn disk_busy(&self, reading: Duration, writing: Duration) {
        for (job, total) in [("read", reading), ("write", writing)] {
            raise(&self.disk_busy_seconds.with_label_values(&[job]), total.as_secs_f64());
        }
    }

    /// Prometheus text.
    pub fn text(&self) -> String {
        if let Some(bytes) = storage_written_bytes() {
            let new = bytes.saturating_sub(self.storage_written_bytes.get());
            self.storage_written_bytes.inc_by(new);
        }
        let families = self.registry.gather();
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// A counter that follows a total kept elsewhere.
fn raise(counter: &Counter, total: f64) {
    counter.inc_by((total - counter.get()).max(0.0));
}

/// What the kernel says that this process had written to devices; `None` where it does not say.
fn storage_written_bytes() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

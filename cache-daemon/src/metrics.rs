//! Counters of the loop, and the snapshot that http shows. The loop writes, http reads; neither waits.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use serde::Serialize;

use crate::tier::host::FrameCounts;

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
    gauges: IntGaugeVec,
    /// Hints received.
    pub hints: IntCounter,
    /// Lookups received.
    pub lookups: IntCounter,
    /// Blocks found, by tier.
    pub found: IntCounterVec,
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

impl Metrics {
    /// Registers everything.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new_custom(Some("colloquy_cache".into()), None)?;
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let gauges = |name: &str, help: &str, label: &str| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let metrics = Self {
            snapshot: Mutex::new((Snapshot::default(), Instant::now())),
            frames: gauges("frames", "Frames of the region, by state.", "state")?,
            blocks: gauges("blocks", "Blocks known, by tier.", "tier")?,
            gauges: gauges("state", "Sizes of the daemon's state, by what.", "what")?,
            hints: counter("hints_total", "Hints received.")?,
            lookups: counter("lookups_total", "Lookups received.")?,
            found: counters("found_blocks_total", "Blocks found by lookups, by tier.", "tier")?,
            misses: counters("misses_total", "Lookups that ended early, by reason.", "reason")?,
            commits: counters("commits_total", "Blocks committed, by outcome.", "outcome")?,
            promotes: counters("promotes_total", "Blocks promoted, by cause.", "cause")?,
            promote_failures: counters(
                "promote_failures_total",
                "Blocks that did not arrive from disk, by reason.",
                "reason",
            )?,
            evictions: counters("evictions_total", "Blocks that made room, by tier.", "tier")?,
            expirations: counter("expirations_total", "Blocks whose time ran out.")?,
            writes: counter("disk_writes_total", "Blocks written to disk.")?,
            writes_skipped: counters(
                "disk_writes_skipped_total",
                "Blocks not written to disk, by reason.",
                "reason",
            )?,
            retentions_refused: counters(
                "retentions_refused_total",
                "Pins and times to live of blocks over their bound.",
                "what",
            )?,
            disk_errors: counter("disk_errors_total", "Failed calls of the disk tier.")?,
            corrupt: counters("corrupt_total", "Corrupt things found, by where.", "where")?,
            exports: counters("exports_total", "Answers to other daemons, by end.", "end")?,
            exported_blocks: counter("exported_blocks_total", "Blocks sent to other daemons.")?,
            exported_bytes: counter("exported_bytes_total", "Bytes sent to other daemons.")?,
            imports: counters("imports_total", "Conversations imported, by end.", "end")?,
            imported_blocks: counter("imported_blocks_total", "Blocks imported and kept.")?,
            imported_bytes: counter("imported_bytes_total", "Bytes of blocks imported.")?,
            remote: counters("remote_total", "Conversations of the remote tier.", "end")?,
            attaches: counter("attaches_total", "Attachments made.")?,
            refusals: counters("attach_refusals_total", "Attachments refused.", "reason")?,
            protocol_errors: counter(
                "protocol_errors_total",
                "Attachments ended because the peer wrote nonsense.",
            )?,
            registry,
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
        set(&self.gauges, "attachments", snapshot.attachments.into());
        set(&self.gauges, "sequences", snapshot.sequences.into());
        set(&self.gauges, "conversations", snapshot.conversations);
        set(&self.gauges, "deletions_waiting", snapshot.deletions.waiting);
        set(&self.gauges, "worker_starts", snapshot.worker_starts);
        set(&self.gauges, "region_bytes", snapshot.region_bytes);
        set(&self.gauges, "disk_stored_bytes", snapshot.disk.stored_bytes);
        set(&self.gauges, "disk_physical_bytes", snapshot.disk.physical_bytes);
        set(&self.gauges, "disk_failed", u64::from(snapshot.disk.state == "failed"));
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = (snapshot, Instant::now());
    }

    /// The last snapshot, and when it was taken.
    pub fn snapshot(&self) -> (Snapshot, Instant) {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Prometheus text.
    pub fn text(&self) -> String {
        let families = self.registry.gather();
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

//! What a trace is replayed under, and what came of it.

use serde::Serialize;

use crate::policy::PolicyKind;
use crate::store::TenantShare;

/// Who chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// The daemon's default.
    #[default]
    LookAhead,
    /// Least recently used first.
    Lru,
    /// First come, first out.
    Fifo,
    /// Small queue, main queue, ghosts.
    #[value(name = "s3-fifo")]
    S3Fifo,
    /// Farthest next use first: look-ahead whose queue holds the future. Only a simulator has it.
    Belady,
}

impl Contender {
    pub(super) fn policy(self) -> PolicyKind {
        match self {
            Contender::LookAhead | Contender::Belady => PolicyKind::LookAhead,
            Contender::Lru => PolicyKind::Lru,
            Contender::Fifo => PolicyKind::Fifo,
            Contender::S3Fifo => PolicyKind::S3Fifo,
        }
    }
}

/// What goes wrong meanwhile, at times drawn from a seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Faults {
    /// Of the times.
    pub seed: u64,
    /// Runtimes; a conversation stays with one.
    pub peers: u32,
    /// Mean seconds between two deaths of a runtime; each is started again at once.
    pub peer_dies_every_s: f64,
    /// Mean seconds from one failure of the disk to the next.
    pub disk_fails_every_s: f64,
    /// Seconds until it works again.
    pub disk_fails_for_s: f64,
}

/// What is replayed under.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Settings {
    /// Who chooses.
    pub policy: Contender,
    /// Of the host tier.
    pub host_bytes: u64,
    /// Of the disk tier; 0 is none.
    pub disk_bytes: u64,
    /// Bytes a second, reads and writes together.
    pub disk_bytes_per_s: f64,
    /// KV of a token.
    pub token_bytes: u64,
    /// Clients say this long before they ask that they will; 0 is never.
    pub anticipate_us: u64,
    /// Conversations' next turns are foretold by their pauses.
    pub think_time: bool,
    /// Started turns that are not counted.
    pub warm_up_turns: usize,
    /// What a tenant may have of each tier before its own blocks leave first.
    pub tenant_share: TenantShare,
    /// Bytes that may be written to disk in a day; `None` is no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_day: Option<u64>,
    /// What goes wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faults: Option<Faults>,
}

/// Turns that found their history. Turns with history whose blocks are all there are hits; a hit is from host
/// if all of its blocks were in frames when it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
    /// Measured turns.
    pub turns: u64,
    /// Of those, with any history.
    pub turns_with_history: u64,
    /// Whole history in host memory.
    pub turns_host: u64,
    /// Whole history in host memory or on disk, some of it on disk.
    pub turns_disk: u64,
    /// Tokens of history.
    pub tokens: u64,
    /// Of those, in host memory.
    pub tokens_host: u64,
    /// Of those, on disk.
    pub tokens_disk: u64,
}

/// What came of a replay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// What the turns found.
    #[serde(flatten)]
    pub hits: Hits,
    /// Blocks of new KV that came into frames.
    pub commits: u64,
    /// Blocks of new KV for which there was no frame.
    pub commits_refused: u64,
    /// Blocks read from disk because of a hint.
    pub promotes_by_hint: u64,
    /// Blocks read from disk because a turn had started without them.
    pub promotes_by_lookup: u64,
    /// Blocks written to disk.
    pub writes: u64,
    /// Blocks not written because the drive has to last.
    pub writes_spared: u64,
    /// Reads and writes that failed.
    pub disk_errors: u64,
    /// Blocks that left host memory.
    pub evictions_host: u64,
    /// Blocks that left the disk.
    pub evictions_disk: u64,
    /// Turns that ended with their runtime.
    pub turns_died: u64,
    /// Events of the virtual clock.
    pub events: u64,
    /// Its last.
    pub ended_ms: u64,
}

impl Hits {
    /// Hits, of all measured turns, in percent.
    pub fn hit_rate(&self) -> f64 {
        percent(self.turns_host + self.turns_disk, self.turns)
    }

    /// Hits if nothing were ever dropped, in percent.
    pub fn ceiling(&self) -> f64 {
        percent(self.turns_with_history, self.turns)
    }

    /// Of the hits, those from host memory, in percent.
    pub fn host_share(&self) -> f64 {
        percent(self.turns_host, self.turns_host + self.turns_disk)
    }

    /// Tokens of history that were there, of all tokens of history, in percent.
    pub fn token_hit_rate(&self) -> f64 {
        percent(self.tokens_host + self.tokens_disk, self.tokens)
    }
}

impl std::ops::Deref for Outcome {
    type Target = Hits;

    fn deref(&self) -> &Hits {
        &self.hits
    }
}

impl Outcome {
    /// Bytes written in a day at the pace of this trace, of blocks of this size.
    pub fn write_bytes_per_day(&self, block_bytes: u64) -> u64 {
        let bytes = u128::from(self.writes * block_bytes) * 86_400_000;
        u64::try_from(bytes / u128::from(self.ended_ms.max(1))).unwrap_or(u64::MAX)
    }

    /// Blocks written to disk for each block of new KV.
    pub fn disk_blocks_per_new_block(&self) -> f64 {
        percent(self.writes, self.commits) / 100.0
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

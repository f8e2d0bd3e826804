//! Which block to move next: pure functions over a [`View`], no clock, no I/O.
//!
//! [`lookahead`] is CachedAttention's (ATC'24, sections 3.3.1 and 3.3.2); [`lru`] and [`fifo`] are there to compare
//! with: they see no queue, and promote only what a lookup asks for.

pub mod fifo;
pub mod lookahead;
pub mod lru;

use kv_protocol::BlockKey;

/// A block in a host frame that nobody holds: a candidate to be demoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Name.
    pub key: BlockKey,
    /// Last commit, lookup or promote; Unix milliseconds.
    pub used_ms: u64,
    /// Order in which blocks came into the host tier.
    pub arrival: u64,
    /// Blocks before it in its chain. Later blocks go first: a chain is useful up to its first gap.
    pub depth: u32,
    /// Place of the first queued turn that will read it.
    pub turn: Option<u32>,
}

/// A waiting turn, as the daemon knows it from hints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedTurn {
    /// 0 starts next.
    pub place: u32,
    /// Known blocks of its history.
    pub blocks: u32,
    /// Those of them that are on disk only, in token order.
    pub on_disk: Vec<BlockKey>,
}

/// What a policy sees. Blocks are all of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// Candidates to be demoted.
    pub residents: Vec<Resident>,
    /// Waiting turns, by place.
    pub turns: Vec<QueuedTurn>,
    /// Blocks that the host tier holds when full.
    pub host_blocks: u64,
    /// Blocks that the disk tier holds when full.
    pub disk_blocks: u64,
}

/// A block to bring from disk, for which turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promote {
    /// Name.
    pub key: BlockKey,
    /// Place of the turn.
    pub place: u32,
}

/// Names of the policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum PolicyKind {
    /// By what the queue says.
    #[default]
    LookAhead,
    /// Least recently used first.
    Lru,
    /// First come, first out.
    Fifo,
}

impl PolicyKind {
    /// What to bring from disk before it is asked for, most urgent first.
    pub fn promote(self, view: &View) -> Vec<Promote> {
        match self {
            PolicyKind::LookAhead => lookahead::promote(view),
            PolicyKind::Lru | PolicyKind::Fifo => Vec::new(),
        }
    }

    /// Which residents to demote, first to go first; at most `need`.
    pub fn evict(self, view: &View, need: usize) -> Vec<BlockKey> {
        match self {
            PolicyKind::LookAhead => lookahead::evict(view, need),
            PolicyKind::Lru => lru::evict(view, need),
            PolicyKind::Fifo => fifo::evict(view, need),
        }
    }
}

/// Keys of the first `need` residents in the order that `rank` gives.
fn first_by<R: Ord>(view: &View, need: usize, rank: impl Fn(&Resident) -> R) -> Vec<BlockKey> {
    let mut residents: Vec<&Resident> = view.residents.iter().collect();
    residents.sort_by_key(|resident| rank(resident));
    residents.iter().take(need).map(|resident| resident.key).collect()
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;

    pub(crate) fn key(number: u8) -> BlockKey {
        BlockKey([number; 32])
    }

    pub(crate) fn resident(number: u8, used_ms: u64, turn: Option<u32>) -> Resident {
        Resident { key: key(number), used_ms, arrival: number.into(), depth: 0, turn }
    }

    pub(crate) fn turn(place: u32, blocks: u32, on_disk: &[u8]) -> QueuedTurn {
        QueuedTurn { place, blocks, on_disk: on_disk.iter().map(|&n| key(n)).collect() }
    }
}

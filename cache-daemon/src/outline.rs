//! What the loop knows of a conversation without its record at hand: enough to list it, to say what is
//! where, why its last turn did not go on from the one before, and what a deletion concerns. Pure data.
//!
//! Blocks are named by the first eight bytes of their keys: a tenth of what a record takes. Whoever acts
//! on a block found by such a name compares the root as well.

use kv_protocol::record::{FORMER_MAX, Record};
use kv_protocol::start::{Shared, Start};
use kv_protocol::{BlockKey, RootKey};

/// Ids shown before a divergence, and behind it on either side.
const SHOWN_BEFORE: usize = 8;
const SHOWN_AFTER: usize = 16;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Model and tenant.
    pub root: RootKey,
    /// What it shares with every tenant.
    pub shared: Option<Shared>,
    /// The client's own name.
    pub name: Box<str>,
    /// Of the kept history.
    pub tokens: u32,
    /// Taken out by truncations.
    pub dropped_tokens: u32,
    /// Of its geometry.
    pub tokens_per_block: u16,
    /// Milliseconds after the last use, if the record says.
    pub ttl_ms: Option<u64>,
    /// Unix milliseconds.
    pub pinned_until_ms: Option<u64>,
    /// Full blocks, in order.
    pub blocks: Box<[u64]>,
    /// What the block behind them follows: the last of them, the root, or an event.
    pub open: u64,
    /// Ids behind the full blocks.
    pub tail: Box<[u32]>,
    /// Blocks that are this conversation's and not of its history: that were before an edit or a truncation,
    /// or were stored behind its end by a turn that has not put its record. The newest last.
    pub former: Vec<u64>,
    /// Where its last turn did not go on from the one before.
    pub divergence: Option<Box<Divergence>>,
}

/// Why a turn's history was not the one before with more behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Other tokens from some place on: an edit, another reply, other settings of the template.
    Edited,
    /// The same tokens, fewer of them.
    Shortened,
    /// A truncation lies between the two.
    Truncated,
}

/// The first place where two histories of a conversation differ.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Divergence {
    /// When the later one was put, Unix milliseconds.
    pub at_ms: u64,
    /// What it is.
    pub reason: Reason,
    /// Tokens that both have; a multiple of a block's if the earlier ids were not in memory any more.
    pub shared_tokens: u32,
    /// Whether `shared_tokens` is exact, and the ids below are given.
    pub is_exact: bool,
    /// The last shared ids.
    pub shared: Vec<u32>,
    /// What the earlier history had next.
    pub before: Vec<u32>,
    /// What the later one has.
    pub after: Vec<u32>,
}

impl Outline {
    /// Of a record and its keys.
    pub fn of(record: &Record, keys: &[BlockKey]) -> Self {
        Self {
            root: record.root,
            shared: record.shared,
            name: record.name.as_str().into(),
            tokens: record.tokens.len() as u32,
            dropped_tokens: record.dropped_tokens,
            tokens_per_block: record.tokens_per_block,
            ttl_ms: record.ttl_ms,
            pinned_until_ms: record.pinned_until_ms,
            blocks: keys.iter().map(BlockKey::short).collect(),
            open: record.open_parent(keys).short(),
            tail: record.tail().into(),
            former: record.former.clone(),
            divergence: None,
        }
    }

    /// Under which root a full block is stored.
    pub fn root_of(&self, index: usize) -> RootKey {
        Start { shared: self.shared, ..self.root.into() }.root_of(index)
    }

    /// Full blocks that both have, from the start.
    pub fn blocks_shared(&self, other: &Self) -> usize {
        self.blocks.iter().zip(&other.blocks).take_while(|(ours, theirs)| ours == theirs).count()
    }

    /// Takes over, from the outline before, what a put replaces: blocks that the new history does not have
    /// become former ones, `tails` too, partial blocks that held the end of the old one.
    pub fn succeed(&mut self, before: &Self, tails: impl IntoIterator<Item = u64>) {
        let shared = self.blocks_shared(before);
        let lost = before.former.iter().chain(&before.blocks[shared..]).copied().chain(tails);
        for key in lost {
            self.add_former(key);
        }
    }

    /// A block of this conversation that is not of its history; `false` if it was known as its own.
    pub fn add_former(&mut self, key: u64) -> bool {
        if self.blocks.contains(&key) || self.former.contains(&key) {
            return false;
        }
        if self.former.len() == FORMER_MAX {
            self.former.remove(0);
        }
        self.former.push(key);
        true
    }

    /// Whether a partial block with these ids under `open` holds (a part of) this conversation's end, or goes
    /// on from it.
    pub fn is_tail(&self, tokens: &[u32]) -> bool {
        let shared =
            self.tail.iter().zip(tokens).take_while(|(ours, theirs)| ours == theirs).count();
        shared > 0 && shared == self.tail.len().min(tokens.len())
    }
}

/// Where `after` does not go on from `before`; `None` if it does. Without the record before, by its outline.
pub fn divergence(
    before: &Outline,
    record_before: Option<&Record>,
    after: &Record,
    after_outline: &Outline,
    at_ms: u64,
) -> Option<Divergence> {
    let tokens_before = record_before.map(|record| record.tokens.as_slice());
    let reason = |ends_early: bool| {
        if before.dropped_tokens != after.dropped_tokens {
            Reason::Truncated
        } else if ends_early {
            Reason::Shortened
        } else {
            Reason::Edited
        }
    };
    let Some(tokens_before) = tokens_before else {
        let blocks = before.blocks_shared(after_outline);
        let place = blocks * usize::from(before.tokens_per_block);
        let rest = after.tokens.get(place..).unwrap_or_default();
        let goes_on = blocks == before.blocks.len() && rest.starts_with(&before.tail);
        return (!goes_on).then(|| Divergence {
            at_ms,
            reason: reason(blocks == after_outline.blocks.len() && rest.is_empty()),
            shared_tokens: place as u32,
            is_exact: false,
            shared: Vec::new(),
            before: Vec::new(),
            after: Vec::new(),
        });
    };
    let same = tokens_before.iter().zip(&after.tokens).take_while(|(a, b)| a == b).count();
    if same == tokens_before.len() {
        return None;
    }
    let shown = |tokens: &[u32]| tokens[same..tokens.len().min(same + SHOWN_AFTER)].to_vec();
    Some(Divergence {
        at_ms,
        reason: reason(same == after.tokens.len()),
        shared_tokens: same as u32,
        is_exact: true,
        shared: after.tokens[same.saturating_sub(SHOWN_BEFORE)..same].to_vec(),
        before: shown(tokens_before),
        after: shown(&after.tokens),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::Fingerprint;

    fn record(tokens: &[u32]) -> Record {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        Record::new(root, "chat".into(), 4, tokens.to_vec())
    }

    fn outline(record: &Record) -> Outline {
        Outline::of(record, &record.keys())
    }

    fn compare(before: &Record, after: &Record) -> Option<Divergence> {
        divergence(&outline(before), Some(before), after, &outline(after), 7)
    }

    fn compare_outlines(before: &Record, after: &Record) -> Option<Divergence> {
        divergence(&outline(before), None, after, &outline(after), 7)
    }

    #[test]
    fn a_history_that_goes_on_does_not_diverge() {
        for (before, after) in [(0u32, 3), (3, 9), (8, 8), (8, 9), (11, 12)] {
            let of = |tokens: u32| record(&(0..tokens).collect::<Vec<u32>>());
            let (before, after) = (of(before), of(after));
            assert_eq!(compare(&before, &after), None);
            assert_eq!(compare_outlines(&before, &after), None);
        }
    }

    #[test]
    fn the_first_other_token_is_named_with_its_neighbours() {
        let before: Vec<u32> = (0..40).collect();
        let mut after = before.clone();
        after[13] = 99;
        let found = compare(&record(&before), &record(&after)).unwrap();
        assert_eq!((found.reason, found.shared_tokens, found.is_exact), (Reason::Edited, 13, true));
        assert_eq!(found.shared, (5..13).collect::<Vec<u32>>());
        assert_eq!(found.before, (13..29).collect::<Vec<u32>>());
        assert_eq!((found.after[0], found.after[1]), (99, 14));
        let found = compare_outlines(&record(&before), &record(&after)).unwrap();
        assert_eq!(
            (found.reason, found.shared_tokens, found.is_exact),
            (Reason::Edited, 12, false)
        );
    }

    #[test]
    fn a_shorter_history_and_a_truncated_one_are_told_apart() {
        let long = record(&(0..40).collect::<Vec<u32>>());
        let short = record(&(0..20).collect::<Vec<u32>>());
        for found in [compare(&long, &short), compare_outlines(&long, &short)] {
            assert_eq!(found.map(|found| found.reason), Some(Reason::Shortened));
        }
        let mut truncated = long.clone();
        truncated.truncate(1, 2).unwrap();
        for found in [compare(&long, &truncated), compare_outlines(&long, &truncated)] {
            assert_eq!(found.map(|found| found.reason), Some(Reason::Truncated));
        }
    }

    #[test]
    fn blocks_of_edited_histories_are_remembered_until_they_are_part_of_it_again() {
        let first = outline(&record(&[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]));
        let mut second = outline(&record(&[1, 1, 1, 1, 5, 5, 5, 5]));
        second.succeed(&first, [77]);
        assert_eq!(second.former, [first.blocks[1], first.blocks[2], 77]);
        let mut third = outline(&record(&[1, 1, 1, 1, 2, 2, 2, 2]));
        third.succeed(&second, []);
        assert_eq!(third.former, [first.blocks[2], 77, second.blocks[1]]);
    }

    #[test]
    fn former_blocks_are_bounded_and_the_oldest_are_forgotten() {
        let mut last = outline(&record(&[]));
        for number in 0..FORMER_MAX as u32 + 10 {
            let mut next = outline(&record(&[number; 4]));
            next.succeed(&last, []);
            last = next;
        }
        assert_eq!(last.former.len(), FORMER_MAX);
    }

    #[test]
    fn a_tail_is_known_by_its_tokens() {
        let outline = outline(&record(&[0, 0, 0, 0, 7, 8]));
        assert!(outline.is_tail(&[7]) && outline.is_tail(&[7, 8]) && outline.is_tail(&[7, 8, 9]));
        assert!(!outline.is_tail(&[7, 9]) && !outline.is_tail(&[8]) && !outline.is_tail(&[]));
    }
}

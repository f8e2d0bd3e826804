//! Conversation records: what a later turn needs to find a conversation's KV again, in checked bytes.
//!
//! ```text
//! runs    ┌ root ──► block 0 ─► block 1 ┐   ┌ key of a dropped block ──► block 2 ─► block 3 ┐   ┌ event ──► …
//! tokens  └ ids of the kept history, in order; fewer than a block's at the end are the tail           ┘
//! ```
//!
//! A conversation that was never truncated has one run, under its root. A truncation splits the runs at
//! block boundaries, since the blocks kept keep their names, and adds a run under the event: what is
//! computed after it depends on what was dropped, and is found through the record only.
//!
//! The byte table stands in docs/conversations.md.

use crate::bytes::{array_at, u16_at, u32_at, u64_at};
use crate::geometry::TOKENS_PER_BLOCK_MAX;
use crate::key::{BlockKey, Event, KEY_BYTES, RootKey};
use crate::layout::CONVERSATION_RECORD_BYTES_MAX;
use crate::start::{RUNS_MAX, Run, Shared, Start};

/// Version of a record's bytes. Version 2, which is read as well, has no count of shared blocks; bytes of
/// version 1 were the runtime's own and are no record.
pub const RECORD_VERSION: u32 = 3;
const VERSION_BEFORE: u32 = 2;
/// Bytes of a conversation's name, as the runtime's API takes it.
pub const NAME_BYTES_MAX: usize = 256;
/// Former blocks remembered: the last edits of a conversation of usual length.
pub const FORMER_MAX: usize = 1024;

const AT_CRC: usize = 4;
const AT_TTL: usize = 8;
const AT_PINNED: usize = 16;
const AT_ROOT: usize = 24;
const AT_NAME_BYTES: usize = 56;
const AT_TOKENS_PER_BLOCK: usize = 58;
const AT_TOKENS: usize = 60;
const AT_RUNS: usize = 64;
const AT_DROPPED: usize = 68;
const AT_FORMER: usize = 72;
const AT_CLIENT_BYTES: usize = 76;
const AT_SHARED: usize = 80;
/// Bytes before the name.
const FIXED_BYTES: usize = 84;
const FIXED_BYTES_BEFORE: usize = 80;
const RUN_BYTES: usize = KEY_BYTES + 4;
/// In the place of a time that is not given.
const NO_TIME: u64 = u64::MAX;

const _: () = {
    assert!(AT_ROOT + KEY_BYTES == AT_NAME_BYTES);
    assert!(AT_SHARED + 4 == FIXED_BYTES);
    // A long name, all runs and all former blocks leave room for a history.
    let most = FIXED_BYTES + NAME_BYTES_MAX + RUN_BYTES * RUNS_MAX + 8 * FORMER_MAX;
    assert!(most * 8 <= CONVERSATION_RECORD_BYTES_MAX as usize);
};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Model and tenant.
    pub root: RootKey,
    /// What of the kept history is every tenant's; its root is what the first run follows.
    pub shared: Option<Shared>,
    /// The client's own name for the conversation.
    pub name: String,
    /// Of the geometry under which the blocks were computed.
    pub tokens_per_block: u16,
    /// Ids of the kept history.
    pub tokens: Vec<u32>,
    /// Ascending, the first at block 0, the last at most behind the last full block.
    pub runs: Vec<Run>,
    /// Tokens that truncations have taken out of the history so far.
    pub dropped_tokens: u32,
    /// How long its blocks stay after their last use, in milliseconds; `None`: as the daemon is set.
    pub ttl_ms: Option<u64>,
    /// Until when its blocks do not leave, Unix milliseconds.
    pub pinned_until_ms: Option<u64>,
    /// Short names of blocks that the conversation had before an edit, the newest last. The daemon's: it
    /// finds by them what else a deletion concerns.
    pub former: Vec<u64>,
    /// The runtime's own, opaque here.
    pub client: Vec<u8>,
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Not as many bytes as the counts in it say.
    #[error("a conversation record of {found} bytes, its counts make {needed}")]
    Length {
        /// Given.
        found: usize,
        /// By its counts.
        needed: usize,
    },
    /// Written by another release, or not a record.
    #[error("a conversation record of version {found}, this build reads {RECORD_VERSION}")]
    Version {
        /// Read.
        found: u32,
    },
    /// Changed since it was written.
    #[error("conversation record has CRC {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// Read.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// A number outside its bounds.
    #[error("conversation record refused: {what} is {found}, must be {least} to {most}")]
    Bound {
        /// Which.
        what: &'static str,
        /// Read.
        found: u64,
        /// Fewest.
        least: u64,
        /// Most.
        most: u64,
    },
    /// The name is no text.
    #[error("conversation record refused: its name is not UTF-8")]
    Name,
    /// Runs that do not follow each other.
    #[error("conversation record refused: run {run} begins at block {first_block} of {blocks}")]
    Runs {
        /// Which.
        run: usize,
        /// Its beginning.
        first_block: u32,
        /// Full blocks of the history.
        blocks: usize,
    },
}

/// Why a history was not truncated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TruncateError {
    /// Nothing, or more than there is.
    #[error(
        "cannot drop {dropped} blocks behind {sinks} kept ones: the history has {blocks} full blocks"
    )]
    Range {
        /// Blocks to keep at the start.
        sinks: u32,
        /// Blocks to drop behind them.
        dropped: u32,
        /// Full blocks there are.
        blocks: usize,
    },
    /// A part of what every tenant shares would be left behind a gap.
    #[error(
        "the first {shared} blocks are a prompt that all tenants share: keep them (sinks of at least \
         {shared}) or drop all of them that are behind the sinks"
    )]
    Shared {
        /// Blocks of that prompt.
        shared: usize,
    },
    /// Truncated too often, with each time blocks kept in between.
    #[error("the history would be in {runs} runs, at most {RUNS_MAX} are kept: drop more at once")]
    Runs {
        /// Would be.
        runs: usize,
    },
}

impl Record {
    /// A history of which truncations have taken nothing out; or, with the runs that they left, one of which
    /// the caller says how many tokens they took.
    pub fn new(
        start: impl Into<Start>,
        name: String,
        tokens_per_block: u16,
        tokens: Vec<u32>,
    ) -> Self {
        let start: Start = start.into();
        let blocks = tokens.len() / usize::from(tokens_per_block);
        let shared = start.shared.filter(|shared| shared.blocks as usize <= blocks);
        let start = Start { shared, ..start };
        let mut breaks = start.breaks();
        breaks.retain(|place| *place as usize <= blocks);
        let needed = breaks.last().map_or(0, |place| *place as usize);
        let keys = start.chain(&tokens[..needed * usize::from(tokens_per_block)], tokens_per_block);
        let runs = breaks.into_iter().map(|place| start.run_at(place, &keys)).collect();
        Self {
            root: start.root,
            shared,
            name,
            tokens_per_block,
            tokens,
            runs,
            dropped_tokens: 0,
            ttl_ms: None,
            pinned_until_ms: None,
            former: Vec::new(),
            client: Vec::new(),
        }
    }

    /// Where its blocks hang.
    pub fn start(&self) -> Start {
        let runs = if self.dropped_tokens > 0 { self.runs.as_slice() } else { &[] };
        Start { root: self.root, shared: self.shared, runs: runs.into() }
    }

    /// Full blocks of the kept history.
    pub fn blocks(&self) -> usize {
        self.tokens.len() / usize::from(self.tokens_per_block)
    }

    /// Ids behind the last full block.
    pub fn tail(&self) -> &[u32] {
        &self.tokens[self.blocks() * usize::from(self.tokens_per_block)..]
    }

    /// Keys of the full blocks, in order.
    pub fn keys(&self) -> Vec<BlockKey> {
        self.start().chain(&self.tokens, self.tokens_per_block)
    }

    /// What the block behind the last full one follows; `keys` are the record's.
    pub fn open_parent(&self, keys: &[BlockKey]) -> BlockKey {
        self.start().parent_of(keys.len(), keys)
    }

    /// Takes `dropped` blocks out of the history, behind `sinks` blocks that stay at its start. The tail's
    /// tokens stay; its KV is computed anew, under the event. Of what every tenant shares no later part is kept without the beginning.
    pub fn truncate(&mut self, sinks: u32, dropped: u32) -> Result<Event, TruncateError> {
        let keys = self.keys();
        let blocks = keys.len();
        let resumed = u64::from(sinks) + u64::from(dropped);
        if dropped == 0 || resumed > blocks as u64 {
            return Err(TruncateError::Range { sinks, dropped, blocks });
        }
        let resumed = resumed as usize;
        let shared =
            self.shared.map(|shared| Shared { blocks: shared.blocks.min(sinks), ..shared });
        let start = self.start();
        if self.shared != shared && resumed < start.shared_blocks() {
            return Err(TruncateError::Shared { shared: start.shared_blocks() });
        }
        let tokens_per_block = u32::from(self.tokens_per_block);
        let event = Event::Truncated {
            sinks: sinks * tokens_per_block,
            dropped: dropped * tokens_per_block,
        };
        let (breaks, end) = (start.breaks(), blocks as u32);
        let moved = |place: u32| {
            let run = start.run_at(place, &keys);
            Run { first_block: place - dropped, ..run }
        };
        let before = breaks.iter().take_while(|place| **place < sinks);
        let mut runs: Vec<Run> = before.map(|place| start.run_at(*place, &keys)).collect();
        if resumed < blocks {
            runs.push(moved(sinks + dropped));
        }
        let behind = breaks.iter().filter(|place| **place > sinks + dropped && **place < end);
        runs.extend(behind.map(|place| moved(*place)));
        let parent = BlockKey::after(&start.parent_of(blocks, &keys), &event);
        runs.push(Run { parent, first_block: end - dropped });
        if runs.len() > RUNS_MAX {
            return Err(TruncateError::Runs { runs: runs.len() });
        }
        let place = |blocks: usize| blocks * usize::from(self.tokens_per_block);
        self.tokens.drain(place(sinks as usize)..place(resumed));
        self.runs = runs;
        self.shared = shared.filter(|shared| shared.blocks > 0);
        self.dropped_tokens = self.dropped_tokens.saturating_add(dropped * tokens_per_block);
        Ok(event)
    }

    /// Bytes of the encoded record.
    pub fn size_bytes(&self) -> usize {
        size_bytes(
            self.name.len(),
            self.runs.len(),
            self.tokens.len(),
            self.former.len(),
            self.client.len(),
        )
    }

    /// Bytes for the region and the disk; an error names what is out of bounds.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        let mut bytes = vec![0; FIXED_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let count = |count: usize| (count as u32).to_le_bytes();
        put(0, &RECORD_VERSION.to_le_bytes());
        put(AT_TTL, &self.ttl_ms.unwrap_or(NO_TIME).to_le_bytes());
        put(AT_PINNED, &self.pinned_until_ms.unwrap_or(NO_TIME).to_le_bytes());
        put(AT_ROOT, &self.root.0);
        put(AT_NAME_BYTES, &(self.name.len() as u16).to_le_bytes());
        put(AT_TOKENS_PER_BLOCK, &self.tokens_per_block.to_le_bytes());
        put(AT_TOKENS, &count(self.tokens.len()));
        put(AT_RUNS, &count(self.runs.len()));
        put(AT_DROPPED, &self.dropped_tokens.to_le_bytes());
        put(AT_FORMER, &count(self.former.len()));
        put(AT_CLIENT_BYTES, &count(self.client.len()));
        put(AT_SHARED, &self.shared.map_or(0, |shared| shared.blocks).to_le_bytes());
        bytes.reserve(self.size_bytes() - FIXED_BYTES);
        bytes.extend_from_slice(self.name.as_bytes());
        for run in &self.runs {
            bytes.extend_from_slice(&run.parent.0);
            bytes.extend_from_slice(&run.first_block.to_le_bytes());
        }
        for token in &self.tokens {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        for key in &self.former {
            bytes.extend_from_slice(&key.to_le_bytes());
        }
        bytes.extend_from_slice(&self.client);
        let crc = crc(&bytes);
        bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Reads bytes, whoever wrote them; nothing of a claimed size is allocated before it is known to be there.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let short = RecordError::Length { found: bytes.len(), needed: FIXED_BYTES_BEFORE };
        let version = bytes.first_chunk().ok_or(short.clone())?;
        let fixed_bytes = match u32::from_le_bytes(*version) {
            RECORD_VERSION => FIXED_BYTES,
            VERSION_BEFORE => FIXED_BYTES_BEFORE,
            found => return Err(RecordError::Version { found }),
        };
        let (fixed, mut rest) = bytes.split_at_checked(fixed_bytes).ok_or(short)?;
        let name_bytes = usize::from(u16_at(fixed, AT_NAME_BYTES));
        let count = |at: usize| u32_at(fixed, at) as usize;
        let [tokens, runs, former, client] =
            [AT_TOKENS, AT_RUNS, AT_FORMER, AT_CLIENT_BYTES].map(count);
        let needed =
            fixed_bytes + size_bytes(name_bytes, runs, tokens, former, client) - FIXED_BYTES;
        if bytes.len() != needed {
            return Err(RecordError::Length { found: bytes.len(), needed });
        }
        let (found, computed) = (u32_at(fixed, AT_CRC), crc(bytes));
        if found != computed {
            return Err(RecordError::Checksum { found, computed });
        }
        let mut take = |bytes: usize| {
            let (taken, left) = rest.split_at(bytes); // There are as many: counted above.
            rest = left;
            taken
        };
        let time = |at: usize| Some(u64_at(fixed, at)).filter(|time| *time != NO_TIME);
        let name = std::str::from_utf8(take(name_bytes)).map_err(|_| RecordError::Name)?;
        let run = |bytes: &[u8]| Run {
            parent: BlockKey(array_at(bytes, 0)),
            first_block: u32_at(bytes, KEY_BYTES),
        };
        let root = RootKey(array_at(fixed, AT_ROOT));
        let runs: Vec<Run> = take(RUN_BYTES * runs).chunks_exact(RUN_BYTES).map(run).collect();
        let dropped_tokens = u32_at(fixed, AT_DROPPED);
        let (public, shared_blocks) = match (runs.as_slice(), fixed_bytes) {
            ([public, ..], FIXED_BYTES) => (Some(public), u32_at(fixed, AT_SHARED)),
            // As version 2 told: of a truncated history, nothing.
            ([public, private, ..], _)
                if dropped_tokens == 0 && public.parent != root.as_parent() =>
            {
                (Some(public), private.first_block)
            }
            _ => (None, 0),
        };
        let shared = public.filter(|_| shared_blocks > 0);
        let shared =
            shared.map(|public| Shared { root: RootKey(public.parent.0), blocks: shared_blocks });
        let record = Self {
            root,
            shared,
            name: name.to_owned(),
            tokens_per_block: u16_at(fixed, AT_TOKENS_PER_BLOCK),
            runs,
            tokens: take(4 * tokens).chunks_exact(4).map(|word| u32_at(word, 0)).collect(),
            dropped_tokens,
            ttl_ms: time(AT_TTL),
            pinned_until_ms: time(AT_PINNED),
            former: take(8 * former).chunks_exact(8).map(|word| u64_at(word, 0)).collect(),
            client: take(client).to_vec(),
        };
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), RecordError> {
        let within = |what, found: usize, least: usize, most: usize| {
            if (least..=most).contains(&found) {
                return Ok(());
            }
            let [found, least, most] = [found, least, most].map(|number| number as u64);
            Err(RecordError::Bound { what, found, least, most })
        };
        let tokens_per_block = usize::from(self.tokens_per_block);
        within("tokens per block", tokens_per_block, 1, usize::from(TOKENS_PER_BLOCK_MAX))?;
        within("name's length", self.name.len(), 0, NAME_BYTES_MAX)?;
        within("number of runs", self.runs.len(), 1, RUNS_MAX)?;
        within("number of shared blocks", self.start().shared_blocks(), 0, self.blocks())?;
        within("number of former blocks", self.former.len(), 0, FORMER_MAX)?;
        let most = CONVERSATION_RECORD_BYTES_MAX as usize;
        within("length in bytes", self.size_bytes(), 0, most)?;
        let blocks = self.blocks();
        let mut least = 0;
        for (run, Run { first_block, .. }) in self.runs.iter().enumerate() {
            let place = *first_block as usize;
            let is_first_at_0 = run > 0 || place == 0;
            if place < least || place > blocks || !is_first_at_0 {
                return Err(RecordError::Runs { run, first_block: *first_block, blocks });
            }
            least = place + 1;
        }
        Ok(())
    }
}

fn size_bytes(name: usize, runs: usize, tokens: usize, former: usize, client: usize) -> usize {
    FIXED_BYTES + name + RUN_BYTES * runs + 4 * tokens + 8 * former + client
}

/// CRC32C with its own field taken as zero.
fn crc(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&bytes[..AT_CRC]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[AT_CRC + 4..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Fingerprint;
    use proptest::prelude::*;

    const TOKENS_PER_BLOCK: u16 = 4;

    fn root() -> RootKey {
        RootKey::new(&Fingerprint([1; KEY_BYTES]), b"tenant")
    }

    fn record(tokens: u32) -> Record {
        Record::new(root(), "chat 7".into(), TOKENS_PER_BLOCK, (0..tokens).collect())
    }

    /// A record with something in each field.
    fn full_record() -> Record {
        let mut record = record(23);
        record.truncate(1, 2).unwrap();
        record.ttl_ms = Some(5);
        record.pinned_until_ms = Some(1_700_000_000_000);
        record.former = vec![3, u64::MAX];
        record.client = b"digests".to_vec();
        record
    }

    #[test]
    fn the_keys_of_a_conversation_behind_a_shared_prompt_are_its_chains() {
        let shared = Some(Shared { root: RootKey([9; 32]), blocks: 2 });
        let start = Start { shared, ..root().into() };
        let tokens: Vec<u32> = (0..u32::from(TOKENS_PER_BLOCK) * 5 + 2).collect();
        let record = Record::new(start.clone(), "chat".into(), TOKENS_PER_BLOCK, tokens.clone());
        assert_eq!(record.keys(), start.chain(&tokens, TOKENS_PER_BLOCK));
        assert_eq!(record.start(), start);
        let read = Record::decode(&record.encode().unwrap()).unwrap();
        assert_eq!((read.keys(), read.root), (record.keys(), root()));
    }

    /// Blocks of the shared prompt stay under the public root, whatever is dropped behind them.
    #[test]
    fn of_what_is_shared_only_a_beginning_is_kept() {
        let shared = |blocks| Some(Shared { root: RootKey([9; 32]), blocks });
        let start = Start { shared: shared(3), ..root().into() };
        let tokens: Vec<u32> = (0..u32::from(TOKENS_PER_BLOCK) * 8 + 2).collect();
        let whole = Record::new(start, "chat".into(), TOKENS_PER_BLOCK, tokens);
        let keys = whole.keys();
        for (sinks, dropped, left) in [
            (3, 2, shared(3)),
            (4, 1, shared(3)),
            (1, 2, shared(1)),
            (1, 4, shared(1)),
            (0, 3, None),
        ] {
            let mut record = whole.clone();
            record.truncate(sinks, dropped).unwrap();
            let kept = [&keys[..sinks as usize], &keys[(sinks + dropped) as usize..]].concat();
            assert_eq!(
                (record.keys(), record.shared),
                (kept, left),
                "{sinks} kept, {dropped} dropped"
            );
            assert_eq!(Record::decode(&record.encode().unwrap()), Ok(record));
        }
        let mut record = whole.clone();
        assert_eq!(record.truncate(0, 2), Err(TruncateError::Shared { shared: 3 }));
        assert_eq!(record, whole);
    }

    #[test]
    fn records_of_version_2_are_read() {
        let shared = Some(Shared { root: RootKey([9; 32]), blocks: 2 });
        let record = Record::new(
            Start { shared, ..root().into() },
            "chat".into(),
            TOKENS_PER_BLOCK,
            (0..23).collect(),
        );
        for record in [record, full_record()] {
            let mut bytes = record.encode().unwrap();
            bytes.drain(AT_SHARED..FIXED_BYTES);
            bytes[..4].copy_from_slice(&VERSION_BEFORE.to_le_bytes());
            let crc = crc(&bytes);
            bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(Record::decode(&bytes), Ok(record));
        }
    }

    #[test]
    fn each_field_reads_back() {
        for record in [record(0), record(9), full_record()] {
            assert_eq!(Record::decode(&record.encode().unwrap()), Ok(record));
        }
    }

    #[test]
    fn the_keys_of_an_untruncated_record_are_the_chain_of_its_root() {
        let record = record(23);
        assert_eq!(record.keys(), root().chain(&record.tokens, TOKENS_PER_BLOCK));
        assert_eq!(record.tail(), [20, 21, 22]);
    }

    #[test]
    fn bytes_of_version_1_are_no_record() {
        let mut bytes = vec![0; 200];
        bytes[0] = 1;
        assert_eq!(Record::decode(&bytes), Err(RecordError::Version { found: 1 }));
    }

    #[test]
    fn what_is_out_of_bounds_is_neither_written_nor_read() {
        type Spoil = fn(&mut Record);
        let spoilt: [Spoil; 7] = [
            |record| record.tokens_per_block = 0,
            |record| record.tokens_per_block = TOKENS_PER_BLOCK_MAX + 1,
            |record| record.name = "x".repeat(NAME_BYTES_MAX + 1),
            |record| record.runs.clear(),
            |record| record.runs[0].first_block = 1,
            |record| record.runs.push(record.runs[0]),
            |record| record.tokens = vec![0; CONVERSATION_RECORD_BYTES_MAX as usize / 4],
        ];
        for (number, spoil) in spoilt.into_iter().enumerate() {
            let mut record = record(9);
            spoil(&mut record);
            assert!(record.encode().is_err(), "spoilt {number}");
        }
        // Bytes that say so, with a right checksum: the peer can compute one.
        let mut bytes = record(9).encode().unwrap();
        bytes[FIXED_BYTES + 6 + KEY_BYTES] = 3; // The run's first block: there are two.
        let crc = crc(&bytes);
        bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        let refused = RecordError::Runs { run: 0, first_block: 3, blocks: 2 };
        assert_eq!(Record::decode(&bytes), Err(refused));
    }

    #[test]
    fn a_truncation_needs_full_blocks() {
        let mut record = record(11);
        for (sinks, dropped) in [(0, 0), (2, 0), (1, 2), (u32::MAX, u32::MAX)] {
            let refused = TruncateError::Range { sinks, dropped, blocks: 2 };
            assert_eq!(record.truncate(sinks, dropped), Err(refused));
        }
        assert_eq!(record.tokens.len(), 11);
    }

    #[test]
    fn what_follows_a_truncation_depends_on_what_was_dropped() {
        let next = |sinks, dropped| {
            let mut record = record(16);
            record.truncate(sinks, dropped).unwrap();
            record.tokens.extend([1, 2, 3, 4]);
            record.keys().pop().unwrap()
        };
        let keys = [next(0, 1), next(0, 2), next(1, 1), next(1, 2), next(0, 4)];
        for (place, key) in keys.iter().enumerate() {
            assert!(!keys[..place].contains(key), "truncation {place}");
        }
    }

    /// A history kept the slow way: each block with its key, as it was when it was computed.
    struct Oracle {
        blocks: Vec<(BlockKey, Vec<u32>)>,
        tail: Vec<u32>,
        parent: BlockKey,
    }

    impl Oracle {
        fn append(&mut self, token: u32) {
            self.tail.push(token);
            if self.tail.len() == usize::from(TOKENS_PER_BLOCK) {
                let tokens = std::mem::take(&mut self.tail);
                self.parent = BlockKey::child(&self.parent, &tokens);
                self.blocks.push((self.parent, tokens));
            }
        }

        fn truncate(&mut self, sinks: usize, dropped: usize) {
            self.blocks.drain(sinks..sinks + dropped);
            let unit = u32::from(TOKENS_PER_BLOCK);
            let event =
                Event::Truncated { sinks: sinks as u32 * unit, dropped: dropped as u32 * unit };
            self.parent = BlockKey::after(&self.parent, &event);
        }
    }

    proptest! {
        #[test]
        fn keys_and_tokens_are_those_of_a_slow_history(
            steps in proptest::collection::vec((0u32..20, 0usize..4, 0usize..4), 1..24),
        ) {
            let mut record = record(0);
            let (parent, blocks, tail) = (root().as_parent(), Vec::new(), Vec::new());
            let mut oracle = Oracle { blocks, tail, parent };
            for (number, (appended, sinks, dropped)) in steps.into_iter().enumerate() {
                for token in 0..appended {
                    record.tokens.push(token + number as u32);
                    oracle.append(token + number as u32);
                }
                let fits = dropped > 0 && sinks + dropped <= oracle.blocks.len();
                let truncated = record.truncate(sinks as u32, dropped as u32);
                prop_assert_eq!(truncated.is_ok(), fits);
                if fits {
                    oracle.truncate(sinks, dropped);
                }
                let keys: Vec<BlockKey> = oracle.blocks.iter().map(|(key, _)| *key).collect();
                prop_assert_eq!(record.keys(), keys.as_slice());
                prop_assert_eq!(record.open_parent(&keys), oracle.parent);
                let mut tokens: Vec<u32> =
                    oracle.blocks.iter().flat_map(|(_, tokens)| tokens).copied().collect();
                tokens.extend(&oracle.tail);
                prop_assert_eq!(&record.tokens, &tokens);
                let bytes = record.encode().unwrap();
                prop_assert_eq!(Record::decode(&bytes), Ok(record.clone()));
            }
        }

        #[test]
        fn one_flipped_bit_is_found(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = full_record().encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn cut_and_random_bytes_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
            counts in [0u32..9, 0..9, 0..9, 0..9],
        ) {
            let _ = Record::decode(&bytes);
            if bytes.len() < FIXED_BYTES {
                return Ok(());
            }
            // Past version, length and checksum too: a peer can make them right.
            bytes[..4].copy_from_slice(&RECORD_VERSION.to_le_bytes());
            let places = [AT_TOKENS, AT_RUNS, AT_FORMER, AT_CLIENT_BYTES];
            for (at, count) in places.into_iter().zip(counts) {
                bytes[at..at + 4].copy_from_slice(&count.to_le_bytes());
            }
            bytes[AT_NAME_BYTES..AT_NAME_BYTES + 2].copy_from_slice(&3u16.to_le_bytes());
            let [tokens, runs, former, client] = counts.map(|count| count as usize);
            bytes.resize(size_bytes(3, runs, tokens, former, client), 7);
            let crc = crc(&bytes);
            bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
            let is_early = |error: &RecordError| {
                matches!(error, RecordError::Length { .. } | RecordError::Checksum { .. })
            };
            prop_assert!(!Record::decode(&bytes).is_err_and(|error| is_early(&error)));
        }
    }
}

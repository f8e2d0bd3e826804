//! Conversations on record: the token ids that earlier turns really had.
//!
//! Text does not give sampled ids back: the same words can be cut into tokens in another way, and then
//! nothing after that point is found in the cache. A request that names its conversation therefore gets,
//! for the leading messages that match the record, the recorded ids, and only new messages are tokenised.
//!
//! Messages match by a digest of role, name and content as the client sees them. A record can be left
//! only at a [`Cut`]: right behind a reply, where the rendered prompt was some text and its ids are
//! known. A later prompt goes on from the last cut whose text it begins with, so a template that renders
//! history differently costs reuse, never a wrong prompt.
//!
//! Records are kept here (bounded, the least recently used goes first) and put to the cache daemon, so
//! that they survive the pod: ids, root and name for the daemon to read (`kv_protocol::record`), digests
//! and cuts as the part that is ours alone. They are named by the model, the request's `cache_salt` and the client's
//! id. A salted request that has no record of its own may read the unsalted one (ids of text that the
//! client has itself just sent), and never writes it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kv_protocol::key::{ConversationId, Fingerprint, RootKey};
use kv_protocol::record::{Record as Stored, RecordError};
use kv_protocol::start::Start;
use tokio::sync::oneshot;

use super::Submit;
use super::metrics::Metrics;
use crate::changes::{Changes, Stale};
use crate::request::{Command, Keep};
use crate::shared_prefix::SharedPrefixes;
use crate::text::template::TemplateMessage;

/// Records kept in the runtime. Those of a few thousand users who are mid-conversation; others are
/// fetched from the daemon.
const RECORDS_MAX: usize = 4096;
/// Memory for records, whatever their number.
const RECORDS_BYTES_MAX: usize = 128 << 20;
/// Longest a request waits for the daemon's record: about what tokenising a long history costs, doubled
/// for an engine in the middle of a step.
const FETCH_LIMIT: Duration = Duration::from_secs(2);
/// More than any context has messages or cuts; a record that claims more is not ours.
const RECORD_PARTS_MAX: usize = 1 << 20;

/// Digest of one message.
pub type MessageDigest = [u8; 32];

/// A place right behind a reply where a later prompt may go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Leading messages before it, the reply included.
    pub messages: usize,
    /// Bytes of the rendered text before it.
    pub text_bytes: usize,
    /// Digest of that text.
    pub text_digest: [u8; 32],
    /// Token ids of that text, those included that a truncation has dropped since.
    pub tokens: usize,
}

/// What is known of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Of each message, in order.
    pub messages: Vec<MessageDigest>,
    /// Ascending.
    pub cuts: Vec<Cut>,
    /// Ids up to the last cut, as far as they were not dropped.
    pub tokens: Vec<u32>,
    /// How many ids truncations have taken out.
    pub dropped: usize,
    /// What the last truncation kept, while its KV is in use.
    pub kept: Option<Kept>,
    /// How long its KV stays.
    pub keep: Keep,
}

/// History that a truncation has kept: its KV is that of before, and what comes after hangs under an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Where the blocks hang.
    pub start: Start,
    /// Ids of the kept blocks.
    pub tokens: usize,
}

/// Why a turn could not go on from its conversation's last cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Divergence {
    /// A message is another than the one on record.
    Edited,
    /// Messages are missing at the end, as when a reply is asked for again.
    Shortened,
    /// The template renders the recorded messages differently now.
    Template,
}

impl Divergence {
    /// Metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Edited => "edited",
            Self::Shortened => "shortened",
            Self::Template => "template",
        }
    }
}

/// From where a prompt goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resume {
    /// Cuts that hold for this prompt; the last one is where it goes on.
    pub cuts: Vec<Cut>,
    /// Recorded ids up to that cut.
    pub tokens: Vec<u32>,
    /// How many more there were before truncations.
    pub dropped: usize,
    /// What of the ids a truncation has kept.
    pub kept: Option<Kept>,
    /// How long the conversation's KV stays.
    pub keep: Keep,
    /// Why it was not the record's last.
    pub diverged: Option<Divergence>,
}

impl Resume {
    /// Bytes of rendered text and number of messages that need no tokenising.
    pub fn covered(&self) -> (usize, usize) {
        self.cuts.last().map_or((0, 0), |cut| (cut.text_bytes, cut.messages))
    }
}

/// Digest of a message as the client sees it.
pub fn digest(message: &TemplateMessage) -> MessageDigest {
    let mut hasher = blake3::Hasher::new_derive_key("colloquy 2026-11 message");
    for part in [&message.role, message.name.as_ref().unwrap_or(&String::new()), &message.content] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

impl Record {
    /// Where a prompt with these messages and this rendered text goes on.
    pub fn resume(&self, messages: &[MessageDigest], rendered: &str) -> Resume {
        let matched = self.messages.iter().zip(messages).take_while(|(a, b)| a == b).count();
        // No cut is left among what was dropped, nor in what was kept: where that has gaps nobody knows.
        let least = self.dropped + self.kept.as_ref().map_or(0, |kept| kept.tokens);
        let fits = |cut: &Cut| {
            cut.messages <= matched
                && cut.tokens >= least
                && rendered.is_char_boundary(cut.text_bytes)
                && rendered
                    .get(..cut.text_bytes)
                    .is_some_and(|text| digest_text(text) == cut.text_digest)
        };
        let count = self.cuts.iter().rposition(fits).map_or(0, |last| last + 1);
        let cuts = self.cuts[..count].iter().filter(|cut| cut.tokens >= least);
        let cuts: Vec<Cut> = cuts.cloned().collect();
        let diverged = if count == self.cuts.len() {
            None
        } else if matched == self.messages.len() {
            Some(Divergence::Template)
        } else if matched == messages.len() {
            Some(Divergence::Shortened)
        } else {
            Some(Divergence::Edited)
        };
        let keep = self.keep;
        let Some(last) = cuts.last() else { return Resume { keep, diverged, ..Resume::default() } };
        let tokens = self.tokens[..last.tokens - self.dropped].to_vec();
        Resume { cuts, tokens, dropped: self.dropped, kept: self.kept.clone(), keep, diverged }
    }

    /// The record after a turn: `messages` includes the reply, `rendered` ends with what of the reply
    /// the client saw as whole tokens, and `tokens` are the ids of exactly that text.
    pub fn after(
        resume: Resume,
        messages: Vec<MessageDigest>,
        rendered: &str,
        tokens: Vec<u32>,
    ) -> Self {
        let Resume { mut cuts, dropped, kept, keep, .. } = resume;
        cuts.push(Cut {
            messages: messages.len(),
            text_bytes: rendered.len(),
            text_digest: digest_text(rendered),
            tokens: tokens.len() + dropped,
        });
        Self { messages, cuts, tokens, dropped, kept, keep }
    }

    fn size_bytes(&self) -> usize {
        size_of::<Self>()
            + self.messages.len() * size_of::<MessageDigest>()
            + self.cuts.len() * size_of::<Cut>()
            + self.tokens.len() * size_of::<u32>()
    }

    /// As the daemon keeps it. The client's part: little-endian words, counts first.
    pub fn to_bytes(
        &self,
        name: &Name,
        start: Start,
        tokens_per_block: u16,
    ) -> Result<Vec<u8>, RecordError> {
        let mut client = Vec::with_capacity(self.size_bytes());
        let word = |bytes: &mut Vec<u8>, value: usize| {
            bytes.extend_from_slice(&(value as u32).to_le_bytes());
        };
        word(&mut client, self.messages.len());
        word(&mut client, self.cuts.len());
        self.messages.iter().for_each(|digest| client.extend_from_slice(digest));
        for cut in &self.cuts {
            word(&mut client, cut.messages);
            word(&mut client, cut.text_bytes);
            word(&mut client, cut.tokens);
            client.extend_from_slice(&cut.text_digest);
        }
        let text = name.text.clone();
        let stored = Stored::new(start, text, tokens_per_block, self.tokens.clone());
        let Keep { ttl_ms, pinned_until_ms } = self.keep;
        let dropped_tokens = self.dropped as u32;
        Stored { dropped_tokens, ttl_ms, pinned_until_ms, client, ..stored }.encode()
    }

    /// `None` for bytes that are no record of ours, whoever wrote them. `vocabulary` bounds the ids.
    pub fn from_bytes(bytes: &[u8], vocabulary: usize) -> Option<Self> {
        let stored = Stored::decode(bytes).ok()?;
        let mut left = stored.client.as_slice();
        let [messages, cuts] = [word(&mut left)?, word(&mut left)?];
        if messages.max(cuts) > RECORD_PARTS_MAX {
            return None;
        }
        if left.len() != messages * 32 + cuts * (12 + 32) {
            return None; // Checked before anything of the claimed size is allocated.
        }
        let kept = (stored.dropped_tokens > 0).then(|| Kept::of(&stored));
        let record = Self {
            kept,
            messages: (0..messages).map(|_| take(&mut left)).collect::<Option<_>>()?,
            cuts: (0..cuts)
                .map(|_| {
                    Some(Cut {
                        messages: word(&mut left)?,
                        text_bytes: word(&mut left)?,
                        tokens: word(&mut left)?,
                        text_digest: take(&mut left)?,
                    })
                })
                .collect::<Option<_>>()?,
            tokens: stored.tokens,
            dropped: stored.dropped_tokens as usize,
            keep: Keep { ttl_ms: stored.ttl_ms, pinned_until_ms: stored.pinned_until_ms },
        };
        let ids_are_known = record.tokens.iter().all(|token| (*token as usize) < vocabulary);
        let tokens = record.tokens.len() + record.dropped;
        let is_inside = |cut: &Cut| cut.tokens <= tokens && cut.messages <= record.messages.len();
        let cuts_are_inside = record.cuts.iter().all(is_inside);
        (ids_are_known && cuts_are_inside).then_some(record)
    }
}

impl Kept {
    fn of(stored: &Stored) -> Self {
        let start = stored.start();
        let tokens = start.kept_blocks() * usize::from(stored.tokens_per_block);
        Self { start, tokens }
    }
}

fn digest_text(text: &str) -> [u8; 32] {
    *blake3::hash(text.as_bytes()).as_bytes()
}

fn take<const N: usize>(left: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = left.split_first_chunk()?;
    *left = rest;
    Some(*taken)
}

fn word(left: &mut &[u8]) -> Option<usize> {
    take(left).map(|bytes| u32::from_le_bytes(bytes) as usize)
}

/// A conversation as one request names it.
#[derive(Debug, Clone)]
pub struct Name {
    own: ConversationId,
    root: RootKey,
    /// As the client wrote it.
    text: String,
    /// The unsalted one, for a request with a salt.
    public: Option<ConversationId>,
}

/// All records, here and with the daemon.
pub struct Conversations {
    fingerprint: Fingerprint,
    tokens_per_block: u16,
    shared_prefixes: SharedPrefixes,
    vocabulary: usize,
    records: Mutex<Records>,
    changes: Arc<Changes>,
    submit: Submit,
    metrics: Metrics,
}

impl std::fmt::Debug for Conversations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversations").finish_non_exhaustive()
    }
}

impl Conversations {
    /// No records yet.
    pub fn new(
        fingerprint: [u8; 32],
        tokens_per_block: u16,
        shared_prefixes: SharedPrefixes,
        vocabulary: usize,
        changes: Arc<Changes>,
        submit: Submit,
        metrics: Metrics,
    ) -> Self {
        let (fingerprint, records) = (Fingerprint(fingerprint), Mutex::default());
        Self {
            fingerprint,
            tokens_per_block,
            shared_prefixes,
            vocabulary,
            records,
            changes,
            submit,
            metrics,
        }
    }

    /// The name under which a request's conversation is recorded.
    pub fn name(&self, salt: &[u8], id: &str) -> Name {
        let root = |salt: &[u8]| RootKey::new(&self.fingerprint, salt);
        let under = |root: &RootKey| ConversationId::new(root, id.as_bytes());
        let own = root(salt);
        Name {
            own: under(&own),
            root: own,
            text: id.to_owned(),
            public: (!salt.is_empty()).then(|| under(&root(b""))),
        }
    }

    /// The record to go on from, here or with the daemon.
    pub async fn find(&self, name: &Name) -> Option<Arc<Record>> {
        let own = match self.local(name.own) {
            None => self.fetch(name.own).await,
            found => found,
        };
        match (own, name.public) {
            (None, Some(public)) => match self.local(public) {
                None => self.fetch(public).await,
                found => found,
            },
            (found, _) => found,
        }
    }

    /// Records a turn, here and (best effort) with the daemon.
    pub fn put(&self, name: &Name, record: Record) {
        let start = self.start(name, record.kept.as_ref(), &record.tokens);
        let bytes = record.to_bytes(name, start, self.tokens_per_block);
        self.keep(name.own, Arc::new(record));
        let record = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::debug!(%error, "a record that the cache daemon does not take");
                return;
            }
        };
        let command = Command::PutConversation { id: name.own.0, record };
        if let Err(error) = (self.submit)(command) {
            tracing::debug!(%error, "a conversation's record was not stored");
        }
    }

    /// Takes at least `over` tokens out of a history: its earliest half behind `sinks` tokens that stay
    /// (CachedAttention 3.4), or more if that is not enough. `false`, and nothing changed, if it has not as many.
    pub fn truncate(&self, name: &Name, resume: &mut Resume, sinks: usize, over: usize) -> bool {
        let size = usize::from(self.tokens_per_block);
        let start = self.start(name, resume.kept.as_ref(), &resume.tokens);
        let sinks = sinks.div_ceil(size).max(start.shared_blocks());
        let mut stored =
            Stored::new(start, String::new(), self.tokens_per_block, resume.tokens.clone());
        stored.dropped_tokens = resume.dropped as u32;
        let earliest = stored.blocks().saturating_sub(sinks) / 2;
        let dropped = earliest.max(over.div_ceil(size));
        if stored.truncate(sinks as u32, dropped as u32).is_err() {
            return false;
        }
        resume.kept = Some(Kept::of(&stored));
        resume.dropped = stored.dropped_tokens as usize;
        resume.tokens = stored.tokens;
        true
    }

    /// Where the blocks of a history hang.
    fn start(&self, name: &Name, kept: Option<&Kept>, tokens: &[u32]) -> Start {
        // A salted conversation may go on from the ids of the unsalted one, never from its KV.
        let kept = kept.filter(|kept| kept.start.root == name.root);
        kept.map_or_else(
            || self.shared_prefixes.start(name.root, tokens),
            |kept| kept.start.clone(),
        )
    }

    /// The copy here, unless the daemon has another record by now.
    fn local(&self, id: ConversationId) -> Option<Arc<Record>> {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        match self.changes.take() {
            Stale::None => {}
            Stale::Some(ids) => ids.iter().for_each(|id| records.forget(&id.0)),
            Stale::All => *records = Records::default(),
        }
        records.get(&id.0)
    }

    fn keep(&self, id: ConversationId, record: Arc<Record>) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.insert(id.0, record);
        self.metrics.conversations(records.by_id.len());
    }

    async fn fetch(&self, id: ConversationId) -> Option<Arc<Record>> {
        let (answer, answered) = oneshot::channel();
        (self.submit)(Command::GetConversation { id: id.0, answer }).ok()?;
        let bytes = tokio::time::timeout(FETCH_LIMIT, answered).await.ok()?.ok()??;
        let record = Record::from_bytes(&bytes, self.vocabulary);
        if record.is_none() {
            tracing::warn!(conversation = %id, "the cache daemon's record is not readable; ignored");
        }
        let record = Arc::new(record?);
        self.keep(id, record.clone());
        Some(record)
    }
}

/// Records by id, bounded in number and bytes.
#[derive(Debug, Default)]
struct Records {
    by_id: HashMap<[u8; 32], (Arc<Record>, u64)>,
    size_bytes: usize,
    clock: u64,
}

impl Records {
    fn get(&mut self, id: &[u8; 32]) -> Option<Arc<Record>> {
        self.clock += 1;
        let (record, used) = self.by_id.get_mut(id)?;
        *used = self.clock;
        Some(record.clone())
    }

    fn forget(&mut self, id: &[u8; 32]) {
        if let Some((record, _)) = self.by_id.remove(id) {
            self.size_bytes -= record.size_bytes();
        }
    }

    fn insert(&mut self, id: [u8; 32], record: Arc<Record>) {
        self.clock += 1;
        self.size_bytes += record.size_bytes();
        if let Some((old, _)) = self.by_id.insert(id, (record, self.clock)) {
            self.size_bytes -= old.size_bytes();
        }
        while self.by_id.len() > RECORDS_MAX
            || (self.size_bytes > RECORDS_BYTES_MAX && self.by_id.len() > 1)
        {
            // A walk over at most RECORDS_MAX entries, once a turn: nothing beside the turn itself.
            let oldest = self.by_id.iter().min_by_key(|(_, (_, used))| *used).map(|(id, _)| *id);
            let Some((old, _)) = oldest.and_then(|id| self.by_id.remove(&id)) else { break };
            self.size_bytes -= old.size_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> TemplateMessage {
        TemplateMessage { role: role.into(), content: content.into(), name: None }
    }

    /// A conversation of one turn: `[u] a`, rendered as written here.
    fn one_turn() -> (Vec<MessageDigest>, Record) {
        let messages = vec![digest(&message("user", "u")), digest(&message("assistant", "a"))];
        let record = Record::after(Resume::default(), messages.clone(), "[u] a", vec![1, 2, 3]);
        (messages, record)
    }

    #[test]
    fn the_next_turn_goes_on_from_the_recorded_ids() {
        let (mut messages, record) = one_turn();
        messages.push(digest(&message("user", "v")));
        let resume = record.resume(&messages, "[u] a [v] ");
        assert_eq!(resume.tokens, [1, 2, 3]);
        assert_eq!(resume.covered(), (5, 2));
        assert_eq!(resume.diverged, None);
    }

    #[test]
    fn what_does_not_match_is_not_used_and_has_a_reason() {
        let (messages, record) = one_turn();
        let user = messages[0];
        let other = digest(&message("assistant", "b"));
        for (messages, rendered, reason) in [
            (vec![user, other], "[u] b [v]", Divergence::Edited),
            (vec![user], "[u] ", Divergence::Shortened),
            (messages.clone(), "[u]  a [v]", Divergence::Template),
        ] {
            let resume = record.resume(&messages, rendered);
            assert_eq!(resume.diverged, Some(reason));
            assert!(resume.tokens.is_empty());
        }
    }

    #[test]
    fn an_edit_in_a_later_turn_keeps_the_turns_before_it() {
        let (mut messages, first) = one_turn();
        messages.extend([digest(&message("user", "v")), digest(&message("assistant", "b"))]);
        let resume = first.resume(&messages, "[u] a [v] b");
        let second = Record::after(resume, messages.clone(), "[u] a [v] b", vec![1, 2, 3, 4, 5]);
        messages[3] = digest(&message("assistant", "c"));
        let resume = second.resume(&messages, "[u] a [v] c");
        assert_eq!(resume.tokens, [1, 2, 3]);
        assert_eq!(resume.diverged, Some(Divergence::Edited));
    }

    #[test]
    fn role_name_and_content_do_not_run_into_each_other() {
        let named = |name: Option<&str>, content: &str| {
            digest(&TemplateMessage {
                role: "user".into(),
                content: content.into(),
                name: name.map(str::to_owned),
            })
        };
        assert_ne!(named(Some("ab"), "c"), named(Some("a"), "bc"));
        assert_ne!(named(None, "ab"), named(Some("a"), "b"));
    }

    fn bytes_of(record: &Record) -> Vec<u8> {
        let root = RootKey([1; 32]);
        let name = Name {
            own: ConversationId::new(&root, b"chat"),
            root,
            text: "chat".into(),
            public: None,
        };
        let start = record.kept.as_ref().map_or_else(|| root.into(), |kept| kept.start.clone());
        record.to_bytes(&name, start, 16).unwrap()
    }

    #[test]
    fn a_record_comes_back_from_its_bytes() {
        let (_, record) = one_turn();
        let bytes = bytes_of(&record);
        let stored = Stored::decode(&bytes).unwrap();
        assert_eq!((stored.name.as_str(), stored.tokens.as_slice()), ("chat", &[1, 2, 3][..]));
        assert_eq!(Record::from_bytes(&bytes, 10), Some(record));
    }

    #[test]
    fn how_long_a_conversation_stays_is_in_its_record_until_a_turn_says_otherwise() {
        let (messages, mut record) = one_turn();
        record.keep = Keep { ttl_ms: Some(60_000), pinned_until_ms: None };
        let stored = Stored::decode(&bytes_of(&record)).unwrap();
        assert_eq!((stored.ttl_ms, stored.pinned_until_ms), (Some(60_000), None));
        let mut resume = Record::from_bytes(&bytes_of(&record), 10).unwrap().resume(&[], "");
        assert_eq!(resume.keep, record.keep, "an edited conversation is the same conversation");
        resume.keep = resume.keep.then(Keep { ttl_ms: None, pinned_until_ms: Some(9_000) });
        let next = Record::after(resume, messages, "[u] a", vec![1, 2, 3]);
        let stored = Stored::decode(&bytes_of(&next)).unwrap();
        assert_eq!((stored.ttl_ms, stored.pinned_until_ms), (Some(60_000), Some(9_000)));
    }

    #[test]
    fn a_truncated_record_is_gone_on_from_without_what_was_dropped() {
        let messages = vec![digest(&message("user", "u")), digest(&message("assistant", "a"))];
        let tokens: Vec<u32> = (0..40).collect();
        let record = Record::after(Resume::default(), messages.clone(), "[u] a", tokens);
        let mut stored = Stored::decode(&bytes_of(&record)).unwrap();
        stored.truncate(0, 1).unwrap();
        let record = Record::from_bytes(&stored.encode().unwrap(), 100).unwrap();
        let resume = record.resume(&messages, "[u] a [v]");
        assert_eq!(resume.tokens, (16..40).collect::<Vec<u32>>());
        let kept = Kept { start: stored.start(), tokens: 16 };
        assert_eq!(resume.kept.as_ref(), Some(&kept));
        let mut tokens = resume.tokens.clone();
        tokens.extend([41, 42]);
        let record = Record::after(resume, messages.clone(), "[u] a [v] b", tokens.clone());
        assert_eq!(record.resume(&messages, "[u] a [v] b c").tokens, tokens);
        // The runs go back to the daemon with the turn, and come back from it.
        let put = Stored::decode(&bytes_of(&record)).unwrap();
        assert_eq!((put.start(), put.dropped_tokens), (stored.start(), 16));
        assert_eq!(Record::from_bytes(&bytes_of(&record), 100), Some(record));
    }

    #[test]
    fn no_prompt_goes_on_from_among_what_a_truncation_kept() {
        let (mut messages, first) = one_turn();
        let first = Record { tokens: (0..20).collect(), ..first };
        let first = Record { cuts: vec![Cut { tokens: 20, ..first.cuts[0].clone() }], ..first };
        let earlier = messages.clone();
        messages.extend([digest(&message("user", "v")), digest(&message("assistant", "b"))]);
        let resume = first.resume(&messages, "[u] a [v] b");
        let second = Record::after(resume, messages.clone(), "[u] a [v] b", (0..70).collect());
        let mut stored = Stored::decode(&bytes_of(&second)).unwrap();
        stored.truncate(1, 1).unwrap();
        let record = Record::from_bytes(&stored.encode().unwrap(), 100).unwrap();
        // Behind all of it a prompt goes on; the first turn's end was dropped.
        let resume = record.resume(&messages, "[u] a [v] b [w]");
        assert_eq!((resume.tokens.len(), resume.cuts.len()), (54, 1));
        assert!(record.resume(&earlier, "[u] a [x]").tokens.is_empty());
    }

    #[test]
    fn bytes_that_are_no_record_are_refused() {
        let (_, record) = one_turn();
        let good = bytes_of(&record);
        for length in 0..good.len() {
            assert_eq!(Record::from_bytes(&good[..length], 10), None, "cut at {length}");
        }
        assert_eq!(Record::from_bytes(&good, 3), None, "an id outside the vocabulary");
        // Of the client's part, under a right checksum.
        for at in 0..8 {
            let mut bad = Stored::decode(&good).unwrap();
            bad.client[at] ^= 0x80;
            let bad = bad.encode().unwrap();
            assert_eq!(Record::from_bytes(&bad, 10), None, "a count changed at {at}");
        }
    }

    #[test]
    fn records_are_bounded_and_the_least_recently_used_goes_first() {
        let mut records = Records::default();
        let id = |n: usize| *blake3::hash(&n.to_le_bytes()).as_bytes();
        for n in 0..RECORDS_MAX {
            records.insert(id(n), Arc::default());
        }
        assert!(records.get(&id(0)).is_some());
        records.insert(id(RECORDS_MAX), Arc::default());
        assert_eq!(records.by_id.len(), RECORDS_MAX);
        assert!(records.get(&id(0)).is_some());
        assert!(records.get(&id(1)).is_none());
        let sizes: usize = records.by_id.values().map(|(record, _)| record.size_bytes()).sum();
        assert_eq!(records.size_bytes, sizes);
    }
}

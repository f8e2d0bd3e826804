//! Turns that their clients say will come: a user has begun to type.
//!
//! ```text
//! told ──hint──► Anticipation ──a request of the conversation──► its sequence's ask, under the same tag
//!                     └── none for ANTICIPATED_FOR, or ANTICIPATIONS_MAX newer ones ──► ended
//! ```
//!
//! A turn has one tag from the first word of it: the daemon sees an anticipated turn become a queued one,
//! never two.

use std::collections::VecDeque;
use std::time::Duration;

use crate::cache_client::{
    ANTICIPATED_FOR, ConversationId, Hint, RootKey, SequenceTag, Unavailable,
};
use crate::request::Anticipate;

use super::Engine;
use super::cache::Cache;

/// Turns foretold at once; beyond it the oldest gives way. As many users as type at one time on a
/// replica that serves some thousands; each costs its key list, here and with the daemon.
const ANTICIPATIONS_MAX: usize = 256;

#[derive(Debug)]
struct Anticipation {
    conversation: ConversationId,
    tag: SequenceTag,
    until: Duration,
}

/// All turns foretold, the one told longest ago first.
#[derive(Debug, Default)]
pub struct Anticipations {
    told: VecDeque<Anticipation>,
}

impl Anticipations {
    /// The tag of a conversation's anticipated turn, which is anticipated no more.
    pub fn take(&mut self, conversation: ConversationId) -> Option<SequenceTag> {
        let at = self.told.iter().position(|one| one.conversation == conversation)?;
        self.told.remove(at).map(|one| one.tag)
    }

    fn push(&mut self, conversation: ConversationId, tag: SequenceTag, until: Duration) {
        self.told.push_back(Anticipation { conversation, tag, until });
    }

    fn pop_expired(&mut self, now: Duration) -> Option<SequenceTag> {
        self.told.pop_front_if(|oldest| now >= oldest.until).map(|one| one.tag)
    }

    fn pop_surplus(&mut self) -> Option<SequenceTag> {
        let is_over = self.told.len() > ANTICIPATIONS_MAX;
        self.told.pop_front_if(|_| is_over).map(|one| one.tag)
    }

    /// When the first one ends.
    pub fn next_end(&self) -> Option<Duration> {
        self.told.front().map(|oldest| oldest.until)
    }
}

impl<C: Cache> Engine<C> {
    /// Tells the daemon what a turn will read before it is asked for.
    pub(super) fn anticipate(&mut self, turn: &Anticipate) -> Result<(), Unavailable> {
        let is_stopping = self.stopping.is_some();
        let cache = self.cache.as_mut().filter(|cache| cache.is_attached() && !is_stopping);
        let cache = cache.ok_or(Unavailable)?;
        let root = RootKey::new(&self.fingerprint, &turn.salt.0);
        let conversation = ConversationId::new(&root, turn.conversation.as_bytes());
        let known = self.anticipations.take(conversation);
        let tag = known.unwrap_or_else(|| {
            self.stats.anticipations.with_label_values(&["told"]).inc();
            self.histories.new_tag()
        });
        let start = turn.start.clone().filter(|start| start.root == root);
        let start = start.unwrap_or_else(|| self.config.shared_prefixes.start(root, &turn.tokens));
        let wanted = super::history::wanted(&self.state, &self.labels, start, turn.tokens.clone());
        cache.enqueue(tag, wanted, Hint::Anticipated);
        self.anticipations.push(conversation, tag, (self.clock)() + ANTICIPATED_FOR);
        if let Some(oldest) = self.anticipations.pop_surplus() {
            cache.end(oldest);
            self.stats.anticipations.with_label_values(&["gave_way"]).inc();
        }
        Ok(())
    }

    /// Ends what was foretold and did not come.
    pub(super) fn end_anticipations(&mut self) {
        let now = (self.clock)();
        while let Some(tag) = self.anticipations.pop_expired(now) {
            self.stats.anticipations.with_label_values(&["expired"]).inc();
            if let Some(cache) = &mut self.cache {
                cache.end(tag);
            }
        }
    }

    /// Another daemon is there, which knows nothing of what was foretold to the one before.
    pub(super) fn anticipate_again(&mut self) {
        let Some(cache) = &mut self.cache else { return };
        for anticipation in &self.anticipations.told {
            cache.hint(anticipation.tag, Hint::Anticipated);
        }
    }
}

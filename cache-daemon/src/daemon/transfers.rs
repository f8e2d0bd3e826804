//! Questions of transfers ([`crate::migrate::ask`]): answered at once, or when a disk thread has done its part.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Asker, Daemon, unix_ms};
use crate::migrate::ask::{Ask, Kept, Model, Refused, Reply};
use crate::tier::remote::{DELETE_MAX, Job};
use kv_protocol::{BlockKey, ConversationId, RootKey};

/// Records that are being read while transfers may ask for more.
const QUESTIONS_MAX: usize = 256;

/// Conversations offloaded at the end: more than go in the time there is.
const OFFLOADS_MAX: usize = 1024;
/// How long that may take: the tails of turns that just ended are written in what is left.
const OFFLOAD_TIME_MAX: Duration = Duration::from_secs(15);
const _: () = assert!(OFFLOAD_TIME_MAX.as_secs() < super::STOP_MAX.as_secs());

/// Who waits for a record.
pub(super) type RecordReply = Reply<Result<Option<Kept>, Refused>>;

impl Daemon {
    pub(super) fn answer_transfer(&mut self, ask: Ask) {
        // An answer that nobody waits for any more is as good as one that is read.
        match ask {
            Ask::Model(reply) => _ = reply.send(self.model()),
            Ask::Record { conversation, reply } => self.want_record(conversation, reply),
            Ask::Present { chain, reply } => self.store.want_present(chain, reply),
            Ask::Copy { key, root, reply } => self.store.want_copy(key, root, reply),
            Ask::Missing { keys, reply } => _ = reply.send(self.store.missing(keys)),
            Ask::Unowned { keys, reply } => {
                let owners = |key: &BlockKey| self.store.conversations.owners(key.short());
                _ = reply.send(keys.into_iter().filter(|key| owners(key) == 0).collect());
            }
            Ask::Place(incoming) if self.stop_since.is_some() => {
                _ = incoming.reply.send(Err(Refused::Stopping));
            }
            Ask::Place(incoming) => self.store.place(*incoming),
            Ask::PutRecord { conversation, kept, reply } => {
                let put = self.store.put_imported(conversation, &kept, unix_ms());
                let record = put.is_ok().then_some(kept.record);
                self.answer_questions(&conversation, record.as_ref()); // It may have been fetched for them.
                _ = reply.send(put);
            }
            Ask::NotFetched(conversation) => self.answer_questions(&conversation, None),
            Ask::Offloaded => self.offloading = false,
        }
    }

    /// A record that nobody here knows may be in the remote tier: `true` if that is asked.
    pub(super) fn may_fetch(&self, id: ConversationId) -> bool {
        !self.store.is_deleted(&id) && self.remote.as_ref().is_some_and(|remote| remote.fetch(id))
    }

    /// A conversation was deleted: its objects go, too.
    pub(super) fn delete_remote(&self, id: ConversationId, root: RootKey, keys: &[BlockKey]) {
        let Some(remote) = &self.remote else { return };
        if !remote.send(Job::Delete { id, known: Some((root, keys.to_vec())) }) {
            tracing::error!(%id, "too much waits for the remote tier: a deleted conversation's objects stay");
            self.metrics.remote.with_label_values(&["delete_failed"]).inc();
        }
    }

    /// Deletions that an earlier worker answered: whether their objects are gone it knew alone.
    pub(super) fn delete_remote_again(&mut self) {
        let Some(remote) = &self.remote else { return self.store.deletions.found.clear() };
        let oldest_ms = unix_ms().saturating_sub(DELETE_MAX.as_millis() as u64);
        while let Some((id, deleted_ms)) = self.store.deletions.found.pop() {
            // As many as the queue takes; the others at the next turn.
            if deleted_ms >= oldest_ms && !remote.send(Job::Delete { id, known: None }) {
                self.store.deletions.found.push((id, deleted_ms));
                return;
            }
        }
    }

    /// The daemon is to stop: what was used lately goes to the remote tier, the newest first.
    pub(super) fn begin_offload(&mut self) {
        let (Some(remote), Some(window)) = (&self.remote, self.remote_on_stop) else { return };
        let since_ms = unix_ms().saturating_sub(window.as_millis() as u64);
        let newest = self.store.conversations.before(None).map(|(age, _)| age);
        let recent = newest.take_while(|(used_ms, _)| *used_ms >= since_ms).take(OFFLOADS_MAX);
        let recent: Vec<ConversationId> = recent.map(|(_, id)| id).collect();
        let until = Instant::now() + OFFLOAD_TIME_MAX;
        self.offloading = !recent.is_empty() && remote.send(Job::Offload(recent, until));
    }

    fn model(&self) -> Result<Model, Refused> {
        let geometry = *self.store.geometry().ok_or(Refused::NoModel)?;
        Ok(Model { geometry, fingerprint: self.view.fingerprint() })
    }

    fn want_record(&mut self, id: ConversationId, reply: RecordReply) {
        if self.store.is_deleted(&id) {
            let _ = reply.send(Err(Refused::Deleted(id)));
        } else if self.questions.len() >= QUESTIONS_MAX {
            let _ = reply.send(Err(Refused::Busy));
        } else {
            self.get_conversation(id, Asker::Transfer(reply));
        }
    }

    /// A record, for a transfer: `None` if it is not known here.
    pub(super) fn kept(&self, id: &ConversationId, record: Option<Arc<[u8]>>) -> Option<Kept> {
        let updated_ms = self.store.conversations.get(id)?.updated_ms;
        Some(Kept { updated_ms, record: record? })
    }
}

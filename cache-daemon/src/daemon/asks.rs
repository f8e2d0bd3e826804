//! What the loop answers to the admin API.

use kv_protocol::ConversationId;

use super::{Asker, Daemon, unix_ms};
use crate::admin::{Ask, AskError, Deleted, Reply, Who};
use crate::attachment::Outgoing;
use crate::deletion::DeleteError;
use crate::outline::Outline;
use crate::tier::disk::{DiskError, Job};
use crate::transfer::DiskState;

/// Blocks looked at for one page of a list: a millisecond's work.
const PAGE_BLOCKS: usize = 1 << 13;
/// Roots named when a name is ambiguous.
const ROOTS_NAMED: usize = 8;

impl Daemon {
    pub(super) fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Page { after, reply } => reply.send(Ok(self.store.page(after, PAGE_BLOCKS))),
            Ask::Find { who, reply } => reply.send(self.find(&who)),
            Ask::Explain { id, reply } => {
                let explanation = self.store.explain(&id);
                reply.send(explanation.ok_or_else(|| no_conversation(&id)));
            }
            Ask::Record { id, reply } => {
                let Some(known) = self.store.conversations.get(&id) else {
                    return reply.send(Err(no_conversation(&id)));
                };
                self.get_conversation(id, Asker::Admin(known.updated_ms, reply));
            }
            Ask::PutRecord { id, record, replaces, reply } => {
                let there = self.store.conversations.get(&id).map(|known| known.updated_ms);
                if there != replaces {
                    return reply.send(Err(AskError::Changed { who: id.to_string() }));
                }
                if replaces.is_none() && self.store.refuses_record(&id) {
                    let told = "a conversation of that name was deleted and is not erased yet";
                    return reply.send(Err(AskError::NotNow(told.to_owned())));
                }
                let put = self.store.put_conversation(id, record, unix_ms());
                if put.is_ok() {
                    self.tell_changed(id, false);
                }
                reply.send(put.map_err(|error| AskError::Refused(error.to_string())));
            }
            Ask::Delete { id, reply } => self.delete(&id, reply),
            Ask::Verify { begin, reply } => {
                let state = if begin { self.store.verify() } else { Ok(self.store.verification()) };
                reply.send(state.map_err(|error| AskError::NotNow(error.to_string())));
            }
            Ask::Config { change, reply } => {
                let in_force = self.store.reconfigure(&change);
                reply.send(in_force.map_err(|error| AskError::Refused(error.to_string())));
            }
            Ask::Compact { reply } => {
                if self.compacting.is_some() {
                    return reply.send(Err(AskError::NotNow("it is compacted right now".into())));
                }
                if self.store.begin_compaction() {
                    self.compacting = Some(reply);
                } else {
                    let told =
                        "the disk tier cannot be compacted now: `kvctl status` shows its state";
                    reply.send(Err(AskError::NotNow(told.to_owned())));
                }
            }
        }
    }

    /// Unreadable from here on; the answer waits for the disk.
    fn delete(&mut self, id: &ConversationId, reply: Reply<Deleted>) {
        let now_ms = unix_ms();
        let root = self.store.conversations.get(id).map(|known| known.outline.root);
        let (doomed, tombstone) = match self.store.delete(id, now_ms) {
            Ok(deleted) => deleted,
            Err(DeleteError::Unknown) => return reply.send(Err(no_conversation(id))),
            Err(error) => return reply.send(Err(AskError::NotNow(error.to_string()))),
        };
        tracing::info!(conversation = %id, blocks = doomed.keys.len(), "deleted");
        if let Some(root) = root {
            self.delete_remote(*id, root, &doomed.keys);
        }
        self.tell_changed(*id, true);
        let has_disk = self.store.transfers.disk_state != DiskState::None;
        let deleted = Deleted {
            blocks: doomed.keys.len() as u64,
            blocks_shared: doomed.shared as u64,
            erased_by_ms: has_disk.then_some(now_ms + self.store.config.deletion_deadline_ms),
        };
        if !has_disk {
            return reply.send(Ok(deleted));
        }
        if self.store.disk.write(Job::Bury { id: *id, tombstone }).is_ok() {
            self.store.transfers.record_sent();
            self.deleting.entry(*id).or_default().push((deleted, reply));
        } else {
            reply.send(Err(not_durable("its queue is full")));
        }
    }

    /// Runtimes keep copies of records, and KV of their own.
    fn tell_changed(&mut self, id: ConversationId, is_deleted: bool) {
        for attachment in self.attachments.iter_mut().flatten() {
            attachment.answer(Outgoing::Changed { id, is_deleted });
        }
    }

    /// A tombstone is on disk, or not.
    pub(super) fn buried(&mut self, id: &ConversationId, error: Option<&DiskError>) {
        for (deleted, reply) in self.deleting.remove(id).unwrap_or_default() {
            reply.send(match error {
                None => Ok(deleted),
                Some(error) => Err(not_durable(&error.to_string())),
            });
        }
    }

    /// One walk over all outlines.
    fn find(&self, who: &Who) -> Result<ConversationId, AskError> {
        let is_it = |id: &ConversationId, outline: &Outline| match who {
            Who::Name { name, .. } if name.as_str() != &*outline.name => false,
            Who::Name { root: None, .. } => true,
            Who::Name { root: Some(digits), .. } => begins(&outline.root.0, digits),
            Who::Id(digits) => !digits.is_empty() && begins(&id.0, digits),
        };
        let all = self.store.conversations.iter();
        let mut found = all
            .filter(|(id, known)| is_it(id, &known.outline))
            .map(|(id, known)| (*id, known.outline.root.to_string()));
        let shown = match who {
            Who::Name { name, .. } => format!("{name:?}"),
            Who::Id(digits) => digits.clone(),
        };
        let Some((id, root)) = found.next() else {
            return Err(AskError::NoConversation { who: shown });
        };
        let mut roots = vec![root];
        let mut count = 1;
        for (_, root) in found {
            count += 1;
            if roots.len() < ROOTS_NAMED {
                roots.push(root);
            }
        }
        match count {
            1 => Ok(id),
            count => Err(AskError::Ambiguous { who: shown, count, roots: roots.join(", ") }),
        }
    }
}

fn not_durable(why: &str) -> AskError {
    AskError::NotNow(format!(
        "the conversation is unreadable now, but the disk could not be told, so a new worker may find it \
         again ({why}); delete it again when `kvctl status` shows the disk ready"
    ))
}

/// Whether a hash begins with these hexadecimal digits.
fn begins(hash: &[u8], digits: &str) -> bool {
    let halves = hash.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(u32::from);
    let mut asked = digits.chars().map(|digit| digit.to_digit(16));
    digits.len() <= 2 * hash.len()
        && halves.zip(&mut asked).all(|(half, digit)| Some(half) == digit)
}

pub(super) fn no_conversation(id: &ConversationId) -> AskError {
    AskError::NoConversation { who: id.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_known_by_its_first_digits() {
        let hash = [0xab, 0xc0, 0x12];
        for digits in ["", "a", "ab", "ABC", "abc012"] {
            assert!(begins(&hash, digits), "{digits}");
        }
        for digits in ["b", "abd", "xy", "abc0123", "é"] {
            assert!(!begins(&hash, digits), "{digits}");
        }
    }
}

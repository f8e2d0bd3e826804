//! Conversations whose records the daemon has changed or forgotten: the engine hears of them, http drops its
//! copies before it looks for one.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use kv_protocol::ConversationId;

/// Changes that wait for http to look; with more, all of its copies are dropped.
const CHANGES_MAX: usize = 4096;

/// What http's copies are not worth any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Stale {
    /// Nothing has changed.
    #[default]
    None,
    /// These.
    Some(HashSet<ConversationId>),
    /// Any.
    All,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Changes(Mutex<Stale>);

impl Changes {
    /// A record is another one.
    pub fn changed(&self, id: ConversationId) {
        let mut stale = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *stale {
            Stale::None => *stale = Stale::Some(HashSet::from([id])),
            Stale::Some(ids) if ids.len() >= CHANGES_MAX => *stale = Stale::All,
            Stale::Some(ids) => _ = ids.insert(id),
            Stale::All => {}
        }
    }

    /// What has changed since the last call.
    pub fn take(&self) -> Stale {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_once_and_too_many_are_all() {
        let changes = Changes::default();
        let id = |number: usize| ConversationId(*blake3::hash(&number.to_le_bytes()).as_bytes());
        changes.changed(id(1));
        changes.changed(id(1));
        assert_eq!(changes.take(), Stale::Some(HashSet::from([id(1)])));
        assert_eq!(changes.take(), Stale::None);
        (0..=CHANGES_MAX).for_each(|number| changes.changed(id(number)));
        assert_eq!(changes.take(), Stale::All);
    }
}

//! Which blocks leave with a conversation: those that only it has. Pure.
//!
//! Of its history, of histories before an edit, and of turns that were broken off behind its end. A block stays
//! if another record's chain has it, or a block that stays follows it; a partial one, if another
//! conversation ends in it as well.

use std::collections::HashSet;

use kv_protocol::{BlockKey, ConversationId};

use crate::conversation::Conversations;
use crate::directory::{Directory, EntryId};
use crate::tombstone::KEYS_MAX;

/// What a deletion concerns.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Doomed {
    /// Nobody else's.
    pub keys: Vec<BlockKey>,
    /// Blocks of its history that stay, for others.
    pub shared: usize,
}

/// What the deletion of a conversation concerns; `None` if there is none of that id.
pub fn doomed(
    directory: &Directory,
    conversations: &Conversations,
    id: &ConversationId,
) -> Option<Doomed> {
    let outline = &conversations.get(id)?.outline;
    let chain: HashSet<u64> = outline.blocks.iter().copied().collect();
    let short_of = |entry: EntryId| directory.key(entry).short();
    let own = outline.former.iter().rev().chain(outline.blocks.iter().rev());
    let own = own.filter_map(|short| directory.find_short(*short, &outline.root));
    let mut left: Vec<EntryId> = directory.ends_of(outline).chain(own).map(|(id, _)| id).collect();
    left.truncate(KEYS_MAX);
    let is_others = |entry: EntryId| {
        let short = short_of(entry);
        let is_end = |tokens: &[u32]| {
            let parent = directory.parent_key(entry).map(BlockKey::short);
            parent.is_some_and(|parent| conversations.is_end_of_another(parent, tokens, id))
        };
        conversations.owners(short) > u32::from(chain.contains(&short))
            || directory.tail(entry).is_some_and(|tokens| is_end(tokens))
    };
    let (mut gone, mut keys) = (HashSet::new(), Vec::new());
    // What follows others comes first, nearly always: few passes are made.
    loop {
        let before = keys.len();
        left.retain(|entry| {
            let short = short_of(*entry);
            let is_followed =
                || directory.followers(short).any(|(next, _)| !gone.contains(&short_of(next)));
            let stays = is_others(*entry) || is_followed();
            if !stays && gone.insert(short) {
                keys.push(*directory.key(*entry));
            }
            stays
        });
        if keys.len() == before {
            break;
        }
    }
    let shared = left.iter().filter(|entry| chain.contains(&short_of(**entry))).count();
    Some(Doomed { keys, shared })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kv_protocol::{Fingerprint, FrameIndex, NumericsTag, Record, RootKey, Variant};
    use proptest::prelude::*;

    use super::*;
    use crate::directory::{Description, Label};
    use crate::outline::Outline;

    const TOKENS_PER_BLOCK: usize = 4;

    /// Stores what a turn stores: the full blocks, and the end.
    fn store(directory: &mut Directory, conversations: &mut Conversations, tokens: &[u32]) {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        let label = Label {
            root,
            variant: Variant::Exact,
            numerics: NumericsTag::of("test"),
            disk_bytes: 1,
        };
        let mut parent = root.as_parent();
        for block in tokens.chunks(TOKENS_PER_BLOCK) {
            let key = BlockKey::child(&parent, block);
            let is_full = block.len() == TOKENS_PER_BLOCK;
            if directory.get(&key).is_none() {
                let description = Description { parent, label, tokens: block.into(), is_full };
                directory.insert(key, &description, 0, FrameIndex(0));
                conversations.goes_on(parent.short(), key.short(), block, is_full);
            }
            parent = key;
        }
    }

    fn put(conversations: &mut Conversations, name: u8, tokens: &[u32]) -> ConversationId {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        let record = Record::new(root, name.to_string(), TOKENS_PER_BLOCK as u16, tokens.to_vec());
        let id = ConversationId::new(&root, record.name.as_bytes());
        let outline = Outline::of(&record, &record.keys());
        conversations.put(id, name.into(), vec![name].into(), outline);
        id
    }

    /// The history up to and with each stored block.
    fn prefixes(tokens: &[u32]) -> BTreeSet<Vec<u32>> {
        let ends = (1..=tokens.len()).filter(|end| end % TOKENS_PER_BLOCK == 0);
        ends.chain([tokens.len()])
            .filter(|end| *end > 0)
            .map(|end| tokens[..end].to_vec())
            .collect()
    }

    proptest! {
        /// Few tokens, so that histories share beginnings and ends.
        #[test]
        fn what_leaves_is_what_no_other_history_begins_with(
            named in proptest::collection::vec(proptest::collection::vec(0u32..2, 1..18), 1..6),
            nameless in proptest::collection::vec(proptest::collection::vec(0u32..2, 1..18), 0..4),
            broken_off in proptest::collection::vec(0u32..2, 0..9),
        ) {
            let (mut directory, mut conversations) = (Directory::default(), Conversations::new(u64::MAX));
            let mut first = None;
            for (name, tokens) in named.iter().enumerate() {
                store(&mut directory, &mut conversations, tokens);
                let id = put(&mut conversations, name as u8, tokens);
                first = first.or(Some(id));
            }
            for tokens in &nameless {
                store(&mut directory, &mut conversations, tokens);
            }
            let longer = [named[0].as_slice(), &broken_off].concat();
            store(&mut directory, &mut conversations, &longer);
            let found = doomed(&directory, &conversations, &first.unwrap()).unwrap();
            let gone: HashSet<BlockKey> = found.keys.iter().copied().collect();
            prop_assert_eq!(gone.len(), found.keys.len());
            // The slow way: every stored beginning, and whose it is.
            let root = RootKey::new(&Fingerprint([1; 32]), b"");
            let key_of = |history: &[u32]| {
                let whole = history.len().div_ceil(TOKENS_PER_BLOCK) - 1;
                let (before, block) = history.split_at(whole * TOKENS_PER_BLOCK);
                let chain = root.chain(before, TOKENS_PER_BLOCK as u16);
                BlockKey::child(&chain.last().copied().unwrap_or_else(|| root.as_parent()), block)
            };
            for others in &named[1..] {
                for history in prefixes(others) {
                    prop_assert!(!gone.contains(&key_of(&history)), "another's: {:?}", history);
                }
            }
            let is_begun = |history: &[u32]| {
                named[1..].iter().chain(&nameless).any(|other| other.starts_with(history))
            };
            for history in prefixes(&named[0]) {
                if history.len() % TOKENS_PER_BLOCK == 0 && !is_begun(&history) {
                    prop_assert!(gone.contains(&key_of(&history)), "left: {:?}", history);
                }
            }
            // What stays is whole: nothing that stays follows what leaves.
            for key in &gone {
                for (next, _) in directory.followers(key.short()) {
                    prop_assert!(gone.contains(directory.key(next)));
                }
            }
        }
    }

    #[test]
    fn nothing_leaves_with_a_conversation_that_is_not_there() {
        let conversations = Conversations::new(1);
        assert_eq!(doomed(&Directory::default(), &conversations, &ConversationId([1; 32])), None);
    }
}

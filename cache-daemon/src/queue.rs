//! The queue as hints tell it: which turns wait (anticipated ones behind all others), in which order, and
//! which blocks each will read. Pure data.
//!
//! **Invariant:** `needs[key]` lists exactly the waiting turns whose chains have `key`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kv_protocol::BlockKey;

use crate::key_map::KeyMap;
use crate::policy::QueueTicket;
use crate::policy::lookahead::LookaheadWindow;

/// Name of a waiting turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TurnId(pub u128);

#[derive(Debug)]
struct Turn {
    keys: Vec<BlockKey>,
    blocks: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Queue {
    turns: BTreeMap<(QueueTicket, TurnId), Turn>,
    tickets: HashMap<TurnId, QueueTicket>,
    needs: KeyMap<BTreeSet<(QueueTicket, TurnId)>>,
    /// Of all turns, and how many of them have any: for the mean.
    blocks: u64,
    turns_with_blocks: u64,
    changed: Vec<BlockKey>,
}

impl Queue {
    /// Waiting turns.
    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// Whether no turn waits.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// A turn waits, or has another place or chain now. `blocks`: how many of its chain are known.
    pub fn place(&mut self, id: TurnId, ticket: QueueTicket, keys: &[BlockKey], blocks: u64) {
        self.remove(id);
        for key in keys {
            self.needs.entry(*key).or_default().insert((ticket, id));
        }
        self.changed.extend_from_slice(keys);
        self.blocks += blocks;
        self.turns_with_blocks += u64::from(blocks > 0);
        self.tickets.insert(id, ticket);
        self.turns.insert((ticket, id), Turn { keys: keys.to_vec(), blocks });
    }

    /// A waiting turn has another ticket.
    pub fn move_to(&mut self, id: TurnId, ticket: QueueTicket) {
        let Some(old) = self.ticket(id) else { return };
        if old != ticket
            && let Some(turn) = self.turns.get(&(old, id))
        {
            let (keys, blocks) = (turn.keys.clone(), turn.blocks);
            self.place(id, ticket, &keys, blocks);
        }
    }

    /// A waiting turn's ticket.
    pub fn ticket(&self, id: TurnId) -> Option<QueueTicket> {
        self.tickets.get(&id).copied()
    }

    /// A turn waits no more; the ticket that it had.
    pub fn remove(&mut self, id: TurnId) -> Option<QueueTicket> {
        let ticket = self.tickets.remove(&id)?;
        let turn = self.turns.remove(&(ticket, id))?;
        self.blocks -= turn.blocks;
        self.turns_with_blocks -= u64::from(turn.blocks > 0);
        for key in &turn.keys {
            if let Some(turns) = self.needs.get_mut(key) {
                turns.remove(&(ticket, id));
                if turns.is_empty() {
                    self.needs.remove(key);
                }
            }
        }
        self.changed.extend_from_slice(&turn.keys);
        Some(ticket)
    }

    /// The first turn that will read a block.
    pub fn first_turn(&self, key: &BlockKey) -> Option<QueueTicket> {
        self.needs.get(key)?.first().map(|(ticket, _)| *ticket)
    }

    /// The waiting turns' names, the next first.
    pub fn iter(&self) -> impl Iterator<Item = TurnId> {
        self.turns.keys().map(|(_, id)| *id)
    }

    /// `S_kv`: mean blocks of the waiting turns that have any.
    pub fn blocks_mean(&self) -> u64 {
        self.blocks.checked_div(self.turns_with_blocks).unwrap_or(1).max(1)
    }

    /// Ticket of the first turn outside a window; `None` if all are inside.
    pub fn first_outside(&self, window: LookaheadWindow) -> Option<QueueTicket> {
        let turns = usize::try_from(window.turns).unwrap_or(usize::MAX);
        self.turns.keys().nth(turns).map(|(ticket, _)| *ticket)
    }

    /// Blocks whose turns changed since the last call.
    pub fn take_changed(&mut self) -> Vec<BlockKey> {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u8) -> BlockKey {
        BlockKey([number; 32])
    }

    proptest! {
        /// Oracle: look through all turns.
        #[test]
        fn the_first_turn_of_a_block_is_that_of_a_walk_through_the_queue(
            changes in proptest::collection::vec(
                (0u128..6, proptest::option::of((0u64..9, proptest::collection::vec(0u8..8, 0..4)))),
                1..40,
            ),
        ) {
            let mut queue = Queue::default();
            let mut turns: BTreeMap<u128, (u64, Vec<u8>)> = BTreeMap::new();
            for (id, change) in changes {
                if let Some((ticket, numbers)) = change {
                    let keys: Vec<_> = numbers.iter().map(|number| key(*number)).collect();
                    queue.place(TurnId(id), QueueTicket(ticket), &keys, keys.len() as u64);
                    turns.insert(id, (ticket, numbers));
                } else {
                    let ticket = turns.remove(&id).map(|(ticket, _)| QueueTicket(ticket));
                    prop_assert_eq!(queue.remove(TurnId(id)), ticket);
                }
                for number in 0..8 {
                    let needs = turns.values().filter(|(_, numbers)| numbers.contains(&number));
                    let first = needs.map(|(ticket, _)| QueueTicket(*ticket)).min();
                    prop_assert_eq!(queue.first_turn(&key(number)), first);
                }
            }
        }
    }
}

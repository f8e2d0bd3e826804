//! CachedAttention's policies (ATC'24, 3.3): the queue says what will be read, and when.
//!
//! ```text
//! prefetch window   L_pw = C_mem / S_kv              turns, from the queue's head
//! eviction window   L_ew = (C_mem + C_disk) / S_kv   turns
//! ```
//!
//! `C_mem`, `C_disk`: capacities; `S_kv`: mean KV of a conversation. Ours are counted in blocks, which
//! are all of one size. Beyond the paper: the unit is a block, not a whole conversation, and what no
//! queued turn needs leaves by last use.

use kv_protocol::BlockKey;

use super::{Promote, View, first_by};

/// How many turns from the queue's head are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LookaheadWindow {
    /// Places below this are inside.
    pub turns: u64,
}

/// `S_kv`: mean blocks of the queued turns that have any history.
fn blocks_mean(view: &View) -> u64 {
    let with_history = view.turns.iter().filter(|turn| turn.blocks > 0);
    let (turns, blocks) =
        with_history.fold((0, 0), |(turns, sum), turn| (turns + 1, sum + u64::from(turn.blocks)));
    blocks.checked_div(turns).unwrap_or(1).max(1)
}

/// `L_pw = C_mem / S_kv`, at least the next turn.
pub fn prefetch_window(view: &View) -> LookaheadWindow {
    LookaheadWindow { turns: u64::max(view.host_blocks / blocks_mean(view), 1) }
}

/// `L_ew = (C_mem + C_disk) / S_kv`, at least the next turn.
pub fn eviction_window(view: &View) -> LookaheadWindow {
    let turns = (view.host_blocks + view.disk_blocks) / blocks_mean(view);
    LookaheadWindow { turns: u64::max(turns, 1) }
}

/// Disk-resident KV of the turns in the prefetch window, in the order of their turns.
pub fn promote(view: &View) -> Vec<Promote> {
    let window = prefetch_window(view);
    let inside = view.turns.iter().zip(0..).filter(|(_, nth)| *nth < window.turns);
    inside
        .flat_map(|(turn, _)| turn.on_disk.iter().map(|&key| Promote { key, place: turn.place }))
        .collect()
}

/// First what no turn in the eviction window needs, least recently used first; then what the turns
/// nearest the window's tail need. Of one chain, the last block first.
pub fn evict(view: &View, need: usize) -> Vec<BlockKey> {
    let window = eviction_window(view);
    first_by(view, need, |resident| {
        let turn = resident.turn.filter(|&place| u64::from(place) < window.turns);
        let not_needed_first = turn.is_some();
        let tail_first = std::cmp::Reverse(turn);
        let oldest_first = if turn.is_none() { resident.used_ms } else { 0 };
        (not_needed_first, tail_first, oldest_first, std::cmp::Reverse(resident.depth))
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{key, resident, turn};
    use super::*;

    #[test]
    fn windows_follow_the_papers_formulas() {
        let view = View {
            turns: vec![turn(0, 4, &[]), turn(1, 8, &[]), turn(2, 0, &[])],
            host_blocks: 60,
            disk_blocks: 120,
            ..View::default()
        };
        assert_eq!(prefetch_window(&view).turns, 10); // 60 / mean(4, 8)
        assert_eq!(eviction_window(&view).turns, 30);
    }

    #[test]
    fn turns_beyond_the_prefetch_window_wait() {
        let view = View {
            turns: vec![turn(0, 2, &[1]), turn(1, 2, &[2, 3]), turn(2, 2, &[4])],
            host_blocks: 4, // Two turns of two blocks.
            ..View::default()
        };
        let keys: Vec<_> = promote(&view).iter().map(|promote| promote.key).collect();
        assert_eq!(keys, [key(1), key(2), key(3)]);
    }

    #[test]
    fn blocks_that_no_turn_needs_leave_first_and_oldest_first() {
        let view = View {
            residents: vec![
                resident(1, 10, Some(0)),
                resident(2, 30, None),
                resident(3, 20, None),
                resident(4, 5, Some(3)),
            ],
            host_blocks: 100,
            ..View::default()
        };
        assert_eq!(evict(&view, 4), [key(3), key(2), key(4), key(1)]);
        assert_eq!(evict(&view, 1), [key(3)]);
    }

    #[test]
    fn a_turn_outside_the_eviction_window_protects_nothing() {
        let view = View {
            residents: vec![resident(1, 10, Some(9)), resident(2, 20, None)],
            turns: vec![turn(9, 2, &[])],
            host_blocks: 4,
            disk_blocks: 4,
        };
        assert_eq!(evict(&view, 1), [key(1)]); // Window of 4 turns; place 9 is outside, and older.
    }

    #[test]
    fn of_one_chain_the_last_block_leaves_first() {
        let mut view = View { host_blocks: 8, ..View::default() };
        for depth in 0..3u8 {
            let mut block = resident(depth, 10, None);
            block.depth = depth.into();
            view.residents.push(block);
        }
        assert_eq!(evict(&view, 3), [key(2), key(1), key(0)]);
    }
}

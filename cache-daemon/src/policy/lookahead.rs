//! CachedAttention's policies (ATC'24, 3.3): the queue says what will be read, and when.
//!
//! ```text
//! prefetch window   L_pw = C_mem / S_kv              turns, from the queue's head
//! eviction window   L_ew = (C_mem + C_disk) / S_kv   turns
//! ```
//!
//! `C_mem`, `C_disk`: capacities; `S_kv`: mean KV of a queued turn's conversation. Ours are counted in
//! blocks, which are all of one size. Beyond the paper: the unit is a block, not a whole conversation; what
//! no queued turn needs leaves by last use (a return foretold from pauses does not help, docs/adr/0018); and
//! turns beyond the eviction window leave by place as well, the farthest first.
//!
//! With that order the eviction window needs no rule of its own: what a turn inside it needs leaves the disk
//! only when nothing outside is left there, and then the turn that arrived last gives way.

use super::{Known, QueueTicket, Rank};

/// How many turns from the queue's head are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LookaheadWindow {
    /// Places below this are inside.
    pub turns: u64,
}

/// `L_pw = C_mem / S_kv`, at least the next turn.
pub fn prefetch_window(host_blocks: u64, blocks_mean: u64) -> LookaheadWindow {
    LookaheadWindow { turns: u64::max(host_blocks / blocks_mean.max(1), 1) }
}

/// `L_ew = (C_mem + C_disk) / S_kv`, at least the next turn.
pub fn eviction_window(host_blocks: u64, disk_blocks: u64, blocks_mean: u64) -> LookaheadWindow {
    prefetch_window(host_blocks + disk_blocks, blocks_mean)
}

/// Classes of blocks; the lower leaves first.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Class {
    /// No turn needs it: least recently used first.
    NotNeeded = Rank::CLASS_FIRST,
    /// A queued turn needs it: the farthest from the queue's head first.
    Queued,
}

/// First what no queued turn needs, then queued turns from the farthest place inwards.
pub fn rank(known: &Known) -> Rank {
    let (class, order) = match known.turn {
        Some(ticket) => (Class::Queued, farthest_first(ticket.0)),
        None => (Class::NotNeeded, known.used_ms),
    };
    Rank::new(class as u8, order, known.depth)
}

fn farthest_first(distance: u64) -> u64 {
    Rank::ORDER_MAX - distance.min(Rank::ORDER_MAX)
}

const _: () =
    assert!(Class::Queued as u8 <= Rank::CLASS_LAST, "pinned blocks have classes of their own");

/// Whether a block may leave host memory so that a turn's block can come before it is asked for: never one
/// that this turn or an earlier one needs.
pub fn may_displace(victim: Option<QueueTicket>, for_turn: QueueTicket) -> bool {
    victim.is_none_or(|victim| victim > for_turn)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{known, queued};
    use super::*;

    #[test]
    fn windows_follow_the_papers_formulas() {
        assert_eq!(prefetch_window(60, 6).turns, 10);
        assert_eq!(eviction_window(60, 120, 6).turns, 30);
        assert_eq!(prefetch_window(4, 6).turns, 1); // The next turn at least.
    }

    #[test]
    fn blocks_that_no_turn_needs_leave_first_and_oldest_first() {
        let leaving = [known(20), known(30), queued(5, 3), queued(10, 0)].map(|known| rank(&known));
        assert!(leaving.is_sorted());
    }

    #[test]
    fn of_one_chain_the_last_block_leaves_first() {
        let depth = |depth| rank(&Known { depth, ..known(10) });
        assert!(depth(2) < depth(1));
        assert!(depth(1) < depth(0));
    }

    #[test]
    fn a_promote_displaces_only_what_later_turns_need() {
        let turn = QueueTicket(5);
        assert!(may_displace(None, turn));
        assert!(may_displace(Some(QueueTicket(6)), turn));
        assert!(!may_displace(Some(turn), turn));
        assert!(!may_displace(Some(QueueTicket(4)), turn));
    }
}

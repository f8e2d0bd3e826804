//! The engine's doorbell: one futex word that http, the backend and the daemon ring alike.
//!
//! Before the first attach the word is private memory; from then on it is the attachment's word in the
//! region, which the daemon can ring too. A switch of words wakes the waiter, so no ring is lost.

use std::cell::Cell;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kv_protocol::sync::AtomicU32;
use kv_protocol::table::RegionView;
use kv_protocol::{AttachmentId, DoorbellWord};

/// The waiting end; the engine thread owns it.
#[derive(Debug, Default)]
pub struct Doorbell {
    bell: Arc<Bell>,
    /// Word (by its switch) and number of rings seen at the last return of `wait`.
    last: Cell<(u64, u32)>,
}

/// A ringing end.
#[derive(Debug, Clone)]
pub struct Waker {
    bell: Arc<Bell>,
}

#[derive(Debug, Default)]
struct Bell {
    rings: AtomicU32,
    waiting: AtomicU32,
    current: RwLock<Current>,
}

#[derive(Debug, Clone, Default)]
struct Current {
    /// Counts switches.
    switches: u64,
    region: Option<(RegionView, AttachmentId)>,
}

impl Current {
    fn word<'a>(&'a self, bell: &'a Bell) -> DoorbellWord<'a> {
        match &self.region {
            Some((view, id)) => view.doorbell(*id),
            None => DoorbellWord { rings: &bell.rings, waiting: &bell.waiting },
        }
    }
}

impl Doorbell {
    /// A silent bell.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handle that rings this bell.
    pub fn waker(&self) -> Waker {
        Waker { bell: self.bell.clone() }
    }

    /// Returns when the bell was rung since the last call, or after `limit`; at times for no reason.
    pub fn wait(&self, limit: Duration) {
        // Cloned, not held: a switch must not wait for a sleeper.
        let current = self.bell.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let word = current.word(&self.bell);
        let (switches, seen) = self.last.get();
        if switches == current.switches && word.seen() == seen {
            word.wait(seen, limit);
        }
        self.last.set((current.switches, word.seen()));
    }
}

impl Waker {
    /// Wakes the engine, now or when it next waits.
    pub fn ring(&self) {
        // Held while ringing: a switch comes before (we ring the new word) or after (it wakes).
        let current = self.bell.current.read().unwrap_or_else(PoisonError::into_inner);
        current.word(&self.bell).ring();
    }

    /// From now on the bell's word is the attachment's.
    pub(super) fn switch(&self, view: RegionView, id: AttachmentId) {
        let mut current = self.bell.current.write().unwrap_or_else(PoisonError::into_inner);
        let before = current.clone();
        current.switches += 1;
        current.region = Some((view, id));
        drop(current);
        before.word(&self.bell).ring(); // Who sleeps on the old word looks again.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::Region;
    use kv_protocol::layout::FRAME_TABLE_AT;

    const FOREVER: Duration = Duration::from_hours(1); // A lost ring hangs the test.

    fn region() -> RegionView {
        RegionView::new(Region::heap(FRAME_TABLE_AT))
    }

    #[test]
    fn a_ring_before_the_wait_is_not_lost() {
        let doorbell = Doorbell::new();
        doorbell.waker().ring();
        doorbell.wait(FOREVER);
    }

    #[test]
    fn a_ring_on_the_private_word_is_not_lost_by_a_switch() {
        let doorbell = Doorbell::new();
        doorbell.waker().ring();
        doorbell.waker().switch(region(), AttachmentId::new(0).unwrap());
        doorbell.wait(FOREVER);
    }

    #[test]
    fn the_daemons_ring_wakes_the_engine() {
        let (doorbell, view, id) = (Doorbell::new(), region(), AttachmentId::new(1).unwrap());
        doorbell.waker().switch(view.clone(), id);
        doorbell.wait(FOREVER); // The switch itself.
        std::thread::scope(|scope| {
            scope.spawn(|| view.doorbell(id).ring());
            doorbell.wait(FOREVER);
        });
    }

    #[test]
    fn a_wait_without_a_ring_ends_at_its_limit() {
        Doorbell::new().wait(Duration::ZERO);
    }
}

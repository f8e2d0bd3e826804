//! A doorbell: one futex word that many ring and one waits on, within a process or across two.
//!
//! The waiter reads the word, looks for work, and waits only if the word is still the same: a ring
//! between look and wait is never lost.

use std::time::Duration;

use rustix::thread::futex;

use crate::sync::{AtomicU32, Ordering};

/// The two words of a doorbell, in the region or in private memory.
#[derive(Clone, Copy, Debug)]
pub struct DoorbellWord<'a> {
    /// Counts rings.
    pub rings: &'a AtomicU32,
    /// 1 from when somebody waits to the first ring: only that one needs a system call.
    pub waiting: &'a AtomicU32,
}

impl DoorbellWord<'_> {
    /// What to give to [`DoorbellWord::wait`] after having looked for work.
    pub fn seen(&self) -> u32 {
        self.rings.load(Ordering::SeqCst)
    }

    /// Wakes the waiter, now or when it next waits.
    pub fn ring(&self) {
        // SeqCst, here and in `wait`: ringer writes `rings` then reads `waiting`, the waiter writes
        // `waiting` then reads `rings` (in the kernel). Were either pair reordered, both could miss.
        // Whoever takes the 1 away wakes: the waiter, awake but not yet running, needs no second wake,
        // and it reads `rings` before it waits again.
        self.rings.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) != 0 && self.waiting.swap(0, Ordering::SeqCst) != 0 {
            // Not FUTEX_PRIVATE: the waiter may be another process. An error would mean a bad address.
            let _ = futex::wake(self.rings, futex::Flags::empty(), 1);
        }
    }

    /// Returns at the first ring after `seen` was read, or after `timeout`, or spuriously.
    pub fn wait(&self, seen: u32, timeout: Duration) {
        self.waiting.store(1, Ordering::SeqCst);
        if self.rings.load(Ordering::SeqCst) == seen {
            let limit = futex::Timespec {
                tv_sec: timeout.as_secs() as i64,
                tv_nsec: timeout.subsec_nanos().into(),
            };
            // EAGAIN (rung meanwhile), EINTR and ETIMEDOUT all mean: look again.
            let _ = futex::wait(self.rings, futex::Flags::empty(), seen, Some(&limit));
        }
        self.waiting.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_lost() {
        let (rings, waiting) = (AtomicU32::new(0), AtomicU32::new(0));
        let bell = DoorbellWord { rings: &rings, waiting: &waiting };
        let seen = bell.seen();
        bell.ring();
        bell.wait(seen, Duration::from_hours(1)); // Would hang the test if it were lost.
    }

    #[test]
    fn a_ring_wakes_a_waiter_in_another_thread() {
        let (rings, waiting) = (AtomicU32::new(0), AtomicU32::new(0));
        let bell = DoorbellWord { rings: &rings, waiting: &waiting };
        let seen = bell.seen();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while bell.seen() == seen {
                    bell.wait(seen, Duration::from_hours(1));
                }
            });
            bell.ring();
        });
    }
}

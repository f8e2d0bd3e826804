//! Threads that share one parallel region after another, without allocating.
//!
//! A region is a number of items and a function; the calling thread and the helpers draw items from
//! one counter until none is left. Which thread runs an item never changes a result, so a late
//! helper costs nothing but its help: the caller waits only for helpers that have entered.
//!
//! ```text
//! state = generation « 32 | open « 31 | helpers inside
//!
//! caller: publish job ─► open ─► draw items … ─► close ─► wait until no helper is inside
//! helper: sees a new generation ─► enter (only while open) ─► draw items … ─► leave
//! ```
//!
//! Why unsafe: helpers call a function that lives on the caller's stack. What must hold: no helper
//! uses it after the region's end. Who guarantees it: a helper enters by compare-and-swap on an open
//! state only, and [`Pool::run`] returns only once the state is closed with nobody inside.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};

/// Threads that one pool may have; beyond this the barrier costs more than the help is worth.
pub const THREADS_MAX: usize = 256;

/// How often an idle helper looks for work before it sleeps: some 50 µs, longer than the serial
/// parts between two regions of one step, shorter than a scheduler's time slice.
const SPINS_BEFORE_SLEEP: u32 = 2_000;

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const GENERATION: u64 = 1 << 32;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    items: AtomicUsize,
    next: AtomicUsize,
    sleeping: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: `job` is written by the caller only while the region is closed and empty, and read by
// helpers only inside an open region; the other fields are atomics.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is used inside its region only.
unsafe impl Send for Shared {}

/// A pool. Dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool that runs regions on `threads` threads, the caller's own among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            items: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let mut helpers = Vec::new();
        for index in 1..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("compute-{index}"));
            helpers.push(builder.spawn(move || shared.help())?);
        }
        let threads = helpers.iter().map(|helper| helper.thread().clone()).collect();
        Ok(Self { shared, helpers, threads })
    }

    /// Threads that work on a region.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `job(item)` once for each item below `items`, on several threads; returns when all
    /// calls have returned. Needs `&mut`: one region at a time.
    pub fn run(&mut self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || self.helpers.is_empty() {
            (0..items).for_each(job);
            return;
        }
        let shared = &*self.shared;
        // The lifetime goes: the region ends before this function returns (module doc).
        let erased: *const (dyn Fn(usize) + Sync + '_) = job;
        // SAFETY: only the lifetime changes; both are fat pointers of the same trait object.
        #[expect(clippy::transmute_ptr_to_ptr, reason = "a cast cannot drop the lifetime")]
        let erased =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(erased) };
        // SAFETY: the region is closed and nobody is inside, so no helper reads `job`.
        unsafe { *shared.job.get() = Some(erased) };
        shared.items.store(items, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let generation =
            (shared.state.load(Ordering::Relaxed) & !INSIDE & !OPEN).wrapping_add(GENERATION);
        // SYNC region-open: pairs with the Acquire of the compare-exchange in `enter`. SeqCst,
        // because it must also come before the look at `sleeping` (a helper does the reverse).
        shared.state.store(generation | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(Thread::unpark);
        }
        let close = CloseOnDrop(shared);
        shared.draw(job);
        drop(close);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a compute thread panicked");
    }
}

/// Ends the region even when an item panics on the caller's thread.
struct CloseOnDrop<'a>(&'a Shared);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.next.store(usize::MAX / 2, Ordering::Relaxed); // Nothing more is drawn.
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_u32;
        // SYNC region-left: pairs with the Release in `leave`.
        while self.0.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins > SPINS_BEFORE_SLEEP {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Shared {
    fn draw(&self, job: &(dyn Fn(usize) + Sync)) {
        let items = self.items.load(Ordering::Relaxed);
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            job(item);
        }
    }

    /// Enters the region of `state` if it is still open and unchanged but for others entering.
    fn enter(&self, mut state: u64) -> bool {
        let generation = state & !INSIDE;
        while state & OPEN != 0 && state & !INSIDE == generation {
            match self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    fn help(&self) {
        let mut seen = 0_u64;
        let mut spins = 0_u32;
        while !self.stop.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            let generation = state / GENERATION;
            if generation != seen && self.enter(state) {
                seen = generation;
                spins = 0;
                // SAFETY: inside an open region: the caller wrote `job` before opening it.
                let job = unsafe { (*self.job.get()).expect("an open region has a job") };
                // SAFETY: the caller waits in `CloseOnDrop` until this thread has left, so what the
                // pointer names is still borrowed by `run`.
                let job = unsafe { &*job };
                let drawn = std::panic::AssertUnwindSafe(|| self.draw(job));
                if std::panic::catch_unwind(drawn).is_err() {
                    self.panicked.store(true, Ordering::Relaxed); // `run` panics in its turn.
                }
                self.state.fetch_sub(1, Ordering::Release);
                continue;
            }
            spins += 1;
            if spins < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop();
                continue;
            }
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            // Looks once more: a region opened before the line above did not see this sleeper.
            let state = self.state.load(Ordering::SeqCst);
            if (state & OPEN == 0 || state / GENERATION == seen)
                && !self.stop.load(Ordering::SeqCst)
            {
                std::thread::park();
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for helper in self.helpers.drain(..) {
            drop(helper.join()); // A helper's panic was already reported by `run`.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn every_item_runs_exactly_once_in_each_of_many_regions() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for items in (0..300).chain([10_000]) {
                let counts: Vec<AtomicU32> = (0..items).map(|_| AtomicU32::new(0)).collect();
                pool.run(items, &|item| {
                    counts[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_an_item_reaches_the_caller() {
        let mut pool = Pool::new(3).unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, &|item| assert!(item != 57, "item 57"));
        }));
        assert!(caught.is_err());
    }
}

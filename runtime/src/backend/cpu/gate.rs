//! How far a load or a save has come, layer by layer.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a layer's waiter finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The layer's bytes are where they should be.
    Arrived,
    /// They never will be.
    Failed,
}

#[derive(Debug, Default)]
struct Progress {
    layers: usize,
    failed: bool,
}

/// Opens layer by layer, in order; opened by the copier, waited for by the compute thread.
#[derive(Debug, Default)]
pub struct Gate {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Gate {
    /// Layers below `layers` have arrived.
    pub fn open_to(&self, layers: usize) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.layers = progress.layers.max(layers);
        drop(progress);
        self.changed.notify_all();
    }

    /// No further layer arrives.
    pub fn fail(&self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).failed = true;
        self.changed.notify_all();
    }

    /// Blocks until `layer` has arrived or the whole has failed; adds the time to `waited`.
    pub fn wait(&self, layer: usize, waited: &mut Duration) -> Arrival {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.layers <= layer && !progress.failed {
            let start = Instant::now();
            progress = self
                .changed
                .wait_while(progress, |progress| progress.layers <= layer && !progress.failed)
                .unwrap_or_else(PoisonError::into_inner);
            *waited += start.elapsed();
        }
        // A failure spoils the layers that arrived before it as well: the row is recomputed whole.
        if progress.failed { Arrival::Failed } else { Arrival::Arrived }
    }
}

#[cfg(test)]
mod tests {
    use super::{Arrival, Gate};
    use std::time::Duration;

    #[test]
    fn a_layer_below_the_opening_is_not_waited_for() {
        let gate = Gate::default();
        gate.open_to(3);
        let mut waited = Duration::ZERO;
        assert_eq!(gate.wait(2, &mut waited), Arrival::Arrived);
        assert_eq!(waited, Duration::ZERO);
    }

    #[test]
    fn a_failure_reaches_a_waiter() {
        let gate = Gate::default();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| gate.wait(5, &mut Duration::default()));
            gate.open_to(2);
            gate.fail();
            assert_eq!(waiter.join().unwrap(), Arrival::Failed);
        });
    }
}

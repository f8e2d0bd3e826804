//! When a conversation is expected to ask again: an estimate of its pauses, from its own and everybody's.
//!
//! Pauses are log-normal in the main. Of `n` pauses of its own, whose logarithms sum to `s`, and a population
//! whose logarithms have the mean `m` and the deviation `d`:
//!
//! ```text
//! expected   exp((PRIOR · m + s) / (PRIOR + n))
//! given up   exp(the same + PATIENCE · d): most that return have done so by then
//! ```
//!
//! Pure: times come in as lengths.

/// How many pauses of its own the population's mean counts for.
const PRIOR: f64 = 4.0;
/// Deviations after the expected pause at which a conversation is not waited for any more.
const PATIENCE: f64 = 1.0;
/// Pauses seen before anything is foretold.
const SEEN_MIN: f64 = 32.0;

/// One conversation's pauses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Own {
    count: f64,
    sum: f64,
}

/// A pause to come; milliseconds from the last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foretold {
    /// It ends about then.
    pub returns_after_ms: u64,
    /// If it has not ended by then, it may never.
    pub given_up_after_ms: u64,
}

/// The pauses of all conversations: mean and deviation of their logarithms (Welford).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pauses {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Pauses {
    /// A pause has ended.
    pub fn observe(&mut self, own: &mut Own, pause_ms: u64) {
        let log = (pause_ms.max(1) as f64).ln();
        (own.count, own.sum) = (own.count + 1.0, own.sum + log);
        self.count += 1.0;
        let from_old = log - self.mean;
        self.mean += from_old / self.count;
        self.squares += from_old * (log - self.mean);
    }

    /// How long the next pause will be; `None` before enough were seen.
    pub fn foretell(&self, own: &Own) -> Option<Foretold> {
        if self.count < SEEN_MIN {
            return None;
        }
        let expected = (PRIOR * self.mean + own.sum) / (PRIOR + own.count);
        let deviation = (self.squares / self.count).sqrt();
        let ms = |log: f64| log.exp() as u64; // Saturates.
        let given_up_after_ms = ms(expected + PATIENCE * deviation);
        Some(Foretold { returns_after_ms: ms(expected), given_up_after_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newcomer_is_expected_as_everybody_is_and_a_known_one_as_itself() {
        let mut pauses = Pauses::default();
        let (mut quick, mut slow) = (Own::default(), Own::default());
        assert_eq!(pauses.foretell(&quick), None);
        for _ in 0..50 {
            pauses.observe(&mut quick, 1_000);
            pauses.observe(&mut slow, 100_000);
        }
        let expected = |own: &Own| pauses.foretell(own).unwrap().returns_after_ms;
        assert!((9_900..10_100).contains(&expected(&Own::default())), "the geometric mean");
        assert!(expected(&quick) < 2_000);
        assert!(expected(&slow) > 50_000);
        let foretold = pauses.foretell(&slow).unwrap();
        assert!(foretold.given_up_after_ms > foretold.returns_after_ms);
    }
}

//! Conversations drawn from a table of lengths, after the paper's set-up. Seeded: a setting and a seed
//! give the same trace everywhere.

use std::io::Read;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Bernoulli, Distribution, Exp, LogNormal, Uniform};

use super::trace::{Trace, TraceTurn, When};

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The table of lengths.
    #[error("table of lengths: {0}")]
    Lengths(#[from] csv::Error),
    /// No conversation in it.
    #[error("table of lengths: no conversation in it")]
    Empty,
    /// A number outside its law's domain.
    #[error("{what} of {value} is not possible")]
    Law {
        /// Which.
        what: &'static str,
        /// Given.
        value: f64,
    },
}

/// How long people wait before they ask again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pause {
    /// Exponential, with this mean in seconds.
    Exponential(f64),
    /// Log-normal, with this median in seconds and this sigma.
    LogNormal(f64, f64),
}

/// What to draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Population {
    /// Conversations.
    pub sessions: u32,
    /// Poisson, a second.
    pub sessions_per_s: f64,
    /// Before each later turn.
    pub pause: Pause,
    /// Conversations are cut here.
    pub turns_max: usize,
    /// Share of conversations that are cut to one turn.
    pub one_turn: f64,
    /// Tokens of the model's context; what would pass it halves the history.
    pub context: u32,
    /// Tokens of a block: histories are cut between blocks.
    pub block_tokens: u32,
    /// Of the generator.
    pub seed: u64,
}

/// Tokens of a turn: asked, answered.
type Lengths = (u32, u32);

/// Reads `conversation,turn,user_tokens,assistant_tokens`.
pub fn read_lengths(reader: impl Read) -> Result<Vec<Vec<Lengths>>, GenerateError> {
    let mut conversations: Vec<Vec<Lengths>> = Vec::new();
    let mut last = None;
    for row in csv::Reader::from_reader(reader).deserialize() {
        let (conversation, _, user, assistant): (u32, u32, u32, u32) = row?;
        if last != Some(conversation) {
            last = Some(conversation);
            conversations.push(Vec::new());
        }
        if let Some(turns) = conversations.last_mut() {
            turns.push((user, assistant));
        }
    }
    Ok(conversations)
}

/// Draws a trace.
pub fn generate(
    name: &str,
    lengths: &[Vec<Lengths>],
    population: &Population,
) -> Result<Trace, GenerateError> {
    if lengths.is_empty() {
        return Err(GenerateError::Empty);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(population.seed);
    let rate = population.sessions_per_s;
    let gaps = law("arrivals a second", rate, Exp::new(rate))?;
    let share = population.one_turn;
    let one_turn = law("share of single turns", share, Bernoulli::new(share))?;
    let pause: Box<dyn Fn(&mut ChaCha8Rng) -> f64> = match population.pause {
        Pause::Exponential(mean) => {
            let law = law("mean pause", mean, Exp::new(1.0 / mean))?;
            Box::new(move |rng| law.sample(rng))
        }
        Pause::LogNormal(median, sigma) => {
            let law = law("sigma of pauses", sigma, LogNormal::new(median.ln(), sigma))?;
            Box::new(move |rng| law.sample(rng))
        }
    };
    let (mut turns, mut order, mut at) = (Vec::new(), Vec::new(), 0.0);
    for conversation in 0..population.sessions {
        if order.is_empty() {
            order = shuffled(lengths.len(), &mut rng);
        }
        let drawn = &lengths[order.pop().unwrap_or(0)];
        at += gaps.sample(&mut rng);
        let count = if one_turn.sample(&mut rng) { 1 } else { population.turns_max };
        let mut history = 0;
        for (nth, &(user, assistant)) in drawn.iter().take(count).enumerate() {
            let when = match nth {
                0 => When::AtMs((at * 1e3) as u64),
                _ => When::AfterMs((pause(&mut rng) * 1e3) as u64),
            };
            let answer = assistant.min(population.context / 2);
            let new = user.min(population.context - answer);
            let cut = overflow(history, new + answer, population);
            history = history - cut + new + answer;
            turns.push(TraceTurn { conversation, tenant: 0, when, cut, new, answer, blocks: None });
        }
    }
    Ok(Trace::new(name, population.block_tokens, turns))
}

/// Tokens to drop so that `more` fit: half of the history, rounded up to blocks, as often as it takes.
fn overflow(history: u32, more: u32, population: &Population) -> u32 {
    let mut left = history;
    while left > 0 && left + more > population.context {
        let half = left.div_ceil(2).next_multiple_of(population.block_tokens);
        left = left.saturating_sub(half);
    }
    history - left
}

/// Fisher and Yates.
fn shuffled(count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        if let Ok(law) = Uniform::new_inclusive(0, last) {
            order.swap(last, law.sample(rng));
        }
    }
    order
}

fn law<T, E>(what: &'static str, value: f64, law: Result<T, E>) -> Result<T, GenerateError> {
    law.map_err(|_| GenerateError::Law { what, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn population(seed: u64) -> Population {
        Population {
            sessions: 50,
            sessions_per_s: 1.0,
            pause: Pause::Exponential(10.0),
            turns_max: 30,
            one_turn: 0.27,
            context: 512,
            block_tokens: 64,
            seed,
        }
    }

    fn lengths() -> Vec<Vec<Lengths>> {
        (1..9).map(|turns| vec![(20 * turns, 90); turns as usize]).collect()
    }

    #[test]
    fn a_seed_gives_one_trace() {
        let draw = |seed| generate("x", &lengths(), &population(seed)).unwrap().digest().unwrap();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn no_turn_passes_the_context() {
        let trace = generate("x", &lengths(), &population(1)).unwrap();
        let mut history = std::collections::HashMap::<u32, u32>::new();
        for turn in &trace.turns {
            let history = history.entry(turn.conversation).or_default();
            *history = *history - turn.cut + turn.new + turn.answer;
            assert!(*history <= 512);
        }
        assert!(trace.turns.iter().any(|turn| turn.cut > 0));
    }

    #[test]
    fn impossible_laws_are_named() {
        let bad = Population { one_turn: 2.0, ..population(1) };
        assert!(generate("x", &lengths(), &bad).is_err());
        assert!(generate("x", &[], &population(1)).is_err());
    }
}

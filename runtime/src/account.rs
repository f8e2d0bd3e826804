//! Where the tokens of a prompt came from: each is counted once, as the hit of a tier or as a miss with its
//! reason. `cache_query_tokens_total = Σ cache_hit_tokens_total + Σ cache_miss_tokens_total`, always.
//!
//! ```text
//! │ found, by tier │ there, but not to be had in time │ not there │ 1 │
//! │ hits           │ `Missing::withheld`              │ `end`     │ last token
//! ```

use kv_protocol::MissReason;

use crate::request::CachedTokens;

const REASONS: usize = MissReason::ALL.len();

/// Why what was not found was not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Tokens whose KV some tier has and that were not used all the same.
    pub withheld: Option<Withheld>,
    /// Why the chain ends where it ends: of all other tokens.
    pub end: MissReason,
}

/// KV that was there and was not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Withheld {
    /// Why.
    pub reason: MissReason,
    /// At most this many; not more than are missing.
    pub tokens: u32,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Hits.
    pub cached: CachedTokens,
    missed: [u32; REASONS],
}

impl Account {
    /// Of a prompt of `prompt` tokens, of which `cached` were found.
    pub fn new(prompt: u32, cached: CachedTokens, missing: Missing) -> Self {
        // A hit that is none, or counted twice, would hide a miss: our own bug, and cheap to see.
        assert!(cached.total() < prompt, "{cached:?} of a prompt of {prompt} tokens");
        let mut account = Self { cached, missed: [0; REASONS] };
        account.miss(MissReason::LastToken, 1);
        let mut rest = prompt - cached.total() - 1;
        if let Some(Withheld { reason, tokens }) = missing.withheld {
            let tokens = tokens.min(rest);
            account.miss(reason, tokens);
            rest -= tokens;
        }
        account.miss(missing.end, rest);
        assert_eq!(account.total(), prompt, "each prompt token is counted once");
        account
    }

    fn miss(&mut self, reason: MissReason, tokens: u32) {
        let place = MissReason::ALL.iter().position(|one| *one == reason);
        self.missed[place.expect("ALL has all")] += tokens;
    }

    /// Misses by reason; those that are none are left out.
    pub fn misses(&self) -> impl Iterator<Item = (MissReason, u32)> {
        MissReason::ALL.into_iter().zip(self.missed).filter(|(_, tokens)| *tokens > 0)
    }

    /// Tokens counted: the prompt's.
    pub fn total(&self) -> u32 {
        self.cached.total() + self.missed.iter().sum::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_withheld_is_told_apart_from_what_was_never_there() {
        let cached = CachedTokens { host: 32, ..CachedTokens::default() };
        let withheld = Some(Withheld { reason: MissReason::Late, tokens: 16 });
        let account = Account::new(64, cached, Missing { withheld, end: MissReason::Evicted });
        let misses: Vec<_> = account.misses().collect();
        let expected =
            [(MissReason::Evicted, 15), (MissReason::Late, 16), (MissReason::LastToken, 1)];
        assert_eq!(misses, expected);
    }

    proptest! {
        #[test]
        fn hits_and_misses_are_the_prompt_whatever_was_withheld(
            tiers in [0..200_u32, 0..200_u32, 0..200_u32],
            new in 1..300_u32,
            withheld in proptest::option::of((0..REASONS, any::<u32>())),
            end in 0..REASONS,
        ) {
            let [device, host, disk] = tiers;
            let cached = CachedTokens { device, host, disk };
            let withheld = withheld.map(|(reason, tokens)| {
                Withheld { reason: MissReason::ALL[reason], tokens }
            });
            let missing = Missing { withheld, end: MissReason::ALL[end] };
            let prompt = cached.total() + new;
            let account = Account::new(prompt, cached, missing);
            let missed: u32 = account.misses().map(|(_, tokens)| tokens).sum();
            prop_assert_eq!(account.cached.total() + missed, prompt);
        }
    }
}

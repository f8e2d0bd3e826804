//! A trace made ready to be replayed: when each turn starts and ends, which blocks it reads and makes.

use std::collections::{BTreeMap, HashMap, HashSet};

use kv_protocol::BlockKey;

use super::replay::{Hits, Outcome, Replay, Settings};
use super::schedule::{Server, Times, schedule};
use super::trace::Trace;
use crate::key_map::KeySet;

/// A trace with its schedule, ready to be replayed under many settings.
pub struct Prepared {
    pub(super) block_tokens: u32,
    pub(super) turns: Vec<Turn>,
}

/// A turn, with what it reads and makes.
pub(super) struct Turn {
    pub(super) conversation: u32,
    pub(super) tenant: u32,
    pub(super) times: Times,
    pub(super) next: Option<usize>,
    pub(super) is_first: bool,
    /// Blocks of its history, or of its whole prompt where the trace names them.
    pub(super) chain: Vec<BlockKey>,
    /// The trace names the blocks: the history is what was seen before.
    pub(super) is_named: bool,
    pub(super) history_tokens: u32,
    /// Blocks that are new when it ends; the first follows the last of `chain`.
    pub(super) makes: Vec<BlockKey>,
    /// Blocks that nothing will read again: cut off, or a tail that has grown.
    pub(super) drops: Vec<BlockKey>,
}

impl Prepared {
    /// Runs the server over the trace. With `charge_tokens`, each conversation takes the room of that many
    /// tokens from its first turn on, and moves as a whole of that size: the paper's way of counting.
    pub fn new(trace: &Trace, server: &Server, charge_tokens: Option<u32>) -> Self {
        let (times, next) = schedule(trace, server);
        let size = trace.header.block_tokens;
        let mut conversations: HashMap<u32, (Vec<BlockKey>, u32)> = HashMap::new();
        let mut seen = HashSet::new();
        let mut blocks = 0_u64;
        let mut turns = Vec::with_capacity(trace.turns.len());
        for (index, (turn, times)) in trace.turns.iter().zip(times).enumerate() {
            let is_first = seen.insert(turn.conversation);
            let (mut makes, mut drops) = (Vec::new(), Vec::new());
            let (chain, history_tokens);
            if let Some(ids) = &turn.blocks {
                chain = ids.iter().map(|id| named(*id)).collect();
                history_tokens = 0;
            } else {
                let (held, tokens) = conversations.entry(turn.conversation).or_default();
                let cut = turn.cut.div_ceil(size).min(held.len() as u32);
                *tokens = tokens.saturating_sub(cut * size);
                if charge_tokens.is_none() {
                    drops.extend(held.drain(..cut as usize));
                }
                (chain, history_tokens) = (held.clone(), *tokens);
                if charge_tokens.is_none() && *tokens % size != 0 {
                    drops.extend(held.pop());
                }
                *tokens += turn.new + turn.answer;
                let room = charge_tokens.unwrap_or(*tokens).div_ceil(size) as usize;
                while held.len() < room {
                    blocks += 1;
                    held.push(own(blocks));
                    makes.push(own(blocks));
                }
            }
            let is_named = turn.blocks.is_some();
            let next = next[index];
            turns.push(Turn {
                conversation: turn.conversation,
                tenant: turn.tenant,
                times,
                next,
                is_first,
                chain,
                is_named,
                history_tokens,
                makes,
                drops,
            });
        }
        Self { block_tokens: size, turns }
    }

    /// Most bytes of KV that all conversations have at once when none is forgotten.
    pub fn working_set_bytes(&self, token_bytes: u64) -> u64 {
        let mut last = KeySet::default();
        for turn in &self.turns {
            last.extend(turn.chain.iter().chain(&turn.makes).copied());
            for key in &turn.drops {
                last.remove(key);
            }
        }
        last.len() as u64 * u64::from(self.block_tokens) * token_bytes
    }

    /// Replays the trace.
    pub fn replay(&self, settings: Settings) -> Outcome {
        Replay::new(self, settings).run().0
    }

    /// Replays the trace, and counts each tenant's turns apart.
    pub fn replay_tenants(&self, settings: Settings) -> BTreeMap<u32, Hits> {
        Replay::new(self, settings).run().1
    }
}

/// Blocks that the trace names, and those that it does not, share no key.
fn named(id: u64) -> BlockKey {
    numbered(id, 1)
}

fn own(number: u64) -> BlockKey {
    numbered(number, 2)
}

fn numbered(number: u64, space: u8) -> BlockKey {
    let mut key = [space; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    BlockKey(key)
}

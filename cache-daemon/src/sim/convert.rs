//! Recordings of others as traces: the Mooncake conversation trace, and coding sessions.

use std::collections::HashSet;
use std::io::{BufRead, Read};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Exp};
use serde::Deserialize;

use super::trace::{Trace, TraceError, TraceTurn, When};

/// Tokens of a block of the Mooncake trace.
const MOONCAKE_BLOCK_TOKENS: u32 = 512;

#[derive(Deserialize)]
struct MooncakeRow {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// `conversation_trace.jsonl` of Mooncake (FAST'25). There is no conversation id in it, and none is guessed:
/// each request stands for itself at its time, and its block ids say what it shares with earlier ones.
pub fn mooncake(reader: impl BufRead) -> Result<Trace, TraceError> {
    let mut seen = HashSet::new();
    let mut turns = Vec::new();
    for (number, line) in (1..).zip(reader.lines()) {
        let row: MooncakeRow = serde_json::from_str(&line?)
            .map_err(|error| TraceError::Line { line: number, message: error.to_string() })?;
        let new = new_tokens(row.input_length, &row.hash_ids, MOONCAKE_BLOCK_TOKENS, &mut seen);
        turns.push(TraceTurn {
            conversation: number as u32 - 1,
            tenant: 0,
            when: When::AtMs(row.timestamp),
            cut: 0,
            new,
            answer: row.output_length,
            blocks: Some(row.hash_ids),
        });
    }
    Ok(Trace::new("mooncake-conversation", MOONCAKE_BLOCK_TOKENS, turns))
}

/// Tokens after the longest prefix of blocks seen before.
fn new_tokens(input: u32, ids: &[u64], block_tokens: u32, seen: &mut HashSet<u64>) -> u32 {
    let known = ids.iter().take_while(|id| seen.contains(*id)).count();
    seen.extend(ids);
    input.saturating_sub(known as u32 * block_tokens)
}

#[derive(Deserialize)]
struct Session {
    block_size: u32,
    requests: Vec<Request>,
}

#[derive(Deserialize)]
struct Request {
    t: f64,
    #[serde(rename = "type")]
    kind: String,
    #[serde(rename = "in", default)]
    input: u32,
    #[serde(rename = "out", default)]
    output: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
    api_time: Option<f64>,
    think_time: Option<f64>,
}

impl Request {
    /// Seconds from the answer before to this request, as the recording's notes advise.
    fn pause_s(&self, before: &Request) -> f64 {
        let passed = self.t - before.t;
        let pause = match (before.api_time, self.think_time) {
            (Some(api_time), _) => passed - api_time,
            (None, Some(think_time)) => think_time.min(passed),
            (None, None) => passed,
        };
        pause.max(0.0)
    }
}

/// How sessions become a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recording {
    /// Sessions that begin a second, as a Poisson process.
    pub sessions_per_s: f64,
    /// Pauses are cut at so many seconds; say so where figures are shown.
    pub pause_max_s: f64,
    /// Of the starts.
    pub seed: u64,
    /// So many of the recording's blocks make one of the trace: of each such group the last one's id, which
    /// stands for all before it. What does not fill a group has no id.
    pub merge: usize,
}

/// Session files of kv-cache-tester (main requests only).
pub fn coding_sessions(
    readers: impl IntoIterator<Item = impl Read>,
    recording: &Recording,
) -> Result<Trace, TraceError> {
    let Recording { sessions_per_s, pause_max_s, seed, merge } = *recording;
    let bad = |line, message: String| TraceError::Line { line, message };
    let gaps = Exp::new(sessions_per_s).map_err(|error| bad(0, error.to_string()))?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut at, mut turns, mut block_tokens) = (0.0, Vec::new(), 64);
    for (conversation, reader) in (0_u32..).zip(readers) {
        let session: Session = serde_json::from_reader(reader)
            .map_err(|error| bad(conversation as usize + 1, error.to_string()))?;
        block_tokens = session.block_size * merge.max(1) as u32;
        at += gaps.sample(&mut rng);
        let (mut seen, mut before) = (HashSet::new(), None);
        for request in session.requests.iter().filter(|request| request.kind != "subagent") {
            // Ids mean something inside their session only.
            let merged = request.hash_ids.chunks_exact(merge.max(1)).filter_map(|ids| ids.last());
            let ids: Vec<u64> = merged.map(|id| u64::from(conversation) << 24 | id).collect();
            let new = new_tokens(request.input, &ids, block_tokens, &mut seen);
            let when = match before.replace(request) {
                None => When::AtMs((at * 1e3) as u64),
                Some(before) => {
                    When::AfterMs((request.pause_s(before).min(pause_max_s) * 1e3) as u64)
                }
            };
            let (answer, blocks) = (request.output, Some(ids));
            turns.push(TraceTurn { conversation, tenant: 0, when, cut: 0, new, answer, blocks });
        }
    }
    Ok(Trace::new("coding-sessions", block_tokens, turns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_new_beyond_the_blocks_seen_before() {
        let rows = r#"{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 2, 3]}"#;
        let trace = mooncake(rows.as_bytes()).unwrap();
        let new: Vec<u32> = trace.turns.iter().map(|turn| turn.new).collect();
        assert_eq!(new, [1000, 1100 - 512]);
        assert_eq!(trace.turns[1].when, When::AtMs(3000));
        assert!(mooncake(&b"{}"[..]).is_err());
    }

    #[test]
    fn a_pause_is_what_the_service_did_not_take() {
        let session = r#"{"block_size": 64, "requests": [
            {"t": 0, "type": "s", "in": 70, "out": 3, "hash_ids": [1], "api_time": 2.5},
            {"t": 1, "type": "subagent"},
            {"t": 10, "type": "n", "in": 140, "out": 3, "hash_ids": [1, 2], "think_time": 99}]}"#;
        let read = |pause_max_s| {
            let recording = Recording { sessions_per_s: 1.0, pause_max_s, seed: 1, merge: 1 };
            coding_sessions([session.as_bytes()], &recording).unwrap().turns[1].when
        };
        assert_eq!(read(60.0), When::AfterMs(7500));
        assert_eq!(read(5.0), When::AfterMs(5000));
    }

    #[test]
    fn a_merged_block_stands_for_all_before_it() {
        let session = r#"{"block_size": 64, "requests": [
            {"t": 0, "type": "s", "in": 330, "out": 3, "hash_ids": [1, 2, 3, 4, 5]}]}"#;
        let recording = Recording { sessions_per_s: 1.0, pause_max_s: 1.0, seed: 1, merge: 2 };
        let trace = coding_sessions([session.as_bytes()], &recording).unwrap();
        assert_eq!(trace.header.block_tokens, 128);
        assert_eq!(trace.turns[0].blocks, Some(vec![2, 4]));
        assert_eq!(trace.turns[0].new, 330);
    }
}

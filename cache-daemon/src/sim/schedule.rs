//! The server: first come, first served, a bounded number of turns at once. It says when each turn is asked
//! for, starts and ends; hits and misses do not change that, so that policies are compared on equal terms.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::trace::{Trace, When};

/// How fast turns are served.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Server {
    /// Turns that run at once.
    pub places: usize,
    /// Prompt tokens a second, of one turn.
    pub prefill_tokens_per_s: f64,
    /// Seconds a generated token takes.
    pub decode_s_per_token: f64,
}

impl Default for Server {
    /// The paper's, as far as it can be told: about 2.17 turns a second in all.
    fn default() -> Self {
        Self { places: 24, prefill_tokens_per_s: 10_000.0, decode_s_per_token: 0.036 }
    }
}

/// When a turn was where; microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The turn before it ended; 0 for a first turn.
    pub free_us: u64,
    /// Came into the queue.
    pub asked_us: u64,
    /// Left it.
    pub start_us: u64,
    /// Was answered.
    pub end_us: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ended(usize),
    Asked(usize),
}

/// Times of each turn of the trace, and the turn that follows it in its conversation.
pub fn schedule(trace: &Trace, server: &Server) -> (Vec<Times>, Vec<Option<usize>>) {
    let mut times = vec![Times::default(); trace.turns.len()];
    let mut next = vec![None; trace.turns.len()];
    let mut last = std::collections::HashMap::new();
    let mut events = BinaryHeap::new();
    for (index, turn) in trace.turns.iter().enumerate() {
        match last.insert(turn.conversation, index) {
            Some(before) => next[before] = Some(index),
            None => events.push(Reverse((asked_us(turn.when, 0), Event::Asked(index)))),
        }
    }
    let (mut waiting, mut running) = (VecDeque::new(), 0);
    while let Some(Reverse((now, event))) = events.pop() {
        match event {
            Event::Asked(index) => {
                times[index].asked_us = now;
                waiting.push_back(index);
            }
            Event::Ended(index) => {
                times[index].end_us = now;
                running -= 1;
                if let Some(next) = next[index] {
                    times[next].free_us = now;
                    let asked_us = asked_us(trace.turns[next].when, now);
                    events.push(Reverse((asked_us, Event::Asked(next))));
                }
            }
        }
        while running < server.places
            && let Some(index) = waiting.pop_front()
        {
            running += 1;
            times[index].start_us = now;
            let turn = &trace.turns[index];
            let prefill_s = f64::from(turn.new) / server.prefill_tokens_per_s;
            let service_s = prefill_s + f64::from(turn.answer) * server.decode_s_per_token;
            let end_us = now + (service_s * 1e6) as u64;
            events.push(Reverse((end_us, Event::Ended(index))));
        }
    }
    (times, next)
}

fn asked_us(when: When, free_us: u64) -> u64 {
    match when {
        When::AtMs(at) => (at * 1000).max(free_us),
        When::AfterMs(after) => free_us + after * 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::TraceTurn;
    use super::*;

    #[test]
    fn turns_wait_for_a_place_and_for_their_conversation() {
        let turn = |conversation, when| TraceTurn {
            conversation,
            tenant: 0,
            when,
            cut: 0,
            new: 0,
            answer: 1000,
            blocks: None,
        };
        let turns =
            vec![turn(0, When::AtMs(0)), turn(0, When::AfterMs(500)), turn(1, When::AtMs(100))];
        let server = Server { places: 1, prefill_tokens_per_s: 1.0, decode_s_per_token: 0.001 };
        let (times, next) = schedule(&Trace::new("x", 64, turns), &server);
        let starts: Vec<u64> = times.iter().map(|times| times.start_us).collect();
        assert_eq!(starts, [0, 2_000_000, 1_000_000]);
        assert_eq!(times[1].asked_us, 1_500_000);
        assert_eq!(next, [Some(1), None, None]);
    }
}

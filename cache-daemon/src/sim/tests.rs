//! Small traces replayed with every invariant checked after each event (`Replay::self_check`).

use super::generate::{Pause, Population, generate};
use super::replay::{Contender, Faults, Outcome, Prepared, Settings};
use super::schedule::Server;

const TOKEN_BYTES: u64 = 1000;
const POLICIES: [Contender; 5] =
    [Contender::LookAhead, Contender::Lru, Contender::Fifo, Contender::S3Fifo, Contender::Belady];

/// Forty conversations of up to four turns on an overloaded server: about 700 blocks of 16 tokens in all.
fn prepared(seed: u64) -> Prepared {
    let lengths: Vec<_> = (1..9).map(|turns| vec![(11 * turns, 50); turns as usize]).collect();
    let population = Population {
        sessions: 40,
        sessions_per_s: 2.0,
        pause: Pause::Exponential(5.0),
        turns_max: 4,
        one_turn: 0.2,
        context: 512,
        block_tokens: 16,
        seed,
    };
    let trace = generate("test", &lengths, &population).unwrap();
    let server = Server { places: 4, ..Server::default() };
    Prepared::new(&trace, &server, None)
}

fn blocks(count: u64) -> u64 {
    count * 16 * TOKEN_BYTES
}

/// Host for a tenth, disk for a third of all blocks; a block takes 10 ms.
fn settings(policy: Contender) -> Settings {
    Settings {
        policy,
        host_bytes: blocks(70),
        disk_bytes: blocks(230),
        disk_bytes_per_s: blocks(100) as f64,
        token_bytes: TOKEN_BYTES,
        ..Settings::default()
    }
}

fn faults(seed: u64) -> Faults {
    Faults {
        seed,
        peers: 3,
        peer_dies_every_s: 7.0,
        disk_fails_every_s: 20.0,
        disk_fails_for_s: 8.0,
    }
}

#[test]
fn tiers_stay_whole_under_every_policy() {
    for policy in POLICIES {
        let outcome = prepared(1).replay(settings(policy));
        assert!(outcome.turns_host + outcome.turns_disk > 0, "{policy:?}: {outcome:?}");
        assert!(outcome.evictions_disk > 0, "{policy:?} was never short of room: {outcome:?}");
    }
}

#[test]
fn tiers_stay_whole_while_runtimes_die_and_the_disk_fails() {
    for policy in POLICIES {
        for seed in 1..5 {
            let faults = Some(faults(seed));
            let outcome = prepared(seed).replay(Settings { faults, ..settings(policy) });
            eprintln!("{policy:?}, seed {seed}: {outcome:?}");
            assert!(outcome.turns_died > 0, "no runtime died in a turn");
            assert!(outcome.disk_errors > 0, "the disk never failed");
        }
    }
}

#[test]
fn a_seed_gives_one_outcome() {
    let replay = |seed| {
        let faults = Some(faults(seed));
        prepared(1).replay(Settings { faults, ..settings(Contender::LookAhead) })
    };
    assert_eq!(replay(1), replay(1));
    assert_ne!(replay(1), replay(2));
}

#[test]
fn a_disk_that_never_works_is_as_good_as_none() {
    let dead = Faults {
        disk_fails_every_s: 1e-6,
        disk_fails_for_s: 1e9,
        peer_dies_every_s: 1e12,
        ..faults(1)
    };
    let with = Settings { faults: Some(dead), ..settings(Contender::LookAhead) };
    let without = Settings { disk_bytes: 0, ..settings(Contender::LookAhead) };
    let hits = |outcome: Outcome| (outcome.turns_host, outcome.turns_disk, outcome.writes);
    assert_eq!(hits(prepared(1).replay(with)), hits(prepared(1).replay(without)));
}

#[test]
fn where_everything_fits_no_policy_loses_a_block() {
    for policy in POLICIES {
        let roomy = Settings { disk_bytes: blocks(10_000), ..settings(policy) };
        let outcome = prepared(1).replay(roomy);
        assert_eq!(outcome.turns_host + outcome.turns_disk, outcome.turns_with_history);
        assert_eq!(outcome.writes, outcome.commits, "a block is written once");
    }
}

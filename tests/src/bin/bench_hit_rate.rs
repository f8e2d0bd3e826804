//! `make bench-hit-rate`: what the cache would have had of a trace's history, as `figure NAME VALUE UNIT`
//! lines. The daemon's directory and policies are driven by a virtual clock (`cache_daemon::sim`).
//!
//! The paper leaves out the pause between turns, the disk and how a session's space is counted. The
//! settings, each of 9,000 conversations with 819,200 bytes of KV a token (13B) and 128 GB of host memory:
//!
//! | name | arrivals, pause | disk |
//! | --- | --- | --- |
//! | P1 | 1 a second, exponential 10 s | 10 TB, each conversation charged 4,096 tokens |
//! | P2 | the same: an overloaded server | 3.4 TB, exact bytes |
//! | sweep | the same | 9, 18, 31, 50 % of all KV |
//! | H | 0.3 a second, log-normal 126 s (sigma 0.97): a healthy service | 10 TB, exact bytes |
//!
//! A hit is a turn whose whole history is in host or disk when it starts, of all measured turns, first
//! turns included. The first 10,000 started turns are not measured. Raw: `bench/results/hit-rate.json`.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use cache_daemon::sim::generate::{Pause, Population, generate, read_lengths};
use cache_daemon::sim::replay::Contender::{self, Belady, Fifo, LookAhead, Lru, S3Fifo};
use cache_daemon::sim::replay::{Outcome, Prepared, Settings};
use cache_daemon::sim::schedule::Server;
use cache_daemon::sim::trace::open;
use colloquy_tests::cluster::repository;
use colloquy_tests::figures::{figure, write_raw};
use serde_json::json;

const TOKEN_BYTES: u64 = 819_200;
const HOST_BYTES: u64 = 128_000_000_000;
const GB: f64 = 1e9;

struct Run<'a> {
    setting: String,
    trace: &'a Prepared,
    settings: Settings,
}

fn run(
    setting: &str,
    trace: &'static Prepared,
    policy: Contender,
    disk_bytes: u64,
    disk_gb_per_s: f64,
    anticipate_s: u64,
) -> Run<'static> {
    let settings = Settings {
        policy,
        host_bytes: HOST_BYTES,
        disk_bytes,
        disk_bytes_per_s: disk_gb_per_s * GB,
        token_bytes: TOKEN_BYTES,
        anticipate_us: anticipate_s * 1_000_000,
        warm_up_turns: 10_000,
    };
    Run { setting: setting.to_owned(), trace, settings }
}

/// All replays, on all cores, in the order of `runs`.
fn replay_all(runs: &[Run<'_>]) -> anyhow::Result<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(vec![None; runs.len()]);
    let cores = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some((at, run)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    runs.get(at).map(|run| (at, run))
                } {
                    let outcome = run.trace.replay(run.settings);
                    eprintln!(
                        "{}: {:?}, disk {} GB at {} GB/s, anticipate {} s: {:.1} %, of those {:.1} % from host",
                        run.setting,
                        run.settings.policy,
                        run.settings.disk_bytes / 1_000_000_000,
                        run.settings.disk_bytes_per_s / GB,
                        run.settings.anticipate_us / 1_000_000,
                        outcome.hit_rate(),
                        outcome.host_share(),
                    );
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes[at] = Some(outcome);
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().context("a replay panicked")?;
    outcomes.into_iter().collect::<Option<_>>().context("a replay is missing")
}

fn main() -> anyhow::Result<()> {
    let path = repository().join("bench/data/sharegpt-lengths-dev.csv.xz");
    let lengths = read_lengths(open(&path).with_context(|| format!("{}", path.display()))?)?;
    let population = |sessions_per_s, pause| Population {
        sessions: 9_000,
        sessions_per_s,
        pause,
        turns_max: 30,
        one_turn: 0.27,
        context: 4_096,
        block_tokens: 64,
        seed: 1,
    };
    let overload = generate("P", &lengths, &population(1.0, Pause::Exponential(10.0)))?;
    let healthy = generate("H", &lengths, &population(0.3, Pause::LogNormal(126.0, 0.97)))?;
    let digests = [overload.digest()?, healthy.digest()?];
    println!("trace P: {} turns, BLAKE3 {}", overload.turns.len(), digests[0]);
    println!("trace H: {} turns, BLAKE3 {}", healthy.turns.len(), digests[1]);
    let server = Server::default();
    // Kept to the end of the program: threads borrow them.
    let prepared = |trace, charge| &*Box::leak(Box::new(Prepared::new(trace, &server, charge)));
    let (charged, exact) = (prepared(&overload, Some(4_096)), prepared(&overload, None));
    let healthy = prepared(&healthy, None);
    let all_kv = exact.working_set_bytes(TOKEN_BYTES);

    let (tb10, p2) = (10_000_000_000_000, 3_400_000_000_000);
    let mut runs = Vec::new();
    for policy in [LookAhead, Belady, Lru, Fifo, S3Fifo] {
        runs.push(run("P2", exact, policy, p2, 7.0, 0));
    }
    for policy in [LookAhead, Lru] {
        runs.push(run("P1", charged, policy, tb10, 7.0, 0));
    }
    for percent in [9, 18, 31, 50] {
        for policy in [LookAhead, Belady, Lru] {
            let disk = all_kv / 100 * percent;
            runs.push(run(&format!("sweep {percent} %"), exact, policy, disk, 7.0, 0));
        }
    }
    runs.push(run("H", healthy, Lru, tb10, 5.0, 0));
    for (rate, seconds) in
        [(5.0, 0), (5.0, 1), (5.0, 5), (5.0, 15), (5.0, 30), (1.5, 0), (1.5, 30), (7.0, 5)]
    {
        runs.push(run("H", healthy, LookAhead, tb10, rate, seconds));
    }
    let outcomes = replay_all(&runs)?;

    let of = |setting: &str, policy: Contender, rate: f64, seconds: u64| {
        let wanted = |run: &Run<'_>| {
            run.setting == setting
                && run.settings.policy == policy
                && run.settings.disk_bytes_per_s.total_cmp(&(rate * GB)).is_eq()
                && run.settings.anticipate_us == seconds * 1_000_000
        };
        let at = runs.iter().position(wanted).context("no such run")?;
        anyhow::Ok(outcomes[at])
    };
    let p2 = |policy| of("P2", policy, 7.0, 0);
    figure("hit_rate_ceiling", p2(LookAhead)?.ceiling(), "%");
    figure("hit_rate_lookahead", p2(LookAhead)?.hit_rate(), "%");
    figure("hit_rate_belady", p2(Belady)?.hit_rate(), "%");
    figure("hit_rate_lru", p2(Lru)?.hit_rate(), "%");
    figure("hit_rate_fifo", p2(Fifo)?.hit_rate(), "%");
    figure("hit_rate_s3_fifo", p2(S3Fifo)?.hit_rate(), "%");
    figure("hit_rate_lookahead_host_share", p2(LookAhead)?.host_share(), "%");
    figure("hit_rate_lookahead_p1", of("P1", LookAhead, 7.0, 0)?.hit_rate(), "%");
    figure("hit_rate_lru_p1", of("P1", Lru, 7.0, 0)?.hit_rate(), "%");
    let mut worst = f64::MIN;
    for percent in [9, 18, 31, 50] {
        let rate = |policy| Ok(of(&format!("sweep {percent} %"), policy, 7.0, 0)?.hit_rate());
        let (ours, best): (anyhow::Result<f64>, anyhow::Result<f64>) =
            (rate(LookAhead), rate(Belady));
        worst = worst.max(best? - ours?);
    }
    figure("sweep_worst_points_to_belady", worst, "%");
    figure("host_share_healthy_lru", of("H", Lru, 5.0, 0)?.host_share(), "%");
    figure("host_share_healthy", of("H", LookAhead, 5.0, 0)?.host_share(), "%");
    for seconds in [1, 5, 15, 30] {
        let share = of("H", LookAhead, 5.0, seconds)?.host_share();
        figure(&format!("host_share_healthy_anticipate_{seconds}s"), share, "%");
    }
    let raw: Vec<_> = runs
        .iter()
        .zip(&outcomes)
        .map(|(run, outcome)| {
            json!({"setting": run.setting, "settings": run.settings, "outcome": outcome})
        })
        .collect();
    write_raw("hit-rate", &json!({"digest_p": digests[0], "digest_h": digests[1], "runs": raw}))
}

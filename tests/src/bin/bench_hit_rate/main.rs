//! `make bench-hit-rate`: what the cache would have had of a trace's history, as `figure NAME VALUE UNIT`
//! lines. The daemon's directory, policies and rules of what moves are driven by a virtual clock
//! (`cache_daemon::sim`). Raw: `bench/results/hit-rate.json`; plot: `docs/hit-rate.svg`.
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
//! turns included. The first 10,000 started turns are not measured.
//!
//! Two recordings (`bench/data/README.md`), with 131,072 bytes of KV a token (8B, grouped heads), 64 places and
//! disks of 5, 10, 20 and 40 % of all KV, host memory a tenth of the disk: Mooncake's conversation trace and coding
//! sessions, of which 0.05 begin a second and whose pauses are cut at an hour. Here a hit is a token whose block
//! was seen before and is in host or disk; the first tenth of the turns is not measured.

#![forbid(unsafe_code)]

mod plot;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cache_daemon::sim::convert::mooncake;
use cache_daemon::sim::generate::{Pause, Population, generate, read_lengths};
use cache_daemon::sim::replay::Contender::{self, Belady, Fifo, LookAhead, Lru, S3Fifo};
use cache_daemon::sim::replay::{Hits, Outcome, Prepared, Settings};
use cache_daemon::sim::schedule::Server;
use cache_daemon::sim::trace::{Trace, open};
use cache_daemon::store::TenantShare;
use colloquy_tests::cluster::repository;
use colloquy_tests::figures::{figure, write_raw};
use plot::Panel;
use serde_json::json;

/// LLaMA-2-13B, the paper's.
const TOKEN_BYTES: u64 = 819_200;
/// Llama-3.1-8B.
const TOKEN_BYTES_8B: u64 = 131_072;
const HOST_BYTES: u64 = 128_000_000_000;
const TB: u64 = 1_000_000_000_000;
const GB: f64 = 1e9;
const POLICIES: [Contender; 5] = [LookAhead, Belady, Lru, Fifo, S3Fifo];
const SWEEP: [u64; 4] = [9, 18, 31, 50];
const RECORDED_SWEEP: [u64; 4] = [5, 10, 20, 40];
const DISKS_GB_PER_S: [f64; 3] = [1.5, 5.0, 7.0];
const ANTICIPATE_S: [u64; 5] = [0, 1, 5, 15, 30];
/// Of the bytes that an unbounded drive would take in a day.
const WRITE_BUDGETS: [u64; 4] = [25, 50, 75, 100];

struct Run {
    name: String,
    trace: &'static Prepared,
    settings: Settings,
}

/// Runs, and what came of them once they are done.
#[derive(Default)]
struct Runs {
    all: Vec<Run>,
    outcomes: Vec<(Outcome, Duration)>,
}

impl Runs {
    fn add(&mut self, name: impl Into<String>, trace: &'static Prepared, settings: Settings) {
        self.all.push(Run { name: name.into(), trace, settings });
    }

    /// All replays that were not done yet, on all cores.
    fn replay(&mut self) -> anyhow::Result<()> {
        let runs = &self.all[self.outcomes.len()..];
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
                        let began = Instant::now();
                        let outcome = run.trace.replay(run.settings);
                        eprintln!(
                            "{}, {:?}: {:.1} % of turns, {:.1} % of tokens, from host {:.1} %; {:.1} s",
                            run.name,
                            run.settings.policy,
                            outcome.hit_rate(),
                            outcome.token_hit_rate(),
                            outcome.host_share(),
                            began.elapsed().as_secs_f64(),
                        );
                        if let Ok(mut outcomes) = outcomes.lock() {
                            outcomes[at] = Some((outcome, began.elapsed()));
                        }
                    }
                });
            }
        });
        let outcomes = outcomes.into_inner().context("a replay panicked")?;
        let outcomes: Option<Vec<_>> = outcomes.into_iter().collect();
        self.outcomes.extend(outcomes.context("a replay is missing")?);
        Ok(())
    }

    fn of(&self, name: &str, policy: Contender) -> anyhow::Result<Outcome> {
        let wanted = |run: &Run| run.name == name && run.settings.policy == policy;
        let at = self.all.iter().position(wanted);
        Ok(self.outcomes[at.with_context(|| format!("no run {name}, {policy:?}"))?].0)
    }
}

fn data(name: &str) -> PathBuf {
    repository().join("bench/data").join(name)
}

/// Kept to the end of the program: threads borrow it.
fn prepared(trace: &Trace, server: &Server, charge: Option<u32>) -> &'static Prepared {
    Box::leak(Box::new(Prepared::new(trace, server, charge)))
}

fn thirteen_b(policy: Contender, disk_bytes: u64, disk_gb_per_s: f64) -> Settings {
    Settings {
        policy,
        host_bytes: HOST_BYTES,
        disk_bytes,
        disk_bytes_per_s: disk_gb_per_s * GB,
        token_bytes: TOKEN_BYTES,
        warm_up_turns: 10_000,
        ..Settings::default()
    }
}

fn healthy(disk: f64, anticipate_s: u64) -> String {
    format!("H, {disk} GB/s, anticipate {anticipate_s} s")
}

/// A third of H's people, and all that one noisy tenant sends beside them, ten times as much.
const QUIET_SESSIONS: u32 = 1_500;

/// All traces.
struct Traces {
    overload: Trace,
    service: Trace,
    quiet: Trace,
    both: Trace,
    mooncake: Trace,
    coding: Trace,
}

impl Traces {
    fn read() -> anyhow::Result<Self> {
        let path = data("sharegpt-lengths-dev.csv.xz");
        let lengths = read_lengths(open(&path).with_context(|| format!("{}", path.display()))?)?;
        let draw = |name, sessions, sessions_per_s, pause, seed| {
            let population = Population {
                sessions,
                sessions_per_s,
                pause,
                turns_max: 30,
                one_turn: 0.27,
                context: 4_096,
                block_tokens: 64,
                seed,
            };
            generate(name, &lengths, &population)
        };
        let people = Pause::LogNormal(126.0, 0.97);
        let quiet = draw("quiet", QUIET_SESSIONS, 0.05, people, 2)?;
        let mut noisy = draw("noisy", 9_000, 0.3, people, 3)?;
        for turn in &mut noisy.turns {
            (turn.conversation, turn.tenant) = (turn.conversation + QUIET_SESSIONS, 1);
        }
        Ok(Self {
            overload: draw("P", 9_000, 1.0, Pause::Exponential(10.0), 1)?,
            service: draw("H", 9_000, 0.3, people, 1)?,
            both: Trace::new("quiet and noisy", 64, [quiet.turns.clone(), noisy.turns].concat()),
            quiet,
            mooncake: mooncake(open(&data("mooncake-conversation-dev.jsonl.xz"))?)?,
            coding: Trace::read(open(&data("coding-sessions.jsonl.xz"))?)?,
        })
    }

    /// Prints which traces these are.
    fn digests(&self) -> anyhow::Result<serde_json::Map<String, serde_json::Value>> {
        let Self { overload, service, quiet, both, mooncake, coding } = self;
        let mut digests = serde_json::Map::new();
        for trace in [overload, service, quiet, both, mooncake, coding] {
            let (name, digest) = (&trace.header.name, trace.digest()?);
            println!("trace {name}: {} turns, BLAKE3 {digest}", trace.turns.len());
            digests.insert(name.clone(), digest.into());
        }
        Ok(digests)
    }
}

/// P1, P2 and the sweep.
fn add_overload(runs: &mut Runs, overload: &Trace) {
    let server = Server::default();
    let (charged, exact) =
        (prepared(overload, &server, Some(4_096)), prepared(overload, &server, None));
    for policy in POLICIES {
        runs.add("P2", exact, thirteen_b(policy, 34 * TB / 10, 7.0));
    }
    for policy in [LookAhead, Lru, Fifo] {
        runs.add("P1", charged, thirteen_b(policy, 10 * TB, 7.0));
    }
    let all_kv = exact.working_set_bytes(TOKEN_BYTES);
    for percent in SWEEP {
        for policy in [LookAhead, Belady, Lru] {
            let settings = thirteen_b(policy, all_kv / 100 * percent, 7.0);
            runs.add(format!("sweep {percent} %"), exact, settings);
        }
    }
}

fn add_service(runs: &mut Runs, service: &'static Prepared) {
    for disk in DISKS_GB_PER_S {
        for seconds in ANTICIPATE_S {
            let settings = Settings {
                anticipate_us: seconds * 1_000_000,
                ..thirteen_b(LookAhead, 10 * TB, disk)
            };
            runs.add(healthy(disk, seconds), service, settings);
        }
        runs.add(healthy(disk, 0), service, thirteen_b(Lru, 10 * TB, disk));
        let think_time = Settings { think_time: true, ..thirteen_b(LookAhead, 10 * TB, disk) };
        runs.add(format!("H, {disk} GB/s, think time"), service, think_time);
    }
}

/// What a drive that has to last costs: shares of what an unbounded one would take.
fn add_write_budgets(runs: &mut Runs, service: &'static Prepared) -> anyhow::Result<()> {
    let unbounded = runs.of(&healthy(5.0, 0), LookAhead)?;
    let bytes_per_day = unbounded.write_bytes_per_day(64 * TOKEN_BYTES);
    for percent in WRITE_BUDGETS {
        let settings = Settings {
            write_bytes_per_day: Some(bytes_per_day / 100 * percent),
            ..thirteen_b(LookAhead, 10 * TB, 5.0)
        };
        runs.add(format!("H, writes {percent} %"), service, settings);
    }
    Ok(())
}

fn add_recorded(runs: &mut Runs, trace: &Trace) {
    let prepared = prepared(trace, &Server { places: 64, ..Server::default() }, None);
    let all_kv = prepared.working_set_bytes(TOKEN_BYTES_8B);
    for percent in RECORDED_SWEEP {
        for policy in POLICIES {
            let disk_bytes = all_kv / 100 * percent;
            let settings = Settings {
                policy,
                host_bytes: disk_bytes / 10,
                disk_bytes,
                disk_bytes_per_s: 5.0 * GB,
                token_bytes: TOKEN_BYTES_8B,
                warm_up_turns: trace.turns.len() / 10,
                ..Settings::default()
            };
            runs.add(format!("{} {percent} %", trace.header.name), prepared, settings);
        }
    }
}

/// What the quiet tenant finds alone in half of the tiers, beside the noisy one in all of them, and there with
/// a quota of half for each.
fn quiet_tenant(traces: &Traces) -> [(&'static str, Hits); 3] {
    let server = Server::default();
    let (quiet, both) =
        (prepared(&traces.quiet, &server, None), prepared(&traces.both, &server, None));
    let half = Settings { host_bytes: HOST_BYTES / 2, ..thirteen_b(LookAhead, TB / 2, 5.0) };
    let alone = Settings { warm_up_turns: 300, ..half };
    let beside = Settings { warm_up_turns: 2_000, ..thirteen_b(LookAhead, TB, 5.0) };
    let guarded = Settings { tenant_share: TenantShare { host: 50, disk: 50 }, ..beside };
    let of = |trace: &Prepared, settings| trace.replay_tenants(settings)[&0];
    [("alone", of(quiet, alone)), ("beside", of(both, beside)), ("guarded", of(both, guarded))]
}

fn main() -> anyhow::Result<()> {
    let traces = Traces::read()?;
    let digests = traces.digests()?;
    let mut runs = Runs::default();
    add_overload(&mut runs, &traces.overload);
    let service = prepared(&traces.service, &Server::default(), None);
    add_service(&mut runs, service);
    add_recorded(&mut runs, &traces.mooncake);
    add_recorded(&mut runs, &traces.coding);
    runs.replay()?;
    add_write_budgets(&mut runs, service)?;
    runs.replay()?;
    let tenants = quiet_tenant(&traces);
    print_figures(&runs)?;
    for (how, hits) in &tenants {
        figure(&format!("hit_rate_quiet_tenant_{how}"), hits.hit_rate(), "%");
    }
    let plot = plot::svg(&panels(&runs)?)?;
    std::fs::write(repository().join("docs/hit-rate.svg"), plot)?;
    let raw = runs.all.iter().zip(&runs.outcomes).map(|(run, (outcome, _))| {
        json!({"setting": run.name, "settings": run.settings, "outcome": outcome})
    });
    let raw: Vec<_> = raw.collect();
    write_raw("hit-rate", &json!({"digests": digests, "runs": raw, "quiet_tenant": tenants}))
}

fn print_figures(runs: &Runs) -> anyhow::Result<()> {
    let p2 = |policy| runs.of("P2", policy);
    figure("hit_rate_ceiling", p2(LookAhead)?.ceiling(), "%");
    figure("hit_rate_lookahead", p2(LookAhead)?.hit_rate(), "%");
    figure("hit_rate_belady", p2(Belady)?.hit_rate(), "%");
    figure("hit_rate_lru", p2(Lru)?.hit_rate(), "%");
    figure("hit_rate_fifo", p2(Fifo)?.hit_rate(), "%");
    figure("hit_rate_s3_fifo", p2(S3Fifo)?.hit_rate(), "%");
    figure("hit_rate_lookahead_host_share", p2(LookAhead)?.host_share(), "%");
    let p1 = |policy| runs.of("P1", policy);
    figure("hit_rate_lookahead_p1", p1(LookAhead)?.hit_rate(), "%");
    figure("hit_rate_lru_p1", p1(Lru)?.hit_rate(), "%");
    figure("hit_rate_fifo_p1", p1(Fifo)?.hit_rate(), "%");
    figure("disk_bytes_per_new_kv_byte", p1(LookAhead)?.disk_blocks_per_new_block(), "ratio");
    let mut worst = f64::MIN;
    for percent in SWEEP {
        let rate = |policy| anyhow::Ok(runs.of(&format!("sweep {percent} %"), policy)?.hit_rate());
        worst = worst.max(rate(Belady)? - rate(LookAhead)?);
    }
    figure("sweep_worst_points_to_belady", worst, "%");
    figure("host_share_healthy_lru", runs.of(&healthy(5.0, 0), Lru)?.host_share(), "%");
    figure("host_share_healthy", runs.of(&healthy(5.0, 0), LookAhead)?.host_share(), "%");
    for seconds in &ANTICIPATE_S[1..] {
        let share = runs.of(&healthy(5.0, *seconds), LookAhead)?.host_share();
        figure(&format!("host_share_healthy_anticipate_{seconds}s"), share, "%");
    }
    let think_time = runs.of("H, 5 GB/s, think time", LookAhead)?;
    figure("host_share_healthy_think_time", think_time.host_share(), "%");
    for percent in WRITE_BUDGETS {
        let rate = runs.of(&format!("H, writes {percent} %"), LookAhead)?.hit_rate();
        figure(&format!("hit_rate_writes_{percent}_percent"), rate, "%");
    }
    for (name, short) in [("mooncake-conversation", "mooncake"), ("coding-sessions", "coding")] {
        for policy in POLICIES {
            let rate = runs.of(&format!("{name} 20 %"), policy)?.token_hit_rate();
            let policy = label(policy).replace('-', "_");
            figure(&format!("token_hits_{short}_{policy}"), rate, "%");
        }
    }
    let (events, took) = runs.outcomes.iter().fold((0, 0.0), |(events, took), (outcome, time)| {
        (events + outcome.events, took + time.as_secs_f64())
    });
    figure("events_per_minute", events as f64 / took * 60.0, "events");
    Ok(())
}

fn label(policy: Contender) -> &'static str {
    match policy {
        LookAhead => "look-ahead",
        Belady => "belady",
        Lru => "lru",
        Fifo => "fifo",
        S3Fifo => "s3-fifo",
    }
}

fn panels(runs: &Runs) -> anyhow::Result<Vec<Panel>> {
    let percents = |all: &[u64]| all.iter().map(|percent| format!("{percent} %")).collect();
    let sweep = |name: &str, policies: &[Contender], percents: &[u64], of: fn(&Outcome) -> f64| {
        let line = |policy: &Contender| {
            let at = |percent| Ok(of(&runs.of(&format!("{name} {percent} %"), *policy)?));
            let values = percents.iter().map(at).collect::<anyhow::Result<_>>()?;
            anyhow::Ok((label(*policy).to_owned(), values))
        };
        policies.iter().map(line).collect::<anyhow::Result<Vec<_>>>()
    };
    let mut host_share = Vec::new();
    for disk in DISKS_GB_PER_S {
        let at = |seconds: &u64| Ok(runs.of(&healthy(disk, *seconds), LookAhead)?.host_share());
        let values = ANTICIPATE_S.iter().map(at).collect::<anyhow::Result<_>>()?;
        host_share.push((format!("{disk} GB/s"), values));
    }
    let turns: fn(&Outcome) -> f64 = |outcome| outcome.hit_rate();
    let tokens: fn(&Outcome) -> f64 = |outcome| outcome.token_hit_rate();
    let mut panels = vec![
        Panel {
            title: "Turns with their whole history, overloaded server, %".into(),
            below: "disk, of all KV",
            places: percents(&SWEEP),
            lines: sweep("sweep", &[LookAhead, Belady, Lru], &SWEEP, turns)?,
        },
        Panel {
            title: "Hits from host memory, healthy service, %".into(),
            below: "anticipate, seconds before the turn",
            places: ANTICIPATE_S.iter().map(ToString::to_string).collect(),
            lines: host_share,
        },
    ];
    for (name, title) in [
        ("mooncake-conversation", "Mooncake conversations"),
        ("coding-sessions", "Coding sessions"),
    ] {
        panels.push(Panel {
            title: format!("Tokens seen before that are there, {title}, %"),
            below: "disk, of all KV (host: a tenth of it)",
            places: percents(&RECORDED_SWEEP),
            lines: sweep(name, &POLICIES, &RECORDED_SWEEP, tokens)?,
        });
    }
    Ok(panels)
}

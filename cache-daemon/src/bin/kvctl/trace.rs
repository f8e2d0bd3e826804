//! `kvctl replay`, `generate`, `convert`: traces, replayed and made. They need no daemon.

use std::fs::File;
use std::io::{BufWriter, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use cache_daemon::config::{parse_bytes, whole_percent};
use cache_daemon::sim::convert;
use cache_daemon::sim::generate::{Pause, Population, generate, read_lengths};
use cache_daemon::sim::replay::{Contender, Outcome, Prepared, Settings};
use cache_daemon::sim::schedule::Server;
use cache_daemon::sim::trace::{Trace, open};
use cache_daemon::store::TenantShare;
use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub struct Replay {
    /// Trace (docs/trace-format.md); .xz is unpacked.
    file: PathBuf,
    /// Who chooses what stays; without it all are compared.
    #[arg(long, value_enum)]
    policy: Option<Contender>,
    /// Host memory, such as 16GiB or 128GB.
    #[arg(long, value_parser = parse_bytes)]
    host_bytes: u64,
    /// Disk; 0 is none.
    #[arg(long, value_parser = parse_bytes)]
    disk_bytes: u64,
    /// Bytes that the disk moves a second, reads and writes together.
    #[arg(long, value_parser = parse_bytes)]
    disk_rate: u64,
    /// KV bytes of a token; the default is an 8B model with grouped heads, in 16 bits.
    #[arg(long, value_parser = parse_bytes, default_value = "128KiB")]
    token_bytes: u64,
    /// Seconds before a later turn at which its client says that it will come.
    #[arg(long, default_value_t = 0.0)]
    anticipate: f64,
    /// Foretell each conversation's next turn by its pauses.
    #[arg(long)]
    think_time: bool,
    /// Percent of host memory that a tenant may have before its own blocks leave first.
    #[arg(long, default_value_t = 100, value_parser = whole_percent())]
    tenant_host_share: u8,
    /// Percent of the disk that a tenant may have before its own blocks leave first.
    #[arg(long, default_value_t = 100, value_parser = whole_percent())]
    tenant_disk_share: u8,
    /// Bytes that may be written to disk in a day; without it there is no bound.
    #[arg(long, value_parser = parse_bytes)]
    write_bytes_per_day: Option<u64>,
    /// Started turns that are not counted.
    #[arg(long, default_value_t = 0)]
    warm_up: usize,
    /// Turns that run at once.
    #[arg(long, default_value_t = Server::default().places)]
    places: usize,
    /// Prompt tokens a second of one turn.
    #[arg(long, default_value_t = Server::default().prefill_tokens_per_s)]
    prefill_rate: f64,
    /// Seconds a generated token takes.
    #[arg(long, default_value_t = Server::default().decode_s_per_token)]
    decode_seconds: f64,
}

#[derive(Debug, Args)]
pub struct Generate {
    /// CSV with conversation, turn, user_tokens, assistant_tokens; .xz is unpacked.
    lengths: PathBuf,
    /// Conversations.
    #[arg(long, default_value_t = 9000)]
    sessions: u32,
    /// Conversations that begin a second.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// Mean pause before a later turn, in seconds (exponential); with --sigma its median (log-normal).
    #[arg(long, default_value_t = 10.0)]
    pause: f64,
    /// Sigma of log-normal pauses.
    #[arg(long)]
    sigma: Option<f64>,
    /// Conversations are cut to this many turns.
    #[arg(long, default_value_t = 30)]
    turns: usize,
    /// Share of conversations cut to one turn.
    #[arg(long, default_value_t = 0.27)]
    one_turn: f64,
    /// Tokens of the model's context.
    #[arg(long, default_value_t = 4096)]
    context: u32,
    /// Tokens of a block.
    #[arg(long, default_value_t = 64)]
    block_tokens: u32,
    /// Of the generator.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Subcommand)]
pub enum Convert {
    /// Mooncake's conversation_trace.jsonl.
    Mooncake {
        /// The file.
        file: PathBuf,
    },
    /// Session files of kv-cache-tester.
    Coding {
        /// trace_NNNN.json …
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Sessions that begin a second.
        #[arg(long, default_value_t = 0.05)]
        rate: f64,
        /// Longest pause, in seconds.
        #[arg(long, default_value_t = 3600.0)]
        pause_max: f64,
        /// Of the starts.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Blocks of the recording that make one of the trace.
        #[arg(long, default_value_t = 1)]
        merge: usize,
    },
}

fn opened(path: &Path) -> anyhow::Result<Box<dyn std::io::BufRead>> {
    open(path).with_context(|| format!("{}", path.display()))
}

impl Replay {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let trace =
            Trace::read(opened(&self.file)?).with_context(|| format!("{}", self.file.display()))?;
        anyhow::ensure!(self.places > 0, "--places is 0: no turn would ever start");
        anyhow::ensure!(self.token_bytes > 0 && self.disk_rate > 0, "a rate or size is 0");
        anyhow::ensure!(
            self.prefill_rate > 0.0 && self.decode_seconds >= 0.0 && self.anticipate >= 0.0,
            "a time is negative, or a rate is not above 0"
        );
        let server = Server {
            places: self.places,
            prefill_tokens_per_s: self.prefill_rate,
            decode_s_per_token: self.decode_seconds,
        };
        let prepared = Prepared::new(&trace, &server, None);
        let contenders = match self.policy {
            Some(policy) => vec![policy],
            None => <Contender as clap::ValueEnum>::value_variants().to_vec(),
        };
        let mut outcomes = Vec::new();
        for policy in contenders {
            let began = Instant::now();
            let outcome = prepared.replay(Settings {
                policy,
                host_bytes: self.host_bytes,
                disk_bytes: self.disk_bytes,
                disk_bytes_per_s: self.disk_rate as f64,
                token_bytes: self.token_bytes,
                anticipate_us: (self.anticipate * 1e6) as u64,
                think_time: self.think_time,
                warm_up_turns: self.warm_up,
                tenant_share: TenantShare {
                    host: self.tenant_host_share,
                    disk: self.tenant_disk_share,
                },
                write_bytes_per_day: self.write_bytes_per_day,
                faults: None,
            });
            outcomes.push((policy, outcome, began.elapsed()));
        }
        if json {
            let all: Vec<_> = outcomes
                .iter()
                .map(|(policy, outcome, _)| serde_json::json!({"policy": policy, "outcome": outcome}))
                .collect();
            println!("{}", serde_json::to_string_pretty(&all)?);
            return Ok(());
        }
        println!(
            "trace {} ({}), BLAKE3 {}",
            self.file.display(),
            trace.header.name,
            trace.digest()?
        );
        print_table(&outcomes);
        Ok(())
    }
}

fn print_table(outcomes: &[(Contender, Outcome, Duration)]) {
    let Some((_, any, _)) = outcomes.first() else { return };
    println!(
        "{} turns, of which {} have a history; {} tokens of history",
        any.turns, any.turns_with_history, any.tokens
    );
    println!();
    println!("            turns with whole history, %      tokens of history, %");
    println!("policy         host    disk     all           host    disk    miss    events/s");
    for (policy, outcome, took) in outcomes {
        let turns = |part: u64| percent(part, outcome.turns_with_history);
        let tokens = |part: u64| percent(part, outcome.tokens);
        let miss = outcome.tokens - outcome.tokens_host - outcome.tokens_disk;
        println!(
            "{:<12} {:6.1}  {:6.1}  {:6.1}         {:6.1}  {:6.1}  {:6.1}  {:10.0}",
            clap::ValueEnum::to_possible_value(policy)
                .map_or_else(String::new, |value| value.get_name().to_owned()),
            turns(outcome.turns_host),
            turns(outcome.turns_disk),
            turns(outcome.turns_host + outcome.turns_disk),
            tokens(outcome.tokens_host),
            tokens(outcome.tokens_disk),
            tokens(miss),
            outcome.events as f64 / took.as_secs_f64(),
        );
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

impl Generate {
    pub fn run(&self) -> anyhow::Result<()> {
        let lengths = read_lengths(opened(&self.lengths)?)?;
        anyhow::ensure!(self.block_tokens > 0, "--block-tokens is 0");
        let trace = generate(
            "generated",
            &lengths,
            &Population {
                sessions: self.sessions,
                sessions_per_s: self.rate,
                pause: match self.sigma {
                    Some(sigma) => Pause::LogNormal(self.pause, sigma),
                    None => Pause::Exponential(self.pause),
                },
                turns_max: self.turns,
                one_turn: self.one_turn,
                context: self.context,
                block_tokens: self.block_tokens,
                seed: self.seed,
            },
        )?;
        print_trace(&trace)
    }
}

impl Convert {
    pub fn run(&self) -> anyhow::Result<()> {
        let trace = match self {
            Convert::Mooncake { file } => convert::mooncake(opened(file)?)?,
            Convert::Coding { files, rate, pause_max, seed, merge } => {
                let opened = files
                    .iter()
                    .map(|path| File::open(path).with_context(|| format!("{}", path.display())));
                let opened = opened.collect::<anyhow::Result<Vec<_>>>()?;
                let readers = opened.into_iter().map(std::io::BufReader::new);
                let recording = convert::Recording {
                    sessions_per_s: *rate,
                    pause_max_s: *pause_max,
                    seed: *seed,
                    merge: *merge,
                };
                convert::coding_sessions(readers, &recording)?
            }
        };
        print_trace(&trace)
    }
}

/// The trace goes to standard output, its digest to standard error.
fn print_trace(trace: &Trace) -> anyhow::Result<()> {
    trace.write(BufWriter::new(stdout().lock()))?;
    eprintln!("{} turns, BLAKE3 {}", trace.turns.len(), trace.digest()?);
    Ok(())
}

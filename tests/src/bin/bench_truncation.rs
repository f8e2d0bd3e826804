//! `make bench-truncation`: what a truncated history costs and what it is worth, as `figure NAME VALUE UNIT` lines.
//!
//! CachedAttention (3.4) drops the earliest half of a history and goes on from the KV of the rest, which was
//! computed when the dropped tokens were there, at new places (*kept*). Its peer computes the rest anew
//! (*recomputed*). Both read the same articles of WikiText-2 on, token by token; *whole* is the history without
//! a truncation. The backend alone: no engine, no HTTP, and no load, whose time `make bench-runtime` has.
//!
//! A token's log-probability is known among the likeliest [`ALTERNATIVES`]; for the others that of the last of
//! these stands in, for all three alike. Raw results go to `bench/results/truncation.json`.

#![forbid(unsafe_code)]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use colloquy_tests::cluster::repository;
use colloquy_tests::figures::{cpu_name, figure, median, write_raw};
use colloquy_tests::progress::Progress;
use colloquy_tests::stepping::Stepping;
use runtime::backend::cpu::CpuOptions;
use runtime::batch::{BlockId, Phase, Row, RowOutput};
use runtime::text::metadata::TextMetadata;
use runtime::text::tokenizer::{Specials, Tokenizer};
use runtime::weights::gguf::Model;
use serde_json::json;

const THREADS: usize = 2;
const DEVICE_BYTES: u64 = 1 << 30;
const BLOCK: usize = 64;
/// Of a history: 1,024 tokens.
const BLOCKS: usize = 16;
/// Stay at the start.
const SINKS: usize = 1;
/// Leave behind them: half of the rest.
const DROPPED: usize = 7;
const KEPT: usize = BLOCKS - DROPPED;
/// Tokens behind the history, of which each is foretold.
const READ: usize = 2 * BLOCK;
/// Tokens of a next turn, for its time.
const TURN: usize = 50;
/// Articles read at once.
const AT_ONCE: usize = 8;
const ALTERNATIVES: u8 = 20;

/// What an article is read on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Whole,
    Kept,
    Recomputed,
}

const WAYS: [Way; 3] = [Way::Whole, Way::Kept, Way::Recomputed];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Whole => "whole",
            Way::Kept => "kept",
            Way::Recomputed => "recomputed",
        }
    }

    /// Blocks of history.
    fn blocks(self) -> usize {
        if self == Way::Whole { BLOCKS } else { KEPT }
    }

    /// Table of the article at `place`: every way writes into blocks of its own.
    fn table(self, place: usize) -> Vec<BlockId> {
        const READ_BLOCKS: usize = READ / BLOCK;
        let first = place * (BLOCKS + KEPT + 3 * READ_BLOCKS);
        let history = first..first + BLOCKS;
        let anew = history.end..history.end + KEPT;
        let behind = anew.end + self as usize * READ_BLOCKS;
        let of = match self {
            Way::Whole => history.collect(),
            Way::Kept => [first..first + SINKS, first + SINKS + DROPPED..history.end]
                .into_iter()
                .flatten()
                .collect::<Vec<usize>>(),
            Way::Recomputed => anew.collect(),
        };
        of.into_iter()
            .chain(behind..behind + READ_BLOCKS)
            .map(|block| BlockId(block as u32))
            .collect()
    }
}

/// The history that a truncation leaves.
fn kept(tokens: &[u32]) -> Vec<u32> {
    [&tokens[..SINKS * BLOCK], &tokens[(SINKS + DROPPED) * BLOCK..BLOCKS * BLOCK]].concat()
}

struct Reader(Stepping);

impl Reader {
    fn new(model: &Model) -> anyhow::Result<Self> {
        let tokens_per_block = BLOCK as u16;
        let options = CpuOptions { threads: THREADS, device_bytes: DEVICE_BYTES, tokens_per_block };
        let backend = Stepping::new(model, options)?;
        let needed = Way::Recomputed.table(AT_ONCE - 1).last().map_or(0, |block| block.0 + 1);
        let have = backend.block_count();
        ensure!(needed <= have, "{needed} device blocks are needed, there are {have}");
        Ok(Self(backend))
    }

    fn row(&self, way: Way, place: usize, position: usize, tokens: &[u32], phase: Phase) -> Row {
        let (sequence, position) = (place as u64, position as u32);
        let (tokens, table) = (tokens.to_vec(), way.table(place));
        self.0.row(sequence, phase, position, tokens, table, Some(ALTERNATIVES))
    }

    /// Seconds of a step that computes `tokens` from `position` on.
    fn prefill(
        &mut self,
        way: Way,
        place: usize,
        position: usize,
        tokens: &[u32],
    ) -> anyhow::Result<f64> {
        let row = self.row(way, place, position, tokens, Phase::Prefill);
        let start = Instant::now();
        self.0.step(vec![row])?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Reads the articles on behind their histories; of each, what was told of all tokens but the first.
    fn read_on(&mut self, way: Way, articles: &[Vec<u32>]) -> anyhow::Result<Vec<Score>> {
        let mut scores = vec![Score::default(); articles.len()];
        for at in 0..READ - 1 {
            let from = BLOCKS * BLOCK + at;
            let position = way.blocks() * BLOCK + at;
            let row = |(place, article): (usize, &Vec<u32>)| {
                self.row(way, place, position, &article[from..=from], Phase::Decode)
            };
            let rows = articles.iter().enumerate().map(row).collect();
            let told = self.0.step(rows)?;
            for ((article, told), score) in articles.iter().zip(told).zip(&mut scores) {
                score.add(article[from + 1], &told)?;
            }
        }
        Ok(scores)
    }
}

/// How well an article's tokens were foretold.
#[derive(Debug, Clone, Copy, Default)]
struct Score {
    tokens: f64,
    right: f64,
    nats: f64,
}

impl Score {
    fn add(&mut self, token: u32, told: &RowOutput) -> anyhow::Result<()> {
        let likeliest = told.token.context("a row samples")?;
        let least = told.alternatives.last().context("a row reports")?;
        let known = told.alternatives.iter().find(|one| one.token == token).unwrap_or(least);
        self.tokens += 1.0;
        self.right += f64::from(u8::from(likeliest.token == token));
        self.nats += f64::from(known.logprob);
        Ok(())
    }

    /// Percent of tokens.
    fn accuracy(&self) -> f64 {
        100.0 * self.right / self.tokens
    }

    /// A token.
    fn mean_nats(&self) -> f64 {
        self.nats / self.tokens
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// Beginnings of articles that are long enough.
fn articles(tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<u32>>> {
    let path = repository().join("bench/data/wikitext-2-valid.txt.xz");
    let file = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
    let mut text = String::new();
    lzma_rust2::XzReader::new(file, true).read_to_string(&mut text)?;
    // A title is a line of its own with one `=` on each side; headings have more.
    let is_title = |line: &str| {
        let inner = line.trim().strip_prefix("= ").and_then(|rest| rest.strip_suffix(" ="));
        inner.is_some_and(|inner| !inner.starts_with('='))
    };
    let mut articles = vec![String::new()];
    for line in text.lines() {
        if is_title(line) {
            articles.push(String::new());
        }
        if let Some(article) = articles.last_mut() {
            article.push_str(line);
            article.push('\n');
        }
    }
    let long = BLOCKS * BLOCK + READ;
    let tokens = articles.iter().map(|article| tokenizer.encode(article, Specials::Text));
    let long_ones = tokens.filter(|tokens| tokens.len() >= long);
    Ok(long_ones.map(|tokens| tokens[..long].to_vec()).collect())
}

fn model_path() -> PathBuf {
    std::env::var_os("COLLOQUY_BENCH_MODEL").map_or_else(
        || {
            let cache = std::env::var_os("COLLOQUY_CACHE").map_or_else(
                || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/colloquy"),
                PathBuf::from,
            );
            cache.join("models")
        },
        PathBuf::from,
    )
}

fn main() -> anyhow::Result<()> {
    let model = Model::open(&model_path())?;
    let tokenizer = Tokenizer::new(&TextMetadata::from_gguf(model.metadata())?)?;
    let articles = articles(&tokenizer)?;
    let mut reader = Reader::new(&model)?;
    let mut scores = WAYS.map(|_| Vec::new());
    let (mut turn_kept, mut turn_recomputed) = (Vec::new(), Vec::new());
    let mut progress = Progress::begin();
    for at_once in articles.chunks(AT_ONCE) {
        for (place, article) in at_once.iter().enumerate() {
            let (history, rest) = article.split_at(BLOCKS * BLOCK);
            let (left, turn) = (kept(history), &rest[..TURN]);
            reader.prefill(Way::Whole, place, 0, history)?;
            turn_kept.push(reader.prefill(Way::Kept, place, left.len(), turn)?);
            let all = [left.as_slice(), turn].concat();
            turn_recomputed.push(reader.prefill(Way::Recomputed, place, 0, &all)?);
        }
        for (way, scores) in WAYS.into_iter().zip(&mut scores) {
            scores.extend(reader.read_on(way, at_once)?);
        }
        progress.say(format!("{} of {} articles", scores[0].len(), articles.len()));
    }
    report(&scores, &turn_kept, &turn_recomputed)
}

fn report(
    scores: &[Vec<Score>; 3],
    turn_kept: &[f64],
    turn_recomputed: &[f64],
) -> anyhow::Result<()> {
    let (kept, recomputed) = (median(turn_kept), median(turn_recomputed));
    figure("truncated_turn_kept", kept, "s");
    figure("truncated_turn_recomputed", recomputed, "s");
    figure("truncated_turn_vs_recomputed", kept / recomputed, "ratio");
    let mut ways = serde_json::Map::new();
    for (way, scores) in WAYS.iter().zip(scores) {
        let accuracy = mean(scores.iter().map(Score::accuracy));
        figure(&format!("next_token_right_{}", way.name()), accuracy, "%");
        figure(
            &format!("next_token_{}", way.name()),
            mean(scores.iter().map(Score::mean_nats)),
            "nats",
        );
        let articles: Vec<f64> = scores.iter().map(Score::mean_nats).collect();
        let told = json!({ "right_percent": accuracy, "mean_nats_of_articles": articles });
        ways.insert(way.name().to_owned(), told);
    }
    // Article by article: they differ more from each other than the ways do.
    let [_, kept, recomputed] = scores;
    let pairs = kept.iter().zip(recomputed);
    let differences: Vec<f64> =
        pairs.map(|(kept, anew)| kept.mean_nats() - anew.mean_nats()).collect();
    let difference = mean(differences.iter().copied());
    let variance = mean(differences.iter().map(|one| (one - difference).powi(2)));
    let error = (variance / differences.len() as f64).sqrt();
    figure("kept_minus_recomputed", difference, "nats");
    figure("kept_minus_recomputed_standard_error", error, "nats");
    write_raw(
        "truncation",
        &json!({
            "cpu": cpu_name(),
            "class": runtime::backend::cpu::instruction_class(),
            "threads": THREADS,
            "history_tokens": BLOCKS * BLOCK,
            "kept_tokens": KEPT * BLOCK,
            "tokens_foretold_an_article": READ - 1,
            "turn_kept_seconds": turn_kept,
            "turn_recomputed_seconds": turn_recomputed,
            "ways": ways,
            "kept_minus_recomputed_nats": { "mean": difference, "standard_error": error },
        }),
    )
}

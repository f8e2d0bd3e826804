//! `make bench-runtime`: how fast the runtime computes, as `figure NAME VALUE UNIT` lines.
//!
//! The peer is llama.cpp (its Python binding, built by `bench/peer.sh`). Turns alternate, so that
//! both see the same machine; each figure is the median of [`ROUNDS`] rounds, a ratio is the ratio
//! of medians. Raw rounds go to `bench/results/runtime-cpu.json`.

#![forbid(unsafe_code)]

mod compute;
mod peer;
mod ttft;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use colloquy_tests::cluster::repository;
use colloquy_tests::figures::{cpu_name, figure, median, write_raw};
use serde_json::json;

use compute::Compute;
use peer::Peer;
use ttft::Ttft;

/// Left by `bench/peer.sh` when the peer is complete.
const PEER_STAMP: &str = "peer/built-0.3.36";
/// Rounds a figure.
const ROUNDS: usize = 7;
/// Rounds of the time to first token: three turns of 1,550 tokens and a restart each.
const TTFT_ROUNDS: usize = 5;
/// Threads on both sides.
const THREADS: usize = 2;
/// Tokens of the prefill figures.
const PREFILL_TOKENS: usize = 512;
/// Context and steps of the decode figures.
const DECODE_CONTEXT: usize = 128;
const DECODE_STEPS: u32 = 48;
/// Sequences that the device pool is cut for.
const SEQUENCES: usize = 8;

/// Token ids that look like nothing in particular, the same in every run.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    let mut state = 12_345_u64;
    (0..tokens)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 33) % vocab as u64) as u32
        })
        .collect()
}

fn cache_folder() -> PathBuf {
    std::env::var_os("COLLOQUY_CACHE").map_or_else(
        || {
            let home = std::env::var_os("HOME").unwrap_or_default();
            Path::new(&home).join(".cache/colloquy")
        },
        PathBuf::from,
    )
}

#[derive(Default)]
struct Rounds {
    prefill: Vec<f64>,
    decode_1: Vec<f64>,
    decode_8: Vec<f64>,
    peer_prefill: Vec<f64>,
    peer_decode: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let cache = cache_folder();
    let model = std::env::var_os("COLLOQUY_BENCH_MODEL")
        .map_or_else(|| cache.join("models"), PathBuf::from);
    let python = cache.join("peer/bin/python");
    let mut ours = Compute::new(&model, THREADS)?;
    let file = runtime::weights::gguf::Model::open(&model)?;
    let (path, vocab) = (file.path().to_owned(), file.config().vocab);
    drop(file);
    let script = repository().join("bench/peer_speed.py");
    let mut peer = if cache.join(PEER_STAMP).exists() {
        Some(Peer::start(&python, &script, &path, THREADS)?)
    } else {
        eprintln!("no peer in {}: run bench/peer.sh for the ratios", cache.display());
        None
    };

    // A quick look while working on something: fewer rounds.
    let rounds_wanted = std::env::var("COLLOQUY_BENCH_ROUNDS").ok();
    let rounds_wanted = rounds_wanted.map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    let mut rounds = Rounds::default();
    ours.prefill(PREFILL_TOKENS)?; // Warm: pages, buffers, clocks.
    for _ in 0..rounds_wanted {
        rounds.prefill.push(ours.prefill(PREFILL_TOKENS)?);
        rounds.decode_1.push(ours.decode(1, DECODE_CONTEXT, DECODE_STEPS)?);
        rounds.decode_8.push(ours.decode(8, DECODE_CONTEXT, DECODE_STEPS)?);
        if let Some(peer) = &mut peer {
            rounds.peer_prefill.push(peer.prefill(&prompt(PREFILL_TOKENS, vocab))?);
            rounds.peer_decode.push(peer.decode(&prompt(DECODE_CONTEXT, vocab), DECODE_STEPS)?);
        }
    }
    drop(peer);
    drop(ours);
    report(&rounds);
    let programs = std::env::current_exe()?;
    let programs = programs.parent().context("a program lies in a folder")?;
    let ttft = ttft::measure(programs, &path, THREADS, vocab, TTFT_ROUNDS.min(rounds_wanted))?;
    report_ttft(&ttft);
    keep(&rounds, &ttft)
}

fn report(rounds: &Rounds) {
    let [prefill, decode_1, decode_8] =
        [&rounds.prefill, &rounds.decode_1, &rounds.decode_8].map(|values| median(values));
    figure("prefill_512", prefill, "tokens/s");
    figure("decode_batch1", decode_1, "tokens/s");
    figure("decode_batch8", decode_8, "tokens/s");
    figure("decode_batch8_vs_batch1", decode_8 / decode_1, "ratio");
    if !rounds.peer_prefill.is_empty() {
        let (peer_prefill, peer_decode) =
            (median(&rounds.peer_prefill), median(&rounds.peer_decode));
        figure("llama_cpp_prefill_512", peer_prefill, "tokens/s");
        figure("llama_cpp_decode", peer_decode, "tokens/s");
        figure("prefill_512_vs_llama_cpp", prefill / peer_prefill, "ratio");
        figure("decode_vs_llama_cpp", decode_1 / peer_decode, "ratio");
    }
}

fn report_ttft(ttft: &Ttft) {
    let [cold, host, disk] = [&ttft.cold, &ttft.host, &ttft.disk].map(|values| median(values));
    figure("ttft_cold", cold, "s");
    figure("ttft_host", host, "s");
    figure("ttft_disk", disk, "s");
    figure("ttft_host_vs_cold", host / cold, "ratio");
    figure("ttft_disk_vs_cold", disk / cold, "ratio");
}

fn keep(rounds: &Rounds, ttft: &Ttft) -> anyhow::Result<()> {
    write_raw(
        "runtime-cpu",
        &json!({
            "threads": THREADS,
            "class": runtime::backend::cpu::instruction_class(),
            "cpu": cpu_name(),
            "prefill_512_tokens_per_second": rounds.prefill,
            "decode_batch1_tokens_per_second": rounds.decode_1,
            "decode_batch8_tokens_per_second": rounds.decode_8,
            "llama_cpp_prefill_512_tokens_per_second": rounds.peer_prefill,
            "llama_cpp_decode_tokens_per_second": rounds.peer_decode,
            "ttft_cold_seconds": ttft.cold,
            "ttft_host_seconds": ttft.host,
            "ttft_disk_seconds": ttft.disk,
        }),
    )
}

//! The backend alone, on a tiny random model: same bits however a sequence is cut, cached or cold.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{CpuBackend, CpuBackendError, CpuOptions, NoProbe, Probe};
use crate::adaskip::SkipSet;
use crate::batch::{
    Backend, BackendEvent, Batch, BlockId, FoundFrame, LoadBlock, LoadId, LoadPlan, Phase,
    ReadFrames, Row, RowOutput, Sampling, SaveId, SavePlan, SequenceId, StepId, StepOutput,
    WriteFrame,
};
use crate::weights::{gguf::Model, random::write_tiny_gguf};

/// A hang is a failure: nothing here takes a second.
const PATIENCE: Duration = Duration::from_mins(1);
const TOKENS_PER_BLOCK: u16 = 16;
const LAYERS: usize = 3;

struct Harness {
    backend: CpuBackend,
    rung: Receiver<()>,
}

fn model() -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_tiny_gguf(&path, 3).unwrap();
    Model::open(&path).unwrap()
}

impl Harness {
    /// The real model, with room for one long prompt.
    fn smollm2(path: &std::path::Path) -> Self {
        let (ring, rung) = channel();
        let ring = Mutex::new(ring);
        let wake = Arc::new(move || ring.lock().unwrap().send(()).unwrap_or(()));
        let options = CpuOptions { threads: 0, device_bytes: 64 << 20, tokens_per_block: 64 };
        let backend = CpuBackend::new(&Model::open(path).unwrap(), options, wake).unwrap();
        Self { backend, rung }
    }

    fn new(threads: usize) -> Self {
        Self::with_probe(threads, Arc::new(NoProbe))
    }

    fn with_probe(threads: usize, probe: Arc<dyn Probe>) -> Self {
        let (ring, rung) = channel();
        let ring = Mutex::new(ring);
        let wake = Arc::new(move || ring.lock().unwrap().send(()).unwrap_or(()));
        let options =
            CpuOptions { threads, device_bytes: 4 << 20, tokens_per_block: TOKENS_PER_BLOCK };
        let backend = CpuBackend::with_probe(&model(), options, wake, probe).unwrap();
        Self { backend, rung }
    }

    fn next(&mut self) -> BackendEvent {
        loop {
            if let Some(event) = self.backend.poll() {
                return event;
            }
            self.rung.recv_timeout(PATIENCE).expect("the backend hangs");
        }
    }

    fn run(&mut self, rows: Vec<Row>) -> StepOutput {
        let step = self.backend.submit(Batch { rows });
        loop {
            if let BackendEvent::Step(output) = self.next() {
                assert_eq!(output.step, step);
                return output;
            }
        }
    }

    /// Prefills in chunks, then decodes greedily; the bits of each token's log-probability.
    fn generate(&mut self, row: &Row, chunk: usize, replies: usize) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        let mut position = row.position;
        let mut output = None;
        for tokens in row.tokens.chunks(chunk) {
            let row = Row { tokens: tokens.to_vec(), position, ..row.clone() };
            output = self.run(vec![row]).rows.pop();
            position += tokens.len() as u32;
        }
        for _ in 0..replies {
            let token = output.unwrap().token.unwrap();
            out.push((token.token, token.logprob.to_bits()));
            let row = Row {
                tokens: vec![token.token],
                position,
                phase: Phase::Decode,
                waits: Vec::new(),
                ..row.clone()
            };
            output = self.run(vec![row]).rows.pop();
            position += 1;
        }
        out
    }
}

fn prompt(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 37 + seed * 101 + i * i * seed) % 263).collect()
}

fn row(sequence: u64, tokens: Vec<u32>, blocks: std::ops::Range<u32>) -> Row {
    Row {
        sequence: SequenceId(sequence),
        phase: Phase::Prefill,
        tokens,
        position: 0,
        block_table: blocks.map(BlockId).collect(),
        skip: Arc::new(SkipSet::none(LAYERS)),
        sampling: Some(Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            index: 0,
            logprobs: Some(2),
            banned: Arc::new([]),
        }),
        measure: false,
        waits: Vec::new(),
    }
}

fn bits(row: &RowOutput) -> Vec<(u32, u32)> {
    let token = row.token.iter().chain(&row.alternatives);
    token.map(|token| (token.token, token.logprob.to_bits())).collect()
}

#[derive(Debug)]
struct Frame(Mutex<Vec<u8>>);

impl Frame {
    fn new(harness: &Harness) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; LAYERS * harness.backend.geometry().row_bytes()])))
    }
}

impl WriteFrame for Frame {
    fn write(&self, offset: usize, from: &[u8]) {
        self.0.lock().unwrap()[offset..offset + from.len()].copy_from_slice(from);
    }
}

/// Frames that were saved, with their checksums.
#[derive(Debug)]
struct Saved(Vec<(Arc<Frame>, Arc<[u32]>)>);

impl ReadFrames for Saved {
    fn checksums(&self, place: usize) -> Option<Vec<u32>> {
        Some(self.0[place].1.to_vec())
    }

    fn read(&self, place: usize, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0[place].0.0.lock().unwrap()[offset..offset + to.len()]);
    }

    fn reject(&self, _place: usize) {}
}

fn all_layers() -> Arc<[u16]> {
    (0..LAYERS as u16).collect()
}

/// Saves blocks and waits; frames with their checksums.
fn save(harness: &mut Harness, blocks: std::ops::Range<u32>) -> Vec<(Arc<Frame>, Arc<[u32]>)> {
    let mut frames: Vec<(Arc<Frame>, Arc<[u32]>)> = Vec::new();
    for block in blocks.clone() {
        let frame = Frame::new(harness);
        frames.push((Arc::clone(&frame), Arc::new([])));
        let present_layers = all_layers();
        let id = SaveId(u64::from(block));
        harness.backend.save(SavePlan { id, block: BlockId(block), frame, present_layers });
    }
    for _ in blocks.clone() {
        let BackendEvent::Saved(id, checksums) = harness.next() else { panic!("no save") };
        frames[(id.0 - u64::from(blocks.start)) as usize].1 = checksums;
    }
    frames
}

fn load_plan(id: u64, frames: &[(Arc<Frame>, Arc<[u32]>)], first_block: u32) -> LoadPlan {
    let saved = Arc::new(Saved(frames.to_vec()));
    let blocks = (0..frames.len()).zip(first_block..).map(|(place, block)| LoadBlock {
        frame: FoundFrame::new(saved.clone(), place),
        block: BlockId(block),
    });
    LoadPlan { id: LoadId(id), blocks: blocks.collect(), present_layers: all_layers() }
}

#[test]
fn chunks_threads_and_company_do_not_change_a_bit() {
    let want = Harness::new(1).generate(&row(1, prompt(1, 75), 0..6), 75, 8);
    for (threads, chunk) in [(1, 1), (2, 7), (3, 16), (2, 74)] {
        let got = Harness::new(threads).generate(&row(1, prompt(1, 75), 0..6), chunk, 8);
        assert_eq!(got, want, "{threads} threads, chunks of {chunk}");
    }

    let mut together = Harness::new(2);
    let rows: Vec<Row> = (0..9)
        .map(|n| row(u64::from(n), prompt(n, 75 - 7 * (n as usize % 4)), n * 6..n * 6 + 6))
        .collect();
    let batched = together.run(rows.clone());
    for (row, output) in rows.iter().zip(&batched.rows) {
        let alone = Harness::new(1).run(vec![row.clone()]);
        assert_eq!(bits(output), bits(&alone.rows[0]), "sequence {:?}", row.sequence);
    }
}

#[test]
fn a_loaded_history_gives_the_bits_of_a_computed_one() {
    let mut harness = Harness::new(2);
    let tokens = prompt(4, 70);
    let want = harness.generate(&row(1, tokens.clone(), 0..6), 70, 5);
    // Four full blocks come back elsewhere in the pool; the rest is computed on top of them.
    let frames = save(&mut harness, 0..4);
    harness.backend.load(load_plan(9, &frames, 20));
    let mut cached = row(2, tokens[64..].to_vec(), 20..26);
    cached.position = 64;
    cached.waits = vec![LoadId(9)];
    assert_eq!(harness.generate(&cached, 70, 5), want);
}

#[test]
fn a_save_behind_a_running_step_holds_what_the_step_computed() {
    let mut harness = Harness::new(2);
    harness.backend.submit(Batch { rows: vec![row(1, prompt(5, 32), 0..2)] });
    let early = save_after_submit(&mut harness);
    let late = save(&mut harness, 0..2);
    for (early, late) in early.iter().zip(&late) {
        assert_eq!(early.1, late.1);
        assert_eq!(*early.0.0.lock().unwrap(), *late.0.0.lock().unwrap());
        let bytes = early.0.0.lock().unwrap();
        let row_bytes = bytes.len() / LAYERS;
        for (row, checksum) in bytes.chunks(row_bytes).zip(early.1.iter()) {
            assert_eq!(crc32c::crc32c(row), *checksum);
        }
    }
}

/// As [`save`] of blocks 0 and 1, while a step is in work; that step and the saves end in any order.
fn save_after_submit(harness: &mut Harness) -> Vec<(Arc<Frame>, Arc<[u32]>)> {
    let frames = [Frame::new(harness), Frame::new(harness)];
    for (block, frame) in (0_u32..).zip(&frames) {
        harness.backend.save(SavePlan {
            id: SaveId(1000 + u64::from(block)),
            block: BlockId(block),
            frame: Arc::clone(frame) as Arc<dyn WriteFrame>,
            present_layers: all_layers(),
        });
    }
    let (mut saved, mut stepped) = (Vec::new(), false);
    while saved.len() < 2 || !stepped {
        match harness.next() {
            BackendEvent::Saved(id, checksums) => {
                saved.push((Arc::clone(&frames[(id.0 - 1000) as usize]), checksums));
            }
            BackendEvent::Step(_) => stepped = true,
            _ => {}
        }
    }
    saved
}

/// Holds the last layer of a load back until layer 0 of some step is computed.
struct HoldLastLayer {
    computed: Mutex<Sender<()>>,
    wait: Mutex<Receiver<()>>,
    order: Mutex<Vec<String>>,
}

impl Probe for HoldLastLayer {
    fn before_load_layer(&self, _: LoadId, layer: usize) {
        if layer == LAYERS - 1 {
            let heard = self.wait.lock().unwrap().recv_timeout(PATIENCE);
            assert_ne!(heard, Err(RecvTimeoutError::Timeout), "layer 0 waits for the last layer");
        }
        self.order.lock().unwrap().push(format!("load {layer}"));
    }
    fn computed_layer(&self, step: StepId, layer: usize) {
        if step == StepId(1) {
            self.order.lock().unwrap().push(format!("compute {layer}"));
            if layer == 0 {
                self.computed.lock().unwrap().send(()).unwrap();
            }
        }
    }
}

#[test]
fn layer_0_computes_before_the_last_layer_has_arrived() {
    let (computed, wait) = channel();
    let probe = Arc::new(HoldLastLayer {
        computed: Mutex::new(computed),
        wait: Mutex::new(wait),
        order: Mutex::default(),
    });
    let mut harness = Harness::with_probe(2, Arc::clone(&probe) as Arc<dyn Probe>);
    let tokens = prompt(6, 40);
    let want = harness.run(vec![row(1, tokens.clone(), 0..3)]);
    let frames = save(&mut harness, 0..2);
    harness.backend.load(load_plan(1, &frames, 8));
    let mut cached = row(2, tokens[32..].to_vec(), 8..11);
    cached.position = 32;
    cached.waits = vec![LoadId(1)];
    let got = harness.run(vec![cached]);
    assert_eq!(bits(&got.rows[0]), bits(&want.rows[0]));
    let order = probe.order.lock().unwrap().clone();
    let at = |event: &str| order.iter().position(|e| e == event).unwrap();
    assert!(at("compute 0") < at("load 2"), "{order:?}");
    assert!(at("load 2") < at("compute 2"), "{order:?}");
}

/// Holds each layer of a load back until the compute thread has come to wait for it.
struct HoldUntilWaitedFor(Mutex<Sender<usize>>, Mutex<Receiver<usize>>);

impl Probe for HoldUntilWaitedFor {
    fn before_load_layer(&self, _: LoadId, layer: usize) {
        let waits = self.1.lock().unwrap().recv_timeout(PATIENCE);
        assert_eq!(waits, Ok(layer));
    }
    fn waits_for_loads(&self, step: StepId, layer: usize) {
        if step == StepId(1) {
            self.0.lock().unwrap().send(layer).unwrap();
        }
    }
}

#[test]
fn a_tail_that_arrives_late_does_not_overwrite_the_new_tokens_in_its_block() {
    let (waits, heard) = channel();
    let probe = Arc::new(HoldUntilWaitedFor(Mutex::new(waits), Mutex::new(heard)));
    let mut harness = Harness::with_probe(2, probe);
    let tokens = prompt(9, 44);
    // The frame of the last block holds the first eight of its tokens, and nothing in the places of
    // the four that are computed again.
    harness.run(vec![row(1, tokens[..40].to_vec(), 0..3)]);
    let frames = save(&mut harness, 0..3);
    harness.backend.load(load_plan(1, &frames, 8));
    let mut cached = row(2, tokens[40..].to_vec(), 8..11);
    cached.position = 40;
    cached.waits = vec![LoadId(1)];
    let got = harness.run(vec![cached]);
    let want = Harness::new(2).run(vec![row(3, tokens, 0..3)]);
    assert_eq!(bits(&got.rows[0]), bits(&want.rows[0]));
}

#[test]
fn a_wrong_checksum_fails_its_row_and_no_other() {
    let mut harness = Harness::new(2);
    let tokens = prompt(7, 40);
    let want = harness.run(vec![row(1, tokens.clone(), 0..3)]);
    let mut frames = save(&mut harness, 0..2);
    frames[1].0.0.lock().unwrap()[2 * harness.backend.geometry().row_bytes() + 5] ^= 1;
    harness.backend.load(load_plan(1, &frames, 8));
    frames.truncate(0);
    let mut broken = row(2, tokens[32..].to_vec(), 8..11);
    broken.position = 32;
    broken.waits = vec![LoadId(1)];
    let got = harness.run(vec![broken, row(3, tokens, 12..15)]);
    assert_eq!(got.rows[0].failed_load, Some(LoadId(1)));
    assert_eq!(got.rows[0].token, None);
    assert_eq!(got.rows[1].failed_load, None);
    assert_eq!(bits(&got.rows[1]), bits(&want.rows[0]));
}

#[test]
fn a_failed_load_is_told_and_a_good_one_too() {
    let mut harness = Harness::new(1);
    harness.run(vec![row(1, prompt(8, 16), 0..1)]);
    let frames = save(&mut harness, 0..1);
    harness.backend.load(load_plan(1, &frames, 3));
    assert!(matches!(harness.next(), BackendEvent::Loaded(LoadId(1))));
    let wrong = [(Arc::clone(&frames[0].0), Arc::from([1, 2, 3]))];
    harness.backend.load(load_plan(2, &wrong, 4));
    assert!(matches!(harness.next(), BackendEvent::LoadFailed(LoadId(2))));
    let mut gone = load_plan(3, &frames, 5);
    let frame = Arc::new(Gone::default());
    gone.blocks[0].frame = FoundFrame::new(frame.clone(), 0);
    harness.backend.load(gone);
    assert!(matches!(harness.next(), BackendEvent::LoadFailed(LoadId(3))));
    assert!(frame.0.load(Ordering::Relaxed), "whoever keeps it is told");
}

/// A frame that holds another block by now, and whether it was rejected.
#[derive(Debug, Default)]
struct Gone(AtomicBool);

impl ReadFrames for Gone {
    fn checksums(&self, _place: usize) -> Option<Vec<u32>> {
        None
    }

    fn read(&self, _place: usize, _offset: usize, to: &mut [u8]) {
        to.fill(0);
    }

    fn reject(&self, _place: usize) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_block_may_be_written_while_it_is_saved() {
    let mut harness = Harness::new(2);
    let tokens = prompt(9, 30);
    let whole = harness.run(vec![row(1, tokens.clone(), 0..2)]);
    harness.run(vec![row(2, tokens[..20].to_vec(), 4..6)]);
    // The tail block 5 is saved; the next step appends to it at once.
    let frame = Frame::new(&harness);
    let present_layers = all_layers();
    let plan = SavePlan { id: SaveId(1), block: BlockId(5), frame: frame.clone(), present_layers };
    harness.backend.save(plan);
    let mut rest = row(2, tokens[20..].to_vec(), 4..6);
    rest.position = 20;
    harness.backend.submit(Batch { rows: vec![rest] });
    let (mut checksums, mut output) = (None, None);
    while checksums.is_none() || output.is_none() {
        match harness.next() {
            BackendEvent::Saved(_, found) => checksums = Some(found),
            BackendEvent::Step(found) => output = Some(found),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bits(&output.unwrap().rows[0]), bits(&whole.rows[0]));
    let bytes = frame.0.lock().unwrap();
    let row_bytes = bytes.len() / LAYERS;
    for (row, checksum) in bytes.chunks(row_bytes).zip(checksums.unwrap().iter()) {
        assert_eq!(crc32c::crc32c(row), *checksum);
    }
}

fn skipping(attention: &[usize], ffn: &[usize], backfill: &[usize]) -> Arc<SkipSet> {
    let mut skip = SkipSet::none(LAYERS);
    for &layer in attention.iter().chain(backfill) {
        skip.attention[layer] = true;
    }
    for &layer in ffn {
        skip.ffn[layer] = true;
    }
    for &layer in backfill {
        skip.backfill[layer] = true;
    }
    skip.scale.fill(1.25);
    Arc::new(skip)
}

#[test]
fn rows_with_different_skip_sets_share_a_step_without_touching_each_other() {
    let sets = [
        skipping(&[], &[], &[]),
        skipping(&[1], &[], &[]),
        skipping(&[], &[0, 2], &[]),
        skipping(&[0], &[1], &[2]),
        skipping(&[0, 1, 2], &[0, 1, 2], &[]),
    ];
    let rows: Vec<Row> = (0..)
        .zip(&sets)
        .map(|(n, skip)| Row {
            skip: Arc::clone(skip),
            measure: n != 2,
            ..row(u64::from(n), prompt(n, 40), n * 3..n * 3 + 3)
        })
        .collect();
    let together = Harness::new(2).run(rows.clone());
    for (row, output) in rows.iter().zip(&together.rows) {
        let alone = Harness::new(1).run(vec![row.clone()]);
        assert_eq!(bits(output), bits(&alone.rows[0]));
        assert_eq!(output.importance, alone.rows[0].importance);
        let Some(importance) = &output.importance else {
            assert!(!row.measure);
            continue;
        };
        for layer in 0..LAYERS {
            let ran = |skipped: bool| if skipped { 0 } else { 40 };
            assert_eq!(importance.tokens[2 * layer], ran(row.skip.attention[layer]));
            assert_eq!(importance.tokens[2 * layer + 1], ran(row.skip.ffn[layer]));
        }
        for (sum, tokens) in importance.similarity_sum.iter().zip(&importance.tokens) {
            assert!(sum.abs() <= *tokens as f64 * (1.0 + 1.0e-9));
        }
    }
}

#[test]
fn backfilled_kv_serves_a_phase_that_runs_the_layer() {
    // Prefill skips attention 1 but backfills it; decode runs it. Same as a prefill whose last
    // token alone ran it: both see the same K and V in layer 1.
    let mut harness = Harness::new(2);
    let tokens = prompt(3, 33);
    let skip = skipping(&[], &[], &[1]);
    let mut first = row(1, tokens[..32].to_vec(), 0..3);
    first.skip = skip;
    harness.run(vec![first]);
    let mut last = row(1, tokens[32..].to_vec(), 0..3);
    last.position = 32;
    let once = bits(&harness.run(vec![last.clone()]).rows[0]);
    assert_eq!(bits(&harness.run(vec![last]).rows[0]), once);
    assert!(once.iter().all(|(_, logprob)| f32::from_bits(*logprob).is_finite()));
}

#[test]
fn a_pool_without_room_for_one_block_is_refused() {
    let options = CpuOptions { threads: 1, device_bytes: 1000, tokens_per_block: 64 };
    let refused = CpuBackend::new(&model(), options, Arc::new(|| ())).err().unwrap();
    assert!(matches!(refused, CpuBackendError::PoolTooSmall { device_bytes: 1000, .. }));
    let options = CpuOptions { tokens_per_block: 10, device_bytes: 1 << 20, ..options };
    let refused = CpuBackend::new(&model(), options, Arc::new(|| ())).err().unwrap();
    assert!(matches!(refused, CpuBackendError::TokensPerBlock { tokens_per_block: 10 }));
}

/// SmolLM2's file, or `None` where there is none. On CI its absence is a failure: this test is the
/// proof that our numbers are right.
fn smollm2() -> Option<std::path::PathBuf> {
    let cache = || {
        let home = std::path::PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
        std::env::var_os("COLLOQUY_CACHE")
            .map_or_else(|| home.join(".cache/colloquy"), std::path::PathBuf::from)
            .join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = std::env::var_os("COLLOQUY_MODEL").map_or_else(cache, std::path::PathBuf::from);
    let on_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(path.is_file() || !on_ci, "no model at {}: run `make weights`", path.display());
    path.is_file().then_some(path)
}

/// Largest difference of a log-probability from llama.cpp's. Both quantise activations to eight
/// bits, we with f32 scales and f16 KV, they with f16 scales and f32 KV: scales differ by 2^-11, so
/// that one activation in some hundreds rounds to the neighbouring step (1 / 127 of its block's
/// largest), in each of 210 products one after another.
const GOLDEN_TOLERANCE: f32 = 0.35;

/// A token of llama.cpp's greedy reply must be ours when it leads by more than both errors together.
const GOLDEN_LEAD: f32 = 2.0 * GOLDEN_TOLERANCE;

#[test]
fn logits_agree_with_llama_cpp() {
    let Some(model) = smollm2() else {
        eprintln!("skipped: no model (`make weights` fetches it)");
        return;
    };
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/logits.json");
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let mut harness = Harness::smollm2(&model);
    let blocks = harness.backend.geometry().block_count;
    let layers = usize::from(harness.backend.geometry().layers);
    let (mut compared, mut squares, mut worst) = (0_u32, 0.0_f32, 0.0_f32);
    for entry in golden["entries"].as_array().unwrap() {
        let name = &entry["name"];
        let tokens: Vec<u32> = serde_json::from_value(entry["token_ids"].clone()).unwrap();
        let top: Vec<(u32, f32)> = serde_json::from_value(entry["top"].clone()).unwrap();
        let mut prompt = row(1, tokens, 0..blocks);
        prompt.skip = Arc::new(SkipSet::none(layers));
        prompt.sampling.as_mut().unwrap().logprobs = Some(u8::MAX);
        let mut next = prompt.clone();
        let mut output = None;
        for chunk in prompt.tokens.chunks(512) {
            next.tokens = chunk.to_vec();
            output = harness.run(vec![next.clone()]).rows.pop();
            next.position += chunk.len() as u32;
        }
        let alternatives = &output.as_ref().unwrap().alternatives;
        for (token, want) in top {
            let got = alternatives.iter().find(|alternative| alternative.token == token);
            let got = got.unwrap_or_else(|| panic!("{name}: {token} is not among our likeliest"));
            let difference = (got.logprob - want).abs();
            assert!(difference <= GOLDEN_TOLERANCE, "{name}: {token} {} {want}", got.logprob);
            (compared, squares) = (compared + 1, squares + difference * difference);
            worst = worst.max(difference);
        }
        for step in entry["greedy"].as_array().unwrap() {
            let token = step["token"].as_u64().unwrap() as u32;
            let ours = output.unwrap().token.unwrap().token;
            let lead = step["lead"].as_f64().unwrap() as f32;
            assert!(
                ours == token || lead <= GOLDEN_LEAD,
                "{name}: {ours}, {token} leads by {lead}"
            );
            next.tokens = vec![token];
            output = harness.run(vec![next.clone()]).rows.pop();
            next.position += 1;
        }
    }
    let rms = (squares / compared as f32).sqrt();
    println!("{compared} log-probabilities: root mean square difference {rms}, largest {worst}");
}

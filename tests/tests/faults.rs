//! A real runtime over a daemon whose drive is slow or fails: its steps take as long as ever.
//!
//! The runtime computes prompts that nothing has; what it saves goes to the drive. Beside it another
//! attachment asks for a conversation that only the drive has, again and again. Phases with and without
//! a fault alternate; the durations are the runtime's own sums.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kv_protocol::geometry::LayerSet;
use kv_protocol::{BlockHeader, Dtype, Geometry, layout};
use runtime::weights::gguf::Model;
use runtime::weights::random::write_tiny_gguf;
use support::daemon::faults::{EIO, Fault, Faults};
use support::daemon::{Daemon, Driver, conversation, until};
use support::{Client, Runtime, TOKENS_PER_BLOCK, beside_us, prompt};

/// A drive's worst.
const FAULTS: [Fault; 3] = [Fault::Slow(1_000_000), Fault::Write(EIO), Fault::Read(EIO)];
const PROMPT_TOKENS: u32 = 16 * 16;
/// Requests in a phase: about seven steps each.
const REQUESTS: u32 = 8;
/// Frames for two and a half of what is in use at once: there is always something to be written or read.
const FRAMES: u64 = 48;
/// More than this much longer than without a fault is a wait for the drive.
const SLOWER_MAX: f64 = 1.05;
/// Rounds at least, and at most: a machine with other work is measured until the median is settled.
const ROUNDS: std::ops::RangeInclusive<usize> = 8..=60;

fn geometry(model: &Model) -> Geometry {
    let shape = model.config();
    let number = |of: usize| of.try_into().expect("a small model");
    let (layers, heads, dim) = (number(shape.layers), number(shape.kv_heads), shape.head_dim);
    let (tokens, dim) = (TOKENS_PER_BLOCK as u16, dim.try_into().expect("a small model"));
    let layer_set = LayerSet::all(layers);
    Geometry::new(tokens, layers, heads, dim, Dtype::F16, layer_set).expect("the model's geometry")
}

fn region_bytes(geometry: &Geometry) -> u64 {
    let header = BlockHeader::bytes(geometry) as u64;
    let frame = layout::FRAME_ENTRY_BYTES + header + geometry.frame_bytes();
    layout::FRAME_TABLE_AT + layout::PAGE_BYTES + FRAMES * frame
}

/// Seconds and number of all steps so far.
fn steps(client: &Client) -> (f64, f64) {
    let metrics = client.get("/metrics");
    let sum_of = |name: &str| -> f64 {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let seconds = sum_of("colloquy_runtime_step_seconds_sum")
        + sum_of("colloquy_runtime_step_load_wait_seconds_sum");
    (seconds, sum_of("colloquy_runtime_step_seconds_count"))
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn a_slow_drive_and_a_failing_one_leave_the_engines_steps_as_they_are() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    write_tiny_gguf(&path, 7).expect("the tiny model");
    let geometry = geometry(&Model::open(&path).expect("the tiny model"));
    let faults = Faults::new(dir.path());
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let environment = faults.environment();
    let daemon = Daemon::start_in(
        &binary,
        dir.path(),
        region_bytes(&geometry),
        &["--disk-bytes=64MiB"],
        &environment,
    );
    let runtime = Runtime::start(&path, Some(&daemon.socket), &["--device-bytes=64Mi"]);
    let client = runtime.client();
    let mut asked = 0;
    // Mean duration of a step in a phase.
    let mut phase = |fault: Fault| -> f64 {
        if fault == Fault::None {
            faults.set(fault);
            until("the drive is in use again", || {
                (daemon.status().pointer("/disk/state")? == "ready").then_some(())
            });
        }
        faults.set(fault);
        let (seconds, count) = steps(&client);
        for _ in 0..REQUESTS {
            asked += 1;
            client.ask(&prompt(asked, PROMPT_TOKENS), &format!("cold {asked}"));
        }
        let (seconds_after, count_after) = steps(&client);
        (seconds_after - seconds) / (count_after - count)
    };
    let (stop, loads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut driver = Driver::attach(&daemon.socket, geometry);
            let wanted = [1, 2].map(|number| conversation(number, 16 * 8));
            while !stop.load(Ordering::Relaxed) {
                for tokens in &wanted {
                    // What the drive did not take or give is saved again.
                    if driver.load(tokens).is_ok_and(|loaded| loaded.tokens == tokens.len()) {
                        loads.fetch_add(1, Ordering::Relaxed);
                    } else {
                        let _ = driver.save(tokens);
                    }
                }
            }
        });
        phase(Fault::None); // Warm.
        let mut ratios = [const { Vec::new() }; FAULTS.len()];
        for round in 1..=*ROUNDS.end() {
            for (fault, ratios) in FAULTS.into_iter().zip(&mut ratios) {
                let before = phase(Fault::None);
                let during = phase(fault);
                let after = phase(Fault::None);
                ratios.push(2.0 * during / (before + after));
            }
            let settled = ratios.iter().all(|ratios| median(ratios) <= SLOWER_MAX);
            if round >= *ROUNDS.start() && settled {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        for (fault, ratios) in FAULTS.into_iter().zip(&ratios) {
            let (rounds, ratio) = (ratios.len(), median(ratios));
            println!("{fault:?}: steps take {ratio:.3} of normal (median of {rounds} rounds)");
            assert!(ratio <= SLOWER_MAX, "{fault:?}: {ratios:?}");
        }
    });
    assert!(loads.load(Ordering::Relaxed) > 0, "nothing was loaded beside the steps");
    assert!(daemon.status_u64("/writes") > 0, "nothing was written: {}", daemon.status());
    let skipped = daemon.get("/metrics");
    assert!(skipped.contains("disk_errors_total"), "{skipped}");
    runtime.stop();
}

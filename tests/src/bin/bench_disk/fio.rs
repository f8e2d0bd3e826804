//! The peer: `fio`, which only moves bytes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};

/// What fio does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Read,
    Write,
    /// Reads, and 30 % writes among them.
    Mixed,
}

/// One pass of fio over a file; bytes a second of its reads, or of its writes.
pub fn pass(
    file: &Path,
    work: Work,
    file_bytes: u64,
    block_bytes: u64,
    depth: usize,
) -> anyhow::Result<f64> {
    let rw = match work {
        Work::Read => "randread",
        Work::Write => "randwrite",
        Work::Mixed => "randrw",
    };
    let output = Command::new("fio")
        .args(["--name=pass", "--direct=1", "--ioengine=libaio", "--output-format=json"])
        .args(["--refill_buffers", "--end_fsync=1", "--rwmixread=70", "--allow_file_create=1"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={rw}"))
        .arg(format!("--size={}", file_bytes / block_bytes * block_bytes))
        .arg(format!("--bs={block_bytes}"))
        .arg(format!("--iodepth={depth}"))
        .output()
        .context("fio did not start: install it (Debian: apt-get install fio)")?;
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio failed: {problem}");
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: serde_json::Value = serde_json::from_str(json).context("fio's report")?;
    let side = if work == Work::Write { "write" } else { "read" };
    let rate = report.pointer(&format!("/jobs/0/{side}/bw_bytes"));
    rate.and_then(serde_json::Value::as_f64).context("fio's report has no rate")
}

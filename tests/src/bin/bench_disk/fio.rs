//! The peer: `fio`, which only moves bytes.

use std::path::PathBuf;
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

/// How fio keeps bytes in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One thread, many requests: what figures are measured against.
    Libaio,
    /// As the daemon does: a thread a request.
    Threads,
    /// One thread, many requests in a ring.
    IoUring,
}

/// One pass of fio over files of one size; bytes a second of its reads, or of its writes.
pub fn pass(
    way: Way,
    files: &[PathBuf],
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
    let bytes = file_bytes / block_bytes * block_bytes * files.len() as u64;
    let names = files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(":");
    let way = match way {
        Way::Libaio => vec!["--ioengine=libaio".to_owned(), format!("--iodepth={depth}")],
        Way::IoUring => vec!["--ioengine=io_uring".to_owned(), format!("--iodepth={depth}")],
        Way::Threads => {
            let share = (bytes / depth as u64 / block_bytes).max(1) * block_bytes;
            let threads = ["--ioengine=psync", "--thread", "--group_reporting"].map(str::to_owned);
            let shares = [format!("--numjobs={depth}"), format!("--io_size={share}")];
            threads.into_iter().chain(shares).collect()
        }
    };
    let output = Command::new("fio")
        .args(["--name=pass", "--direct=1", "--output-format=json"])
        .args(way)
        .args(["--refill_buffers", "--end_fsync=1", "--rwmixread=70", "--allow_file_create=1"])
        .arg(format!("--filename={names}"))
        .arg("--file_service_type=random")
        .arg(format!("--rw={rw}"))
        .arg(format!("--size={bytes}"))
        .arg(format!("--bs={block_bytes}"))
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

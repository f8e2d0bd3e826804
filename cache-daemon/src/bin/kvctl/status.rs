//! `kvctl status`: one screen.

use hyper::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::table::{bar, bytes, count, number, print_json, text, when};

pub fn run(client: &Client, as_json: bool) -> anyhow::Result<()> {
    let status = client.get("/status")?;
    let metrics = client.text(Method::GET, "/metrics", None)?;
    let found = by_label(&metrics, "colloquy_cache_found_blocks_total");
    let misses = by_label(&metrics, "colloquy_cache_misses_total");
    if as_json {
        let counts = |counts: &[(String, u64)]| {
            counts.iter().map(|(label, count)| (label.clone(), json!(count))).collect::<Value>()
        };
        let mut all = status;
        all["found_blocks"] = counts(&found);
        all["misses"] = counts(&misses);
        return print_json(&all);
    }
    print!("{}", screen(&status, &found, &misses));
    Ok(())
}

fn screen(status: &Value, found: &[(String, u64)], misses: &[(String, u64)]) -> String {
    let n = |pointer: &str| number(status, pointer);
    let geometry = match text(status, "/geometry") {
        "" => "no runtime has attached yet",
        geometry => geometry,
    };
    let model = match text(status, "/fingerprint") {
        "" => String::new(),
        fingerprint => format!("model {fingerprint}, "),
    };
    let mut lines = vec![format!("{model}{geometry}"), String::new()];
    let [free, filling, ready, pinned] =
        ["free", "filling", "ready", "pinned"].map(|state| n(&format!("/frames/{state}")));
    let frames = free + filling + ready + pinned;
    let used = frames - free;
    lines.push(format!(
        "host   {}  {} of {} frames used, {} pinned, {} being filled; region {}{}",
        bar(used, frames),
        count(used),
        count(frames),
        count(pinned),
        count(filling),
        bytes(n("/region_bytes")),
        match (n("/faulted_bytes"), n("/region_bytes")) {
            (faulted, all) if faulted < all => format!(", {} of it ready", bytes(faulted)),
            _ => String::new(),
        }
    ));
    let state = text(status, "/disk/state");
    if state == "none" {
        lines.push("disk   none (--disk-dir)".into());
    } else {
        let direct = status.pointer("/disk/direct_io").and_then(Value::as_bool) == Some(true);
        lines.push(format!(
            "disk   {}  {} of blocks, {} of files, {} allowed; {} {state}{}",
            bar(n("/disk/stored_bytes"), n("/disk/bytes_max")),
            bytes(n("/disk/stored_bytes")),
            bytes(n("/disk/physical_bytes")),
            bytes(n("/disk/bytes_max")),
            text(status, "/disk/engine"),
            if direct { ", past the page cache" } else { "" },
        ));
    }
    match text(status, "/disk/error") {
        "" => {}
        error => lines.push(format!("       last failure: {error}")),
    }
    lines.push(String::new());
    lines.push(format!(
        "blocks         {} known, {} in host, {} on disk",
        count(n("/blocks/known")),
        count(n("/blocks/host")),
        count(n("/blocks/disk")),
    ));
    lines.push(format!(
        "conversations  {} on record{}",
        count(n("/conversations")),
        match n("/deletions/waiting") {
            0 => String::new(),
            waiting => format!(
                "; {} deleted ones still to be erased from disk, the oldest deleted {}",
                count(waiting),
                when(n("/deletions/oldest_ms")),
            ),
        }
    ));
    lines.push(format!(
        "runtimes       {} attached, {} sequences",
        count(n("/attachments")),
        count(n("/sequences")),
    ));
    lines.push(format!("policy         {}", text(status, "/policy")));
    lines.push(format!(
        "found          {}",
        listed(found, "blocks found by lookups", "no lookup has found a block yet"),
    ));
    lines.push(format!(
        "missed         {}",
        listed(misses, "lookups ended early", "no lookup has ended early"),
    ));
    lines.push(format!(
        "moves          {} promoted for hints, {} for lookups; {} written to disk; {} left host, {} left disk",
        count(n("/promotes_by_hint")),
        count(n("/promotes_by_lookup")),
        count(n("/writes")),
        count(n("/evictions_host")),
        count(n("/evictions_disk")),
    ));
    lines.push(format!(
        "worker         start {} on this region, format {}",
        count(n("/worker_starts")),
        count(n("/format_epoch")),
    ));
    lines.join("\n") + "\n"
}

fn listed(counts: &[(String, u64)], what: &str, nothing: &str) -> String {
    let all: u64 = counts.iter().map(|(_, count)| count).sum();
    if all == 0 {
        return nothing.to_owned();
    }
    let parts: Vec<String> = counts
        .iter()
        .filter(|(_, number)| *number > 0)
        .map(|(label, number)| format!("{label} {}", count(*number)))
        .collect();
    format!("{} {what}: {}", count(all), parts.join(", "))
}

/// A counter of one label out of Prometheus' text, by that label.
fn by_label(metrics: &str, name: &str) -> Vec<(String, u64)> {
    let line = |line: &str| {
        let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?;
        let label = labels.split_once("=\"")?.1.strip_suffix('"')?;
        Some((label.to_owned(), value.trim().parse::<f64>().ok()? as u64))
    };
    metrics.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_label() {
        let metrics =
            "# HELP x Y.\nx_total{tier=\"disk\"} 3\nx_total{tier=\"host\"} 1200\nx_totally 4\n";
        let expected = [("disk".to_owned(), 3), ("host".to_owned(), 1200)];
        assert_eq!(by_label(metrics, "x_total"), expected);
        let line = listed(&expected, "blocks", "none");
        assert_eq!(line, "1,203 blocks: disk 3, host 1,200");
    }

    #[test]
    fn a_daemon_without_a_runtime_and_with_a_failing_disk_says_so() {
        let status = json!({
            "disk": { "state": "failed", "engine": "slots", "error": "no room" }, "frames": {}
        });
        let screen = screen(&status, &[], &[]);
        for part in ["no runtime has attached yet", "slots failed", "last failure: no room"] {
            assert!(screen.contains(part), "{part:?} is not in\n{screen}");
        }
    }
}

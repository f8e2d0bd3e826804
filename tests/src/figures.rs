//! What all benchmarks share: how a figure is printed, and where raw results lie.

use anyhow::Context as _;
use serde_json::Value;

use crate::cluster::repository;

/// Prints a result: `figure NAME VALUE UNIT`.
pub fn figure(name: &str, value: f64, unit: &str) {
    println!("figure {name} {value:.3} {unit}");
}

/// The value that `share` of all values lie below.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64) as usize;
    sorted[place.min(sorted.len() - 1)]
}

/// Half of all values lie below it.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Keeps raw results as `bench/results/NAME.json`.
pub fn write_raw(name: &str, raw: &Value) -> anyhow::Result<()> {
    let results = repository().join("bench/results");
    std::fs::create_dir_all(&results)?;
    let path = results.join(format!("{name}.json"));
    std::fs::write(&path, serde_json::to_string_pretty(raw)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Raw results that [`write_raw`] kept.
pub fn read_raw(name: &str) -> anyhow::Result<Value> {
    let path = repository().join("bench/results").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// The processor, in its maker's words.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned()
}

//! Coverage-guided fuzzing of every parser of bytes from outside, and of sequences of operations beside an
//! oracle (`make fuzz`, `tests/fuzz`). libFuzzer drives; what it looks for is a panic, a hang, or memory.
//!
//! `COLLOQUY_FUZZ` names the target; `list` prints all of them. `COLLOQUY_FUZZ_SEEDS` is a folder that gets
//! the target's seeds: right inputs, from which the first changed ones are made.

#![no_main]

mod operations;
mod parsers;

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// Something to be fuzzed.
struct Target {
    name: &'static str,
    /// Panics when what it tries is wrong.
    run: fn(&[u8]),
    /// Inputs that get far.
    seeds: fn() -> Vec<Vec<u8>>,
}

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fn choose() -> &'static Target {
    let name = std::env::var("COLLOQUY_FUZZ").unwrap_or_else(|_| "list".to_owned());
    let mut targets = parsers::TARGETS.iter().chain(operations::TARGETS);
    if let Some(target) = targets.clone().find(|target| target.name == name) {
        if let Ok(folder) = std::env::var("COLLOQUY_FUZZ_SEEDS") {
            for (number, seed) in (target.seeds)().iter().enumerate() {
                let path = Path::new(&folder).join(format!("seed-{number}"));
                std::fs::write(path, seed).expect("the folder of seeds takes files");
            }
        }
        return target;
    }
    targets.by_ref().for_each(|target| println!("{}", target.name));
    std::process::exit(if name == "list" { 0 } else { 2 })
}

fuzz_target!(init: { TARGET.get_or_init(choose); }, |bytes: &[u8]| {
    (TARGET.get_or_init(choose).run)(bytes);
});

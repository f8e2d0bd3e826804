//! What does not start: an exit code and a sentence, never a panic.

mod common;

use std::fs;
use std::path::Path;

use common::{program, tiny_model};

/// Exit code and what was said on stderr.
fn run(model: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let output = program(model)
        .args(["--http", "127.0.0.1:0"])
        .args(flags)
        .output()
        .expect("the program starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The last line, which is the sentence.
fn sentence(stderr: &str) -> &str {
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr.lines().last().unwrap_or_default()
}

#[test]
fn a_truncated_model_file_is_exit_code_65_wherever_it_was_cut() {
    let (folder, path) = tiny_model();
    let whole = fs::read(&path).unwrap();
    let cut = folder.path().join("cut.gguf");
    for length in [0, 3, 4, 20, 100, 1000, 5000, whole.len() / 2, whole.len() - 1] {
        fs::write(&cut, &whole[..length]).unwrap();
        let (code, stderr) = run(&cut, &[]);
        assert_eq!(code, Some(65), "cut at {length}: {stderr}");
        assert!(sentence(&stderr).contains("cut.gguf"), "{stderr}");
    }
}

#[test]
fn a_foreign_file_is_exit_code_65() {
    let (folder, path) = tiny_model();
    let file = folder.path().join("foreign.gguf");
    let mut wild = fs::read(&path).unwrap();
    wild[8..24].fill(0xFF); // Counts of tensors and of keys.
    for bytes in [b"PK\x03\x04 not a model at all".to_vec(), vec![0; 4096], wild] {
        fs::write(&file, bytes).unwrap();
        let (code, stderr) = run(&file, &[]);
        assert_eq!(code, Some(65), "{stderr}");
        assert!(sentence(&stderr).contains("foreign.gguf"), "{stderr}");
    }
}

#[test]
fn no_model_and_two_models_are_exit_code_65() {
    let (folder, path) = tiny_model();
    let (code, stderr) = run(&folder.path().join("absent.gguf"), &[]);
    assert_eq!(code, Some(65), "{stderr}");
    fs::copy(&path, folder.path().join("second.gguf")).unwrap();
    let (code, stderr) = run(folder.path(), &[]);
    assert_eq!(code, Some(65), "{stderr}");
}

/// A generic byte-level tokenizer gave wrong ids for 19 of 22 strings of SmolLM2, without an error.
#[test]
fn an_unknown_pre_tokenizer_is_refused_by_name() {
    let (folder, path) = tiny_model();
    let mut bytes = fs::read(&path).unwrap();
    let at =
        bytes.windows(6).position(|window| window == b"smollm").expect("the name is in the file");
    bytes[at..at + 6].copy_from_slice(b"marble");
    let file = folder.path().join("other.gguf");
    fs::write(&file, bytes).unwrap();
    let (code, stderr) = run(&file, &[]);
    assert_eq!(code, Some(65), "{stderr}");
    assert!(sentence(&stderr).contains("`marble`"), "{stderr}");
}

#[test]
fn settings_that_cannot_work_are_exit_code_64() {
    let (_folder, path) = tiny_model();
    for (flags, word) in [
        (&["--frob"][..], "--frob"),
        (&["--http", "nowhere"], "--http"),
        (&["--tokens-per-block", "20"], "--tokens-per-block"),
        (&["--context-max", "100000"], "--context-max"),
        (&["--device-bytes", "1000"], "--device-bytes"),
        (&["--log", "a=b=c"], "--log"),
    ] {
        let (code, stderr) = run(&path, flags);
        assert_eq!(code, Some(64), "{flags:?}: {stderr}");
        assert!(stderr.contains(word), "{flags:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

//! `local` as a process: what it refuses, and how it passes on the failure of a program.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder with programs that end at once.
struct Place {
    dir: TempDir,
}

impl Place {
    fn with_daemon(script: &str) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        for (name, script) in [("cache-daemon", script), ("runtime", "exit 0")] {
            let path = place.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        place
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn local(&self, model: &Path) -> Output {
        Command::new(env!("CARGO_BIN_EXE_local"))
            .arg(model)
            .arg("--weights")
            .arg(self.path())
            .arg("--dir")
            .arg(self.path().join("state"))
            .arg("--bin-dir")
            .arg(self.path())
            .args(["--port", "0", "--cache-port", "0"])
            .output()
            .unwrap()
    }
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/smollm2.yaml")
}

#[test]
fn a_program_s_exit_code_and_last_sentence_are_passed_on() {
    let script = "echo starting >&2; echo 'the disk is locked by another daemon' >&2; exit 64";
    let place = Place::with_daemon(script);
    let output = place.local(&example());
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cache-daemon ended by itself"), "{said}");
    let log = std::fs::read_to_string(place.path().join("state/logs/cache-daemon.log")).unwrap();
    assert!(log.contains("cache-daemon | the disk is locked by another daemon"), "{log}");
}

#[test]
fn a_program_that_ends_by_itself_has_failed_even_with_code_0() {
    let output = Place::with_daemon("exit 0").local(&example());
    assert_eq!(output.status.code(), Some(70));
}

#[test]
fn a_bad_model_is_refused_before_anything_is_started() {
    let place = Place::with_daemon("touch \"$0.was-started\"");
    let model = place.path().join("model.yaml");
    let text = std::fs::read_to_string(example()).unwrap().replace("threads:", "thread:");
    std::fs::write(&model, text).unwrap();
    let output = place.local(&model);
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("unknown field \"spec.runtime.thread\""), "{said}");
    assert!(!place.path().join("cache-daemon.was-started").exists());
}

//! A peer: the crate foyer, in a process of its own (`bench/foyer`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, ensure};

/// A running peer; its process ends with it.
pub struct Foyer {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// Where `make bench-disk` builds it.
pub fn binary(home: &Path) -> Option<PathBuf> {
    let path = home.join("bench-foyer/release/bench-foyer");
    path.exists().then_some(path)
}

impl Foyer {
    pub fn start(
        binary: &Path,
        dir: &Path,
        mib: u64,
        block_mib: u64,
        depth: usize,
    ) -> anyhow::Result<Self> {
        let numbers = [mib, block_mib, depth as u64].map(|number| number.to_string());
        let mut child = Command::new(binary)
            .arg(dir)
            .args(numbers)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("bench-foyer does not start")?;
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("its answers")?);
        Ok(Self { child, commands, answers })
    }

    /// Bytes a second, of what was found.
    pub fn pass(&mut self, command: &str, count: usize, seed: u64) -> anyhow::Result<f64> {
        let commands = self.commands.as_mut().context("it was ended")?;
        writeln!(commands, "{command} {count} {seed}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let (rate, done) = line.trim().split_once(' ').context("bench-foyer has ended")?;
        let done: usize = done.parse().context("how many were done")?;
        // It drops whole regions, so some of the newest half may be gone.
        ensure!(2 * done > count, "foyer has {done} of {count} that were written");
        Ok(rate.parse()?)
    }
}

impl Drop for Foyer {
    fn drop(&mut self) {
        drop(self.commands.take()); // It ends with its input.
        let _ = self.child.wait();
    }
}

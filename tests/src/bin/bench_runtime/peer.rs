//! The peer: llama.cpp through its Python binding, kept running so that its turns alternate with
//! ours under the same load of the machine.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, ensure};

/// The peer's process; ended when dropped.
pub struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts `script` with the venv's Python.
    pub fn start(
        python: &Path,
        script: &Path,
        model: &Path,
        threads: usize,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            .arg(script)
            .arg(model)
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let to = child.stdin.take().context("stdin is piped")?;
        let from = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, to, from })
    }

    fn ask(&mut self, what: &str, tokens: &[u32], steps: u32) -> anyhow::Result<f64> {
        let question = serde_json::json!({ "what": what, "tokens": tokens, "steps": steps });
        writeln!(self.to, "{question}")?;
        self.to.flush()?;
        let mut line = String::new();
        ensure!(self.from.read_line(&mut line)? > 0, "the peer has ended");
        line.trim().parse().with_context(|| format!("the peer answered {line:?}"))
    }

    /// Tokens a second of one prefill.
    pub fn prefill(&mut self, tokens: &[u32]) -> anyhow::Result<f64> {
        self.ask("prefill", tokens, 0)
    }

    /// Tokens a second of greedy decoding after a prompt.
    pub fn decode(&mut self, tokens: &[u32], steps: u32) -> anyhow::Result<f64> {
        self.ask("decode", tokens, steps)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Its input ends with us, so it ends by itself; the kill is for a peer that hangs.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

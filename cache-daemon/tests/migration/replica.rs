//! A daemon that takes part in moves, with a small runtime, and what it holds.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use kv_protocol::{ConversationId, Geometry};
use runtime::cache_client::CacheEvent;
use serde_json::{Value, json};

use crate::support::{Daemon, Driver, conversation, free_address, geometry, region_bytes, until};

pub const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");
pub const SECRET: &str = "a secret of the test, long enough to be one";

/// A daemon that lets others fetch from it, with a runtime.
pub struct Replica {
    pub dir: tempfile::TempDir,
    pub daemon: Daemon,
    pub driver: Driver,
    pub exports: SocketAddr,
}

impl Replica {
    pub fn start(frames: u64, more: &[&str]) -> Self {
        Self::with(frames, geometry(), SECRET, more)
    }

    pub fn with(frames: u64, geometry: Geometry, secret: &str, more: &[&str]) -> Self {
        Self::of(frames, geometry, secret, more, &[])
    }

    pub fn in_environment(
        frames: u64,
        more: &[&str],
        environment: &[(&'static str, String)],
    ) -> Self {
        Self::of(frames, geometry(), SECRET, more, environment)
    }

    fn of(
        frames: u64,
        geometry: Geometry,
        secret: &str,
        more: &[&str],
        environment: &[(&'static str, String)],
    ) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("secret");
        std::fs::write(&file, secret).expect("our own folder");
        let exports = free_address();
        let flags = [
            format!("--migration-listen={exports}"),
            format!("--migration-secret-file={}", file.display()),
        ];
        let flags: Vec<&str> =
            flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let environment: Vec<(&str, &Path)> =
            environment.iter().map(|(name, value)| (*name, Path::new(value))).collect();
        let binary = Path::new(BINARY);
        let bytes = region_bytes(frames);
        let daemon = Daemon::start_in(binary, dir.path(), bytes, &flags, &environment);
        let driver = Driver::attach(&daemon.socket, geometry);
        until("it lets others fetch", || TcpStream::connect(exports).ok());
        Self { dir, daemon, driver, exports }
    }

    /// A conversation with its record, all of it known to the daemon.
    pub fn hold(&mut self, number: u32, tokens: u32) -> Held {
        self.hold_tokens(&format!("conversation {number}"), conversation(number, tokens))
    }

    pub fn hold_tokens(&mut self, name: &str, tokens: Vec<u32>) -> Held {
        let id = self.driver.save_turn(name, &tokens).expect("attached");
        let blocks = tokens.len().div_ceil(usize::from(geometry().tokens_per_block()));
        Held { id, tokens, blocks }
    }

    /// Ended and started again, over the same disk, with other frames.
    pub fn reopened(self, frames: u64) -> Self {
        let Self { dir, daemon, driver, exports } = self;
        drop(driver);
        assert_eq!(daemon.stop(), Some(0));
        let daemon = Daemon::start(Path::new(BINARY), dir.path(), region_bytes(frames), &[]);
        let driver = Driver::attach(&daemon.socket, geometry());
        until("the index is read", || {
            (daemon.status().pointer("/disk/state")? == "ready").then_some(())
        });
        Self { dir, daemon, driver, exports }
    }

    pub fn import(&self, id: ConversationId, from: SocketAddr) -> Result<Value, String> {
        import(&self.daemon, id, &from.to_string())
    }

    /// Fails at the first wrong byte; how many tokens were there.
    pub fn check(&mut self, held: &Held) -> usize {
        self.driver.load(&held.tokens).expect("attached").tokens
    }
}

/// What a replica holds.
pub struct Held {
    pub id: ConversationId,
    pub tokens: Vec<u32>,
    pub blocks: usize,
}

/// The record, as a runtime asks for it.
pub fn ask(driver: &mut Driver, id: ConversationId) -> Option<Vec<u8>> {
    let asked = driver.client.get_conversation(id).expect("attached");
    loop {
        match driver.next_event().expect("attached") {
            CacheEvent::Conversation { question, record } if question == asked => return record,
            _ => {}
        }
    }
}

/// How a transfer ended.
pub fn transfer(daemon: &Daemon, path: &str, body: &Value) -> Result<Value, String> {
    let last = match daemon.admin("POST", path, body).1 {
        // A line a second, if it took so long.
        Value::String(lines) => {
            let last = lines.lines().last().expect("an answer");
            serde_json::from_str(last).unwrap_or_else(|_| panic!("{lines}"))
        }
        line => line,
    };
    match last.get("error") {
        Some(error) => Err(error.as_str().expect("a sentence").to_owned()),
        None => Ok(last),
    }
}

pub fn import(daemon: &Daemon, id: ConversationId, from: &str) -> Result<Value, String> {
    transfer(daemon, "/imports", &json!({ "id": id.hex(), "from": from }))
}

/// A number of a report.
pub fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {report}"))
}

//! A real runtime beside a real daemon, asked over HTTP.
#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "../../../cache-daemon/tests/support/mod.rs"]
pub mod daemon;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use daemon::{kill, until};

/// Tokens in a block of the runtimes started here.
pub const TOKENS_PER_BLOCK: usize = 16;

/// A real binary, beside the test's own in the target folder.
pub fn beside_us(name: &str, variable: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let test = std::env::current_exe().expect("our own path");
    let binary = test.parent().and_then(Path::parent).expect("target/ci/deps").join(name);
    assert!(binary.exists(), "{} is missing: cargo build --profile ci -p {name}", binary.display());
    binary
}

/// A running `runtime`; killed when dropped.
pub struct Runtime {
    child: Child,
    address: SocketAddr,
    agent: ureq::Agent,
}

/// What the tests look at in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub text: String,
    pub cached_tokens: u64,
}

impl Runtime {
    /// Starts one, and waits until it is ready. Without a socket it has no cache beyond the device.
    pub fn start(model: &Path, cache_socket: Option<&Path>, flags: &[&str]) -> Self {
        let address = {
            // Free now; taken by nobody else on a loopback address, as far as tests go.
            let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
            probe.local_addr().expect("its address")
        };
        let mut command = Command::new(beside_us("runtime", "COLLOQUY_RUNTIME"));
        command.arg("--model").arg(model).arg(format!("--http={address}"));
        command.arg(format!("--tokens-per-block={TOKENS_PER_BLOCK}"));
        command.args(["--served-name=test", "--threads=1", "--admin", "--log=error"]).args(flags);
        if let Some(socket) = cache_socket {
            command.arg("--cache-socket").arg(socket);
        }
        let child = command.stdin(Stdio::null()).spawn().expect("the runtime starts");
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut runtime = Self { child, address, agent };
        until("the runtime is ready", || {
            let ended = runtime.child.try_wait().expect("our own child");
            assert!(ended.is_none(), "the runtime ended: {ended:?}");
            let health = runtime.agent.get(format!("http://{address}/health")).call().ok()?;
            (health.status() == 200).then_some(())
        });
        runtime
    }

    /// A client of it, for a thread of its own.
    pub fn client(&self) -> Client {
        Client { base: format!("http://{}", self.address), agent: self.agent.clone() }
    }

    /// SIGTERM; fails unless it ends well.
    pub fn stop(mut self) {
        kill(self.child.id() as i32, rustix::process::Signal::TERM);
        let status = self.child.wait().expect("our own child");
        assert!(status.success(), "the runtime ended with {status}");
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = self.child.kill(); // Ended already, normally.
        let _ = self.child.wait();
    }
}

/// Asks a runtime. A request that fails, fails the test.
pub struct Client {
    base: String,
    agent: ureq::Agent,
}

impl Client {
    fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.base);
        let mut answer = self.agent.post(url).send(body.to_string()).expect("the runtime answers");
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().expect("text");
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Text of a page.
    pub fn get(&self, path: &str) -> String {
        let url = format!("{}{path}", self.base);
        let mut answer = self.agent.get(url).call().expect("the runtime answers");
        answer.body_mut().read_to_string().expect("text")
    }

    /// A greedy answer of six tokens. A fresh salt finds nothing in any tier.
    pub fn ask(&self, prompt: &[u32], salt: &str) -> Answer {
        let reply = self.post(
            "/v1/chat/completions",
            &json!({
                "prompt_token_ids": prompt, "max_tokens": 6, "temperature": 0,
                "ignore_eos": true, "cache_salt": salt,
            }),
        );
        let text = reply.pointer("/choices/0/message/content").and_then(Value::as_str);
        let cached = reply.pointer("/usage/prompt_tokens_details/cached_tokens");
        Answer {
            text: text.unwrap_or_else(|| panic!("no answer in {reply}")).to_owned(),
            cached_tokens: cached.and_then(Value::as_u64).unwrap_or(0),
        }
    }

    /// The next turns load their history from frames.
    pub fn clear_device(&self) {
        self.post("/admin/device-cache/clear", &json!({}));
    }
}

/// Token ids of a conversation, all of them known to the tiny model.
pub fn prompt(conversation: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|position| 3 + (position * 7 + conversation * 31) % 200).collect()
}

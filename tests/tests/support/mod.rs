//! A real runtime beside a real daemon, asked over HTTP.
#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "../../../cache-daemon/tests/support/mod.rs"]
pub mod daemon;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kv_protocol::geometry::LayerSet;
use kv_protocol::{BlockHeader, Dtype, Geometry, layout};
use runtime::weights::gguf::Model;
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
    pub by_tier: ByTier,
    /// As the API gives it.
    pub usage: Value,
}

/// Cached tokens of a prompt by the tier that had them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByTier {
    pub device: u64,
    pub host: u64,
    pub disk: u64,
}

impl Answer {
    fn read(reply: &Value) -> Self {
        let text = reply.pointer("/choices/0/message/content").and_then(Value::as_str);
        let details = &reply["usage"]["prompt_tokens_details"];
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let tier = |name: &str| number(&details["cached_tokens_by_tier"][name]);
        Self {
            text: text.unwrap_or_else(|| panic!("no answer in {reply}")).to_owned(),
            cached_tokens: number(&details["cached_tokens"]),
            by_tier: ByTier { device: tier("device"), host: tier("host"), disk: tier("disk") },
            usage: reply["usage"].clone(),
        }
    }
}

/// Bytes of a region with so many frames of a model's blocks.
pub fn region_bytes(model: &Path, frames: u64) -> u64 {
    let model = Model::open(model).expect("a model");
    let shape = model.config();
    let tokens = TOKENS_PER_BLOCK.try_into().expect("a small number");
    let number = |of: usize| of.try_into().expect("a small model");
    let (layers, heads) = (number(shape.layers), number(shape.kv_heads));
    let dim = shape.head_dim.try_into().expect("a small model");
    let layer_set = LayerSet::all(layers);
    let geometry = Geometry::new(tokens, layers, heads, dim, Dtype::F16, layer_set);
    let geometry = geometry.expect("the model's geometry");
    let frame =
        layout::FRAME_ENTRY_BYTES + BlockHeader::bytes(&geometry) as u64 + geometry.frame_bytes();
    layout::FRAME_TABLE_AT + layout::PAGE_BYTES + frames * frame
}

impl Runtime {
    /// Starts one, and waits until it is ready. Without a socket it has no cache beyond the device.
    pub fn start(model: &Path, cache_socket: Option<&Path>, flags: &[&str]) -> Self {
        let address = daemon::free_address();
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
    fn send(&self, path: &str, conversation: Option<&str>, body: &Value) -> (u16, Value) {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some(name) = conversation {
            request = request.header("X-Conversation-Id", name);
        }
        let mut answer = request.send(body.to_string()).expect("the runtime answers");
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().expect("text");
        (status, serde_json::from_str(&text).unwrap_or_default())
    }

    fn post(&self, path: &str, conversation: Option<&str>, body: &Value) -> Value {
        let (status, answer) = self.send(path, conversation, body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Text of a page.
    pub fn get(&self, path: &str) -> String {
        let url = format!("{}{path}", self.base);
        let mut answer = self.agent.get(url).call().expect("the runtime answers");
        answer.body_mut().read_to_string().expect("text")
    }

    /// A greedy answer of six tokens. A fresh salt finds nothing in any tier.
    pub fn ask(&self, prompt: &[u32], salt: &str) -> Answer {
        let body = json!({
            "prompt_token_ids": prompt, "max_tokens": 6, "temperature": 0,
            "ignore_eos": true, "cache_salt": salt,
        });
        Answer::read(&self.post("/v1/chat/completions", None, &body))
    }

    /// A chat that must succeed.
    pub fn chat(&self, body: &Value) -> Value {
        self.post("/v1/chat/completions", None, body)
    }

    /// A greedy answer of six tokens in a named conversation.
    pub fn turn(&self, conversation: &str, messages: &[Value]) -> Answer {
        let body = json!({
            "messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": true,
        });
        Answer::read(&self.post("/v1/chat/completions", Some(conversation), &body))
    }

    /// Status and answer of a chat.
    pub fn try_chat(&self, body: &Value) -> (u16, Value) {
        self.send("/v1/chat/completions", None, body)
    }

    /// A counter, summed over its labels.
    pub fn metric(&self, name: &str) -> u64 {
        let url = format!("{}/metrics", self.base);
        let mut answer = self.agent.get(url).call().expect("the runtime answers");
        let text = answer.body_mut().read_to_string().expect("text");
        let lines = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        lines.filter_map(value).map(|value| value as u64).sum()
    }

    /// Says that a conversation's user types: status and body of the answer.
    pub fn anticipate(&self, conversation: &str, body: &Value) -> (u16, Value) {
        self.send(&format!("/v1/conversations/{conversation}/anticipate"), None, body)
    }

    /// Where the runtime is.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// The next turns load their history from frames.
    pub fn clear_device(&self) {
        self.post("/admin/device-cache/clear", None, &json!({}));
    }
}

/// Token ids of a conversation, all of them known to the tiny model.
pub fn prompt(conversation: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|position| 3 + (position * 7 + conversation * 31) % 200).collect()
}

/// Waits until the daemon has the record of a turn whose prompt had so many tokens: a reply does not wait for it.
pub fn until_recorded(daemon: &daemon::Daemon, conversation: &str, prompt_tokens: u64) {
    daemon::until("the turn is recorded", || {
        let (_, told) =
            daemon.admin("GET", &format!("/conversations/{conversation}"), &Value::Null);
        let tokens = told.pointer("/conversation/tokens")?.as_u64()?;
        (tokens >= prompt_tokens).then_some(())
    });
}

/// Waits until the runtime has its cache: it serves without one as well.
pub fn until_attached(client: &Client) {
    daemon::until("the runtime is attached", || {
        (client.metric("colloquy_runtime_cache_attached") == 1).then_some(())
    });
}

/// What `kvctl --json` says.
pub fn kvctl(daemon: &daemon::Daemon, arguments: &[&str]) -> Value {
    let output = kvctl_output(daemon, arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kvctl {arguments:?}: {told}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Why `kvctl` does not do it.
pub fn kvctl_refuses(daemon: &daemon::Daemon, arguments: &[&str]) -> String {
    let output = kvctl_output(daemon, arguments);
    assert!(!output.status.success(), "kvctl {arguments:?} did it");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn kvctl_output(daemon: &daemon::Daemon, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(beside_us("kvctl", "COLLOQUY_KVCTL"));
    command.arg("--json").arg("--socket").arg(daemon.admin_socket()).args(arguments);
    command.output().expect("kvctl starts")
}

//! A real runtime process to talk to, on loopback, ended with the test.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use runtime::weights::random::write_tiny_gguf;
use serde_json::{Value, json};
use tempfile::TempDir;

/// SmolLM2's file, or `None` where there is none. On CI its absence is a failure: these tests are the
/// proof that our numbers are right.
pub fn smollm2() -> Option<PathBuf> {
    let cache = || {
        let home = std::env::var_os("HOME").map_or_else(PathBuf::new, PathBuf::from);
        std::env::var_os("COLLOQUY_CACHE")
            .map_or_else(|| home.join(".cache/colloquy"), PathBuf::from)
            .join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = std::env::var_os("COLLOQUY_MODEL").map_or_else(cache, PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "no model at {}: run `make weights`",
        path.display()
    );
    eprintln!("skipped: no model at {} (`make weights` fetches it)", path.display());
    None
}

/// A folder with the tiny random model in it.
pub fn tiny_model() -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    write_tiny_gguf(&path, 7).expect("the tiny model");
    (folder, path)
}

/// The program, not started, and deaf to the settings of whoever runs the tests.
pub fn program(model: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_runtime"));
    let settings = std::env::vars_os().map(|(key, _)| key);
    for key in settings.filter(|key| key.to_string_lossy().starts_with("COLLOQUY_")) {
        command.env_remove(key);
    }
    command.env_remove("RUST_BACKTRACE"); // What is printed for users is what is tested.
    command.arg("--model").arg(model);
    command
}

/// A runtime that is ready.
pub struct Runtime {
    child: Child,
    address: String,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    agent: ureq::Agent,
}

/// Status and body of an answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: bool,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The body of a 200.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }
}

impl Runtime {
    /// Starts the program on a free port and reads its log until it is ready.
    pub fn start(model: &Path, flags: &[&str]) -> Self {
        let mut child = program(model)
            .args(["--http", "127.0.0.1:0", "--log-format", "json", "--threads", "2"])
            .args(["--served-name", "test-model", "--device-bytes", "64Mi"])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut address = None;
        loop {
            // The end of the log is the end of the process.
            let Some(Ok(line)) = lines.next() else {
                panic!("the runtime ended: {:?} {:?}", child.wait(), log.lock().unwrap());
            };
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            log.lock().unwrap().push(line);
            if let Some(listening) = event["fields"]["address"].as_str() {
                address = Some(listening.to_owned());
            }
            if event["fields"]["message"] == "ready" {
                break;
            }
        }
        // The log is drained to the end, or the process would block on a full pipe.
        let reader = std::thread::spawn({
            let log = log.clone();
            move || lines.map_while(Result::ok).for_each(|line| log.lock().unwrap().push(line))
        });
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        Self {
            child,
            address: address.expect("the log names the address"),
            log,
            reader: Some(reader),
            agent,
        }
    }

    /// With the tiny model; the folder may go as soon as the file is mapped.
    pub fn tiny(flags: &[&str]) -> Self {
        let (_folder, path) = tiny_model();
        Self::start(&path, flags)
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub fn get(&self, path: &str) -> Answer {
        answer(self.agent.get(format!("http://{}{path}", self.address)).call())
    }

    pub fn post_bytes(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = self.agent.post(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        answer(request.send(body))
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, &[], body.to_string().as_bytes())
    }

    /// A chat that must succeed.
    pub fn chat(&self, body: &Value) -> Value {
        self.post("/v1/chat/completions", body).ok()
    }

    /// A chat in a named conversation.
    pub fn turn(&self, conversation: &str, body: &Value) -> Value {
        let headers = [("X-Conversation-Id", conversation)];
        self.post_bytes("/v1/chat/completions", &headers, body.to_string().as_bytes()).ok()
    }

    /// The events of a stream, parsed, without the closing `[DONE]`.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let mut events: Vec<&str> =
            answer.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).expect(event)).collect()
    }

    /// The value of one metric line, 0 when it is not there yet.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = self.get("/metrics").text;
        let start = format!("colloquy_runtime_{name}{{");
        text.lines()
            .find(|line| line.starts_with(&start) && line.contains(labels))
            .map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    }

    /// Waits for the end.
    pub fn wait(mut self) -> ExitStatus {
        let status = self.child.wait().expect("a child can be waited for");
        self.reader.take().expect("waited once").join().expect("the log's reader");
        status
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Already ended children answer with an error that says nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = result.expect("an answer");
    Answer {
        status: response.status().as_u16(),
        retry_after: response.headers().contains_key("retry-after"),
        text: response.body_mut().read_to_string().expect("text"),
    }
}

/// A chat request of one user message.
pub fn ask(text: &str, settings: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": text }] });
    let Value::Object(settings) = settings else { panic!("settings are an object") };
    body.as_object_mut().unwrap().extend(settings);
    body
}

/// The reply's text.
pub fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("text")
}

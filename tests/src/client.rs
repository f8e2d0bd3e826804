//! A client of the OpenAI API as a conversation needs it: streamed answers, the time of the first
//! token, and how much of the prompt came from which tier of the cache.

use std::io::{BufRead, BufReader, Read as _};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

/// An answer that takes longer than this is a hang, even on a machine that also compiles.
const ANSWER_DURATION_MAX: Duration = Duration::from_mins(5);

/// Longest line of a stream that is read; a chunk carries a few tokens.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server answered, and the answer was no.
    #[error("{url} answered {status}: {body}")]
    Refused {
        /// What was asked.
        url: String,
        /// HTTP status.
        status: u16,
        /// The body, an OpenAI-style error object.
        body: String,
    },
    /// No connection, or one that broke.
    #[error("{url} does not answer: {source}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What the transport says.
        source: Box<ureq::Error>,
    },
    /// The stream ended early or carried what no client can read.
    #[error("the answer of {url} is broken: {problem}")]
    Broken {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
}

impl Message {
    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user", content: content.into() }
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant", content: content.into() }
    }
}

/// What is asked in one request. Always at temperature 0: equal questions have equal answers.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The conversation so far, ending with what the person says now.
    pub messages: &'a [Message],
    /// Name of the conversation (`X-Conversation-Id`).
    pub conversation: &'a str,
    /// With a salt that nobody used before nothing is found in any tier: the cold run.
    pub salt: Option<&'a str>,
    /// Longest answer, in tokens.
    pub tokens_max: u32,
}

/// Tokens of a prompt whose KV was found, by the tier it came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CachedByTier {
    /// Still in the engine's own memory.
    pub device: u32,
    /// In the memory shared with the cache daemon.
    pub host: u32,
    /// On the cache volume.
    pub disk: u32,
}

/// An answer, and what it cost.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Tokens of the prompt that were not computed again.
    pub cached_tokens: u32,
    /// The same, by tier.
    pub cached_by_tier: CachedByTier,
    /// From sending the question to the first piece of text.
    pub first_token_after: Duration,
    /// From sending the question to the end of the answer.
    pub whole_after: Duration,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Delta,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    #[serde(default)]
    prompt_tokens_details: Details,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: u32,
    cached_tokens_by_tier: CachedByTier,
}

/// Speaks to one server.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    model: String,
    agent: ureq::Agent,
}

impl Client {
    /// A client for the model `model` of the server at `base`, such as `http://127.0.0.1:8000`.
    pub fn new(base: impl Into<String>, model: impl Into<String>) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER_DURATION_MAX))
            .http_status_as_error(false)
            .proxy(None) // The server is on this machine, whatever the environment says.
            .build();
        Self { base: base.into(), model: model.into(), agent: config.into() }
    }

    /// Where the server is.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The model that is asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// True when the server says that it can serve.
    pub fn is_healthy(&self) -> bool {
        self.agent
            .get(format!("{}/health", self.base))
            .call()
            .is_ok_and(|response| response.status().is_success())
    }

    /// The body of a page, such as `/metrics`.
    pub fn page(&self, path: &str) -> Result<String, ClientError> {
        let url = format!("{}{path}", self.base);
        let response = self.agent.get(&url).call();
        let mut response = accepted(&url, response)?;
        response.body_mut().read_to_string().map_err(|source| unreachable_at(&url, source))
    }

    /// Asks, and reads the streamed answer to its end.
    pub fn ask(&self, question: &Question<'_>) -> Result<Answer, ClientError> {
        let url = format!("{}/v1/chat/completions", self.base);
        let mut body = json!({
            "model": self.model,
            "messages": question.messages,
            "max_completion_tokens": question.tokens_max,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(salt) = question.salt {
            body["cache_salt"] = json!(salt);
        }
        let asked = Instant::now();
        let response = self
            .agent
            .post(&url)
            .header("X-Conversation-Id", question.conversation)
            .send_json(&body);
        let mut response = accepted(&url, response)?;
        let mut lines = BufReader::new(response.body_mut().as_reader());
        read_answer(&mut lines, asked).map_err(|problem| ClientError::Broken { url, problem })
    }
}

/// Passes an accepted response on and turns any other into an error with the server's own words.
fn accepted(
    url: &str,
    response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<ureq::http::Response<ureq::Body>, ClientError> {
    let mut response = response.map_err(|source| unreachable_at(url, source))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    let body = response.body_mut().read_to_string().unwrap_or_default();
    Err(ClientError::Refused { url: url.to_owned(), status, body })
}

fn unreachable_at(url: &str, source: ureq::Error) -> ClientError {
    ClientError::Unreachable { url: url.to_owned(), source: Box::new(source) }
}

/// Reads server-sent events up to `[DONE]`. The error is a sentence for `ClientError::Broken`.
fn read_answer(lines: &mut impl BufRead, asked: Instant) -> Result<Answer, String> {
    let mut text = String::new();
    let mut usage = None;
    let mut first_token_after = None;
    loop {
        let mut line = String::new();
        let read = lines.by_ref().take(LINE_BYTES_MAX as u64).read_line(&mut line);
        if read.map_err(|error| error.to_string())? == 0 {
            return Err(format!("the stream ended without [DONE], after {text:?}"));
        }
        let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            break;
        }
        let chunk: Chunk =
            serde_json::from_str(data).map_err(|error| format!("{error} in the chunk {data}"))?;
        if let Some(error) = chunk.error {
            return Err(format!("the server gave up: {error}"));
        }
        for content in chunk.choices.into_iter().filter_map(|choice| choice.delta.content) {
            if !content.is_empty() {
                first_token_after.get_or_insert_with(|| asked.elapsed());
                text.push_str(&content);
            }
        }
        usage = chunk.usage.or(usage);
    }
    let usage = usage.ok_or("the stream has no usage")?;
    Ok(Answer {
        text,
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.prompt_tokens_details.cached_tokens,
        cached_by_tier: usage.prompt_tokens_details.cached_tokens_by_tier,
        first_token_after: first_token_after.ok_or("the answer has no text")?,
        whole_after: asked.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &str) -> Result<Answer, String> {
        read_answer(&mut stream.as_bytes(), Instant::now())
    }

    #[test]
    fn an_answer_is_put_together_from_its_chunks() {
        let answer = read(concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"Hel\"}}]}\n\n",
            ": a comment\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"lo\"}}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,",
            "\"prompt_tokens_details\":{\"cached_tokens\":8,\"cached_tokens_by_tier\":{\"disk\":8}}}}\n\n",
            "data: [DONE]\n\n",
        ))
        .unwrap();
        assert_eq!(answer.text, "Hello");
        assert_eq!((answer.prompt_tokens, answer.cached_tokens), (9, 8));
        assert_eq!(answer.cached_by_tier, CachedByTier { device: 0, host: 0, disk: 8 });
    }

    #[test]
    fn a_stream_that_breaks_off_is_no_answer() {
        let problem =
            read("data: {\"choices\":[{\"delta\":{\"content\":\"Hel\"}}]}\n\n").unwrap_err();
        assert!(problem.contains("without [DONE]"), "{problem}");
    }

    #[test]
    fn an_error_inside_the_stream_is_no_answer() {
        let problem = read("data: {\"error\":{\"message\":\"lost\"}}\n\n").unwrap_err();
        assert!(problem.contains("lost"), "{problem}");
    }
}

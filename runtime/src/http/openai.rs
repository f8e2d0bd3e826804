//! The OpenAI API's words: what requests mean, and how answers look. No generation happens here.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::reply::TokenReport;
use super::unix_seconds;
use crate::account::Account;
use crate::batch::TokenLogprob;
use crate::request::{CacheUse, FinishReason, Keep, SamplingParams};
use crate::text::template::TemplateMessage;
use crate::text::tokenizer::Tokenizer;

/// Stop strings a request may name, and their length: each token is matched against all of them.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
/// As in the OpenAI API.
const TOP_LOGPROBS_MAX: u8 = 20;
/// As in the OpenAI API's completions.
const COMPLETION_LOGPROBS_MAX: u8 = 5;
/// Messages of one request; the context bounds their text.
const MESSAGES_MAX: usize = 4096;
/// Longest time to live that a request may ask for: a year.
const TTL_SECONDS_MAX: u64 = 365 * 24 * 3600;
/// Longest pin: thirty days. Pinned blocks are nobody else's room, so that no request may ask for ever.
const PIN_SECONDS_MAX: u64 = 30 * 24 * 3600;
/// Bytes of a cache salt or a conversation's name.
pub(super) const NAME_BYTES_MAX: usize = 256;

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Messages, for the chat template.
    Messages(Vec<TemplateMessage>),
    /// Text as it is; control tokens in it are parsed, as the caller wrote all of it.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// A request for a reply, checked.
#[derive(Debug, Clone)]
pub struct ReplyRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// The asked model.
    pub model: Option<String>,
    /// `None`: as many as fit.
    pub tokens_max: Option<u32>,
    /// Seed is drawn where none was given.
    pub sampling: SamplingParams,
    /// Strings that end the reply.
    pub stops: Vec<String>,
    /// Answer in events.
    pub stream: bool,
    /// A stream's last chunk holds the usage.
    pub include_usage: bool,
    /// What the cache may do.
    pub cache: CacheUse,
    /// Separates KV: two salts never share any.
    pub cache_salt: String,
    /// The conversation's name in the body (`prompt_cache_key`).
    pub conversation: Option<String>,
    /// A history that does not fit loses its earliest half, instead of an error (OpenAI's `truncation`).
    pub truncates: bool,
}

/// The two kinds of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl ReplyRequest {
    /// Reads a body of either API.
    pub fn parse(api: Api, body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let prompt_token_ids: Option<Vec<u32>> = fields.take("prompt_token_ids")?;
        let (prompt, name) = match api {
            Api::Chat => (take_messages(&mut fields)?.map(Prompt::Messages), "messages"),
            Api::Completions => (take_prompt(&mut fields)?, "prompt"),
        };
        let prompt = match (prompt, prompt_token_ids) {
            (Some(prompt), None) => prompt,
            (None, Some(tokens)) => Prompt::Tokens(tokens),
            (None, None) => return Err(ApiError::field(name, "this field is required")),
            (Some(_), Some(_)) => {
                return Err(ApiError::field(
                    "prompt_token_ids",
                    format_args!("give either `{name}` or token ids, not both"),
                ));
            }
        };
        let request = Self {
            prompt,
            model: fields.take("model")?,
            tokens_max: take_tokens_max(&mut fields)?,
            sampling: take_sampling(api, &mut fields)?,
            stops: take_stops(&mut fields)?,
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: take_stream_options(&mut fields)?,
            cache: take_cache(&mut fields)?,
            cache_salt: take_name(&mut fields, "cache_salt")?.unwrap_or_default(),
            conversation: take_name(&mut fields, "prompt_cache_key")?,
            truncates: take_truncation(api, &mut fields)?,
        };
        refuse_the_rest(api, &mut fields)?;
        fields.finish()?;
        if request.include_usage && !request.stream {
            return Err(ApiError::field("stream_options", "only with `stream`: true"));
        }
        Ok(request)
    }
}

fn take_truncation(api: Api, fields: &mut Fields) -> Result<bool, ApiError> {
    match (fields.take::<String>("truncation")?.as_deref(), api) {
        (None | Some("disabled"), _) => Ok(false),
        (Some("auto"), Api::Chat) => Ok(true),
        (Some("auto"), Api::Completions) => {
            Err(ApiError::unsupported("truncation", "only the history of a chat is truncated"))
        }
        (Some(other), _) => {
            let told = format_args!("`{other}` is neither `auto` nor `disabled`");
            Err(ApiError::field("truncation", told))
        }
    }
}

fn take_cache(fields: &mut Fields) -> Result<CacheUse, ApiError> {
    let Some(value) = fields.take::<Value>("cache")? else { return Ok(CacheUse::default()) };
    let mut fields = Fields::of_value("cache", value)?;
    let now = unix_seconds();
    let ttl = fields.number::<u64>("ttl_seconds", 1, TTL_SECONDS_MAX)?;
    let pin_until = take_time(&mut fields, "pin_until")?;
    if let Some(until) =
        pin_until.filter(|until| !(now + 1..=now + PIN_SECONDS_MAX).contains(until))
    {
        return Err(ApiError::field(
            "cache.pin_until",
            format_args!(
                "{until} is {}; a pin ends at most {PIN_SECONDS_MAX} seconds from now, which is {now}",
                if until <= now { "not in the future" } else { "too far ahead" },
            ),
        ));
    }
    let keep = Keep {
        ttl_ms: ttl.map(|seconds| 1000 * seconds),
        pinned_until_ms: pin_until.map(|seconds| 1000 * seconds),
    };
    let cache = CacheUse {
        no_read: fields.take("no_read")?.unwrap_or(false),
        no_store: fields.take("no_store")?.unwrap_or(false),
        keep,
    };
    fields.finish()?;
    if cache.no_store && keep != Keep::default() {
        return Err(ApiError::field(
            "cache.no_store",
            "contradicts `ttl_seconds` and `pin_until`: what is not stored cannot be kept",
        ));
    }
    Ok(cache)
}

/// A point in time, as Unix seconds or in RFC 3339; in Unix seconds.
fn take_time(fields: &mut Fields, field: &str) -> Result<Option<u64>, ApiError> {
    let bad = |fields: &Fields| {
        ApiError::field(
            &fields.name(field),
            "Unix seconds or a time as in 2026-12-24T18:00:00Z (RFC 3339) is expected",
        )
    };
    match fields.take::<Value>(field)? {
        None => Ok(None),
        Some(Value::Number(number)) => number.as_u64().map(Some).ok_or_else(|| bad(fields)),
        Some(Value::String(text)) => {
            let time: jiff::Timestamp = text.parse().map_err(|_| bad(fields))?;
            u64::try_from(time.as_second()).map(Some).map_err(|_| bad(fields))
        }
        Some(_) => Err(bad(fields)),
    }
}

fn take_messages(fields: &mut Fields) -> Result<Option<Vec<TemplateMessage>>, ApiError> {
    let Some(values) = fields.take::<Vec<Value>>("messages")? else { return Ok(None) };
    if values.is_empty() || values.len() > MESSAGES_MAX {
        return Err(ApiError::field(
            "messages",
            format_args!("{} messages; from 1 to {MESSAGES_MAX} are served", values.len()),
        ));
    }
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| parse_message(&format!("messages[{index}]"), value))
        .collect::<Result<_, _>>()
        .map(Some)
}

/// A message as `/v1/chat/completions` and `/tokenize` take it.
pub fn parse_message(place: &str, value: Value) -> Result<TemplateMessage, ApiError> {
    let mut fields = Fields::of_value(place, value)?;
    let role_name = fields.name("role");
    let role = match fields.take::<String>("role")?.as_deref() {
        // OpenAI's newer word for the same voice; templates know only `system`.
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            return Err(ApiError::unsupported(&role_name, "this server does not serve tools"));
        }
        Some(other) => {
            return Err(ApiError::field(
                &role_name,
                format_args!("`{other}` is none of system, developer, user, assistant"),
            ));
        }
        None => return Err(ApiError::field(&role_name, "this field is required")),
    };
    let content_name = fields.name("content");
    let content = match fields.take::<Value>("content")? {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .into_iter()
            .enumerate()
            .map(|(index, part)| parse_text_part(&format!("{content_name}[{index}]"), part))
            .collect::<Result<_, _>>()?,
        Some(_) => {
            return Err(ApiError::field(
                &content_name,
                "a string or an array of text parts is expected",
            ));
        }
        None => return Err(ApiError::field(&content_name, "this field is required")),
    };
    let name = fields.take::<String>("name")?;
    // What clients send back with a reply they got: empty, or without a meaning for the model.
    for field in
        ["refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning_content"]
    {
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        fields.refuse(field, empty, "this server serves text only")?;
    }
    fields.finish()?;
    Ok(TemplateMessage { role: role.to_owned(), content, name })
}

fn parse_text_part(place: &str, part: Value) -> Result<String, ApiError> {
    let mut fields = Fields::of_value(place, part)?;
    let kind_name = fields.name("type");
    match fields.take::<String>("type")?.as_deref() {
        Some("text") => {}
        Some(other) => {
            return Err(ApiError::unsupported(
                &kind_name,
                format_args!("`{other}` parts are not served, only `text`"),
            ));
        }
        None => return Err(ApiError::field(&kind_name, "this field is required")),
    }
    let text_name = fields.name("text");
    let text = fields.take::<String>("text")?;
    fields.finish()?;
    text.ok_or_else(|| ApiError::field(&text_name, "this field is required"))
}

fn take_prompt(fields: &mut Fields) -> Result<Option<Prompt>, ApiError> {
    match fields.take::<Value>("prompt")? {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(Prompt::Text(text))),
        Some(value @ Value::Array(_)) => match serde_json::from_value(value) {
            Ok(tokens) => Ok(Some(Prompt::Tokens(tokens))),
            Err(_) => Err(ApiError::unsupported(
                "prompt",
                "a string or an array of token ids is expected; several prompts in one request are \
                 not served",
            )),
        },
        Some(_) => Err(ApiError::field("prompt", "a string or an array of token ids is expected")),
    }
}

fn take_tokens_max(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.number::<u32>("max_tokens", 1, u32::MAX)?;
    let new = fields.number::<u32>("max_completion_tokens", 1, u32::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::field(
            "max_tokens",
            format_args!("{old} contradicts `max_completion_tokens`, which is {new}"),
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn take_sampling(api: Api, fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let logprobs = match api {
        Api::Chat => {
            let wanted = fields.take::<bool>("logprobs")?.unwrap_or(false);
            let top = fields.number::<u8>("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
            match (wanted, top) {
                (false, Some(1..)) => {
                    return Err(ApiError::field("top_logprobs", "only with `logprobs`: true"));
                }
                (false, _) => None,
                (true, top) => Some(top.unwrap_or(0)),
            }
        }
        Api::Completions => fields.number::<u8>("logprobs", 0, COMPLETION_LOGPROBS_MAX)?,
    };
    let top_p = fields.number::<f32>("top_p", 0.0, 1.0)?.unwrap_or(1.0);
    if top_p <= 0.0 {
        return Err(ApiError::field("top_p", "it must be above 0, or no token could be drawn"));
    }
    let seed = fields.take::<i64>("seed")?;
    Ok(SamplingParams {
        temperature: fields.number::<f32>("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_p,
        // -1 is vLLM's word for "off".
        top_k: fields.number::<i64>("top_k", -1, i64::from(u32::MAX))?.unwrap_or(0).max(0) as u32,
        min_p: fields.number::<f32>("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        seed: seed.map_or_else(random_seed, i64::cast_unsigned),
        logprobs,
        ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
    })
}

fn random_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

fn take_stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops: Vec<String> = match fields.take::<Value>("stop")? {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(value) => serde_json::from_value(value)
            .map_err(|_| ApiError::field("stop", "a string or an array of strings is expected"))?,
    };
    if stops.len() > STOPS_MAX {
        return Err(ApiError::field(
            "stop",
            format_args!("{} strings; at most {STOPS_MAX} are served", stops.len()),
        ));
    }
    if let Some(stop) = stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        return Err(ApiError::field(
            "stop",
            format_args!("a string of {} bytes; from 1 to {STOP_BYTES_MAX} are served", stop.len()),
        ));
    }
    Ok(stops)
}

fn take_stream_options(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(options) = fields.take::<Value>("stream_options")? else { return Ok(false) };
    let mut options = Fields::of_value("stream_options", options)?;
    let include_usage = options.take("include_usage")?.unwrap_or(false);
    options.ignore("include_obfuscation");
    options.finish()?;
    Ok(include_usage)
}

/// A cache salt or a conversation's name.
pub(super) fn take_name(fields: &mut Fields, field: &str) -> Result<Option<String>, ApiError> {
    let name = fields.take::<String>(field)?;
    match name {
        Some(name) if name.len() > NAME_BYTES_MAX => Err(ApiError::field(
            field,
            format_args!("{} bytes; at most {NAME_BYTES_MAX} are served", name.len()),
        )),
        name => Ok(name),
    }
}

/// Fields of the OpenAI API that are known and not served, unless they say nothing; and those that
/// change nothing here.
fn refuse_the_rest(api: Api, fields: &mut Fields) -> Result<(), ApiError> {
    let zero = |value: &Value| value.as_f64() == Some(0.0);
    let one = |value: &Value| value.as_f64() == Some(1.0);
    let empty = |value: &Value| {
        value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    let is_false = |value: &Value| value.as_bool() == Some(false);
    let text_format = |value: &Value| value.get("type").and_then(Value::as_str) == Some("text");
    let only_text = |value: &Value| *value == json!(["text"]);
    let no_choice = |value: &Value| value.as_str() == Some("none");
    let never = |_: &Value| false;

    fields.refuse("n", one, "only one choice per request is served (`n`: 1)")?;
    fields.refuse("presence_penalty", zero, "penalties are not served; leave it out or 0")?;
    fields.refuse("frequency_penalty", zero, "penalties are not served; leave it out or 0")?;
    fields.refuse("repetition_penalty", one, "penalties are not served; leave it out or 1")?;
    fields.refuse("logit_bias", empty, "a bias on tokens is not served")?;
    match api {
        Api::Chat => {
            fields.refuse("tools", empty, "this server does not serve tools")?;
            fields.refuse("functions", empty, "this server does not serve tools")?;
            fields.refuse("tool_choice", no_choice, "this server does not serve tools")?;
            fields.refuse("function_call", no_choice, "this server does not serve tools")?;
            fields.ignore("parallel_tool_calls"); // Without tools it says nothing.
            fields.refuse("response_format", text_format, "only {\"type\": \"text\"} is served")?;
            fields.refuse("modalities", only_text, "only [\"text\"] is served")?;
            fields.refuse("audio", never, "this server serves text only")?;
            fields.refuse("prediction", never, "predicted outputs are not served")?;
            fields.refuse("reasoning_effort", no_choice, "this model does not reason")?;
            fields.refuse("web_search_options", never, "this server does not search")?;
            fields.refuse("store", is_false, "replies are not stored")?;
        }
        Api::Completions => {
            fields.refuse(
                "best_of",
                one,
                "only one choice per request is served (`best_of`: 1)",
            )?;
            fields.refuse("echo", is_false, "the prompt is not echoed")?;
            fields.refuse("suffix", never, "insertion is not served")?;
        }
    }
    // They name the caller or the bill, not the reply.
    for field in ["user", "safety_identifier", "metadata", "service_tier"] {
        fields.ignore(field);
    }
    Ok(())
}

/// Tokens of a request, as clients count them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the reply.
    pub reply: usize,
    /// Where the prompt's tokens came from.
    pub account: Account,
    /// Tokens that truncations have taken out of the history.
    pub dropped: usize,
}

impl Usage {
    fn json(self) -> Value {
        let cached = self.account.cached;
        let object = |tokens: &mut dyn Iterator<Item = (&'static str, u32)>| -> Map<String, Value> {
            tokens.map(|(label, tokens)| (label.to_owned(), tokens.into())).collect()
        };
        let by_tier = object(&mut cached.by_tier().into_iter());
        let missed = self.account.misses().map(|(reason, tokens)| (reason.label(), tokens));
        let missed = object(&mut { missed });
        let mut usage = json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.reply,
            "total_tokens": self.prompt + self.reply,
            "prompt_tokens_details": {
                "cached_tokens": cached.total(),
                "cached_tokens_by_tier": by_tier,
                "missed_tokens_by_reason": missed,
            },
        });
        if self.dropped > 0 {
            usage["prompt_tokens_details"]["dropped_tokens"] = self.dropped.into();
        }
        usage
    }
}

/// What all parts of one answer have in common.
#[derive(Debug, Clone)]
pub struct Answer {
    api: Api,
    id: String,
    created: u64,
    model: String,
    logprobs: Option<u8>,
    include_usage: bool,
}

impl Answer {
    /// An answer to `request`, begun now.
    pub fn new(api: Api, request: &ReplyRequest, model: &str) -> Self {
        let prefix = match api {
            Api::Chat => "chatcmpl",
            Api::Completions => "cmpl",
        };
        Self {
            api,
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: super::unix_seconds(),
            model: model.to_owned(),
            logprobs: request.sampling.logprobs,
            include_usage: request.include_usage,
        }
    }

    fn object(&self, object: &str, choices: &Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// The whole answer.
    pub fn whole(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        reports: &[TokenReport],
        reason: FinishReason,
        usage: Usage,
    ) -> Value {
        let logprobs = self.logprobs_json(tokenizer, reports, 0);
        let reason = reason_text(reason);
        let mut answer = match self.api {
            Api::Chat => self.object(
                "chat.completion",
                &json!([{
                    "index": 0,
                    "message": { "role": "assistant", "content": text, "refusal": null },
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }]),
            ),
            Api::Completions => self.object(
                "text_completion",
                &json!([{ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason }]),
            ),
        };
        answer["usage"] = usage.json();
        answer
    }

    /// A chunk of a stream; `first` says who speaks, `reason` ends it. `offset` is where its text begins.
    pub fn chunk(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        reports: &[TokenReport],
        offset: usize,
        place: Place,
    ) -> Value {
        let logprobs = self.logprobs_json(tokenizer, reports, offset);
        let reason = match place {
            Place::Last(reason) => Some(reason_text(reason)),
            Place::First | Place::Middle => None,
        };
        let mut chunk = match self.api {
            Api::Chat => {
                let delta = match place {
                    Place::First => json!({ "role": "assistant", "content": text }),
                    Place::Last(_) if text.is_empty() => json!({}),
                    Place::Middle | Place::Last(_) => json!({ "content": text }),
                };
                self.object(
                    "chat.completion.chunk",
                    &json!([{ "index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason }]),
                )
            }
            Api::Completions => self.object(
                "text_completion",
                &json!([{ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason }]),
            ),
        };
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The chunk behind the last one, where the client asked for it.
    pub fn usage_chunk(&self, usage: Usage) -> Option<Value> {
        let object = match self.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completions => "text_completion",
        };
        self.include_usage.then(|| {
            let mut chunk = self.object(object, &json!([]));
            chunk["usage"] = usage.json();
            chunk
        })
    }

    fn logprobs_json(
        &self,
        tokenizer: &Tokenizer,
        reports: &[TokenReport],
        offset: usize,
    ) -> Value {
        let Some(top) = self.logprobs.map(usize::from) else { return Value::Null };
        if reports.is_empty() {
            return Value::Null;
        }
        let text_of =
            |token: u32| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned();
        match self.api {
            Api::Chat => {
                let entry = |token: &TokenLogprob| {
                    json!({
                        "token": text_of(token.token),
                        "logprob": finite(token.logprob),
                        "bytes": tokenizer.token_bytes(token.token),
                    })
                };
                let content: Vec<Value> = reports
                    .iter()
                    .map(|report| {
                        let alternatives = report.alternatives.iter().take(top);
                        let mut chosen = entry(&report.chosen);
                        chosen["top_logprobs"] = alternatives.map(entry).collect();
                        chosen
                    })
                    .collect();
                json!({ "content": content, "refusal": null })
            }
            Api::Completions => {
                let mut place = offset;
                let mut offsets = Vec::with_capacity(reports.len());
                for report in reports {
                    offsets.push(place);
                    place += text_of(report.chosen.token).chars().count();
                }
                let tops = reports.iter().map(|report| {
                    let pairs = report.alternatives.iter().take(top);
                    pairs.map(|t| (text_of(t.token), json!(finite(t.logprob)))).collect::<Value>()
                });
                json!({
                    "tokens": reports.iter().map(|r| text_of(r.chosen.token)).collect::<Vec<_>>(),
                    "token_logprobs":
                        reports.iter().map(|r| finite(r.chosen.logprob)).collect::<Vec<_>>(),
                    "top_logprobs": tops.collect::<Vec<_>>(),
                    "text_offset": offsets,
                })
            }
        }
    }
}

/// Where a chunk stands in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Names the speaker.
    First,
    /// Text.
    Middle,
    /// Says why the reply ended.
    Last(FinishReason),
}

fn reason_text(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// JSON has no minus infinity; the OpenAI API writes -9999 for "practically impossible".
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<ReplyRequest, ApiError> {
        ReplyRequest::parse(Api::Chat, body.to_string().as_bytes())
    }

    fn chat(extra: &Value) -> Result<ReplyRequest, ApiError> {
        let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        parse(&body)
    }

    #[test]
    fn what_the_official_client_sends_is_understood() {
        let request = chat(&json!({
            "model": "m", "stream": true, "stream_options": { "include_usage": true },
            "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -3, "stop": ["a", "b"],
            "logprobs": true, "top_logprobs": 2, "n": 1, "max_completion_tokens": 5, "user": "u",
            "cache_salt": "s", "prompt_cache_key": "c", "ignore_eos": true, "tools": [],
            "response_format": { "type": "text" }, "presence_penalty": 0.0, "logit_bias": null,
            "cache": { "no_read": true }, "truncation": "disabled",
        }))
        .unwrap();
        assert_eq!(request.cache, CacheUse { no_read: true, ..CacheUse::default() });
        assert_eq!(request.tokens_max, Some(5));
        assert_eq!(request.sampling.top_k, 0);
        assert_eq!(request.sampling.seed, (-3_i64).cast_unsigned());
        assert_eq!(request.sampling.logprobs, Some(2));
        assert_eq!(request.stops, ["a", "b"]);
        assert_eq!(request.conversation.as_deref(), Some("c"));
        assert!(request.include_usage);
    }

    #[test]
    fn text_parts_are_joined_and_a_sent_back_reply_passes() {
        let request = parse(&json!({ "messages": [
            { "role": "developer", "content": "d" },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": "r", "refusal": null, "annotations": [], "audio": null,
              "function_call": null, "tool_calls": null },
            { "role": "user", "name": "Ada", "content": "c" },
        ]}))
        .unwrap();
        let Prompt::Messages(messages) = request.prompt else { panic!("messages") };
        let seen: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(seen, [("system", "d"), ("user", "ab"), ("assistant", "r"), ("user", "c")]);
        assert_eq!(messages[3].name.as_deref(), Some("Ada"));
    }

    #[test]
    fn each_bad_field_is_named() {
        for (extra, param) in [
            (json!({ "frob": 1 }), "frob"),
            (json!({ "temperature": 3 }), "temperature"),
            (json!({ "temperature": "hot" }), "temperature"),
            (json!({ "top_p": 0 }), "top_p"),
            (json!({ "top_k": -2 }), "top_k"),
            (json!({ "min_p": 2 }), "min_p"),
            (json!({ "seed": 1.5 }), "seed"),
            (json!({ "n": 2 }), "n"),
            (json!({ "max_tokens": 0 }), "max_tokens"),
            (json!({ "max_tokens": -1 }), "max_tokens"),
            (json!({ "max_tokens": 1, "max_completion_tokens": 2 }), "max_tokens"),
            (json!({ "stop": 3 }), "stop"),
            (json!({ "stop": "" }), "stop"),
            (json!({ "stop": vec!["a"; 17] }), "stop"),
            (json!({ "top_logprobs": 3 }), "top_logprobs"),
            (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
            (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
            (json!({ "stream": true, "stream_options": { "x": 1 } }), "stream_options.x"),
            (json!({ "tools": [{}] }), "tools"),
            (json!({ "response_format": { "type": "json_object" } }), "response_format"),
            (json!({ "logit_bias": { "5": 1 } }), "logit_bias"),
            (json!({ "presence_penalty": 0.5 }), "presence_penalty"),
            (json!({ "prompt_token_ids": [1] }), "prompt_token_ids"),
            (json!({ "prompt_token_ids": [-1] }), "prompt_token_ids"),
            (json!({ "cache_salt": "x".repeat(257) }), "cache_salt"),
            (json!({ "truncation": "half" }), "truncation"),
            (json!({ "truncation": 1 }), "truncation"),
            (json!({ "cache": true }), "cache"),
            (json!({ "cache": { "no_store": 1 } }), "cache.no_store"),
            (json!({ "cache": { "no_write": true } }), "cache.no_write"),
            (json!({ "messages": [] }), "messages"),
            (json!({ "messages": null }), "messages"),
            (json!({ "messages": "hi" }), "messages"),
            (json!({ "messages": ["hi"] }), "messages[0]"),
            (json!({ "messages": [{ "role": "user" }] }), "messages[0].content"),
            (json!({ "messages": [{ "role": "wizard", "content": "" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "tool", "content": "" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "user", "content": "", "x": 1 }] }), "messages[0].x"),
            (
                json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
                "messages[0].content[0].type",
            ),
        ] {
            let error = chat(&extra).expect_err(&extra.to_string());
            assert_eq!(error.status(), 400, "{extra}");
            assert_eq!(error.body()["error"]["param"], param, "{extra}");
        }
    }

    #[test]
    fn completions_take_text_or_ids() {
        let parse =
            |body: Value| ReplyRequest::parse(Api::Completions, body.to_string().as_bytes());
        assert_eq!(parse(json!({ "prompt": "a" })).unwrap().prompt, Prompt::Text("a".into()));
        assert_eq!(parse(json!({ "prompt": [1, 2] })).unwrap().prompt, Prompt::Tokens(vec![1, 2]));
        assert!(parse(json!({ "prompt": ["a", "b"] })).is_err());
        assert!(parse(json!({ "messages": [] })).is_err());
        assert!(parse(json!({ "prompt": "a", "truncation": "auto" })).is_err());
    }

    #[test]
    fn without_a_seed_each_request_draws_its_own() {
        let seed = || chat(&json!({})).unwrap().sampling.seed;
        assert_ne!(seed(), seed());
    }
}

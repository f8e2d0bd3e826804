//! One generation, from a checked request to the engine and back: the prompt's ids, the events, and the
//! conversation's record at the end.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Service;
use super::conversations::{Name, Record, Resume, digest};
use super::error::ApiError;
use super::metrics::Watch;
use super::openai::{Prompt, ReplyRequest, Usage};
use super::reply::{Delta, Reply, TokenReport};
use crate::account::Account;
use crate::request::{Command, Event, FinishReason, Generate, Salt};
use crate::text::quote;
use crate::text::template::TemplateMessage;
use crate::text::tokenizer::Specials;

/// Of the context, room for a reply whose length nobody asked for: an eighth.
const REPLY_SHARE: u32 = 8;

/// A generation under way. Dropping it cancels it: the engine sees that nobody listens.
#[derive(Debug)]
pub struct Generation {
    service: Arc<Service>,
    events: mpsc::UnboundedReceiver<Event>,
    reply: Reply,
    watch: Watch,
    prompt_tokens: usize,
    account: Account,
    dropped: usize,
    turn: Option<Turn>,
}

/// What a named conversation needs to be recorded when the reply is there.
#[derive(Debug)]
struct Turn {
    name: Name,
    messages: Vec<TemplateMessage>,
    rendered: String,
    tokens: Vec<u32>,
    resume: Resume,
}

impl Turn {
    /// Keeps the conversation as this request asks for.
    fn keep(mut self, request: &ReplyRequest) -> Self {
        self.resume.keep = self.resume.keep.then(request.cache.keep);
        self
    }
}

/// What a generation said.
#[derive(Debug)]
pub enum Step {
    /// It goes on: it was admitted, its prompt is complete, or where that comes from is settled.
    Started,
    /// More of the reply, possibly nothing to show.
    Delta(Delta),
    /// The rest of the reply, and why it ended; nothing follows.
    Finished(Delta, FinishReason),
}

/// A prompt's ids and where they came from.
struct Prepared {
    tokens: Vec<u32>,
    turn: Option<Turn>,
}

impl Generation {
    /// Prepares the prompt and hands it to the engine.
    pub async fn start(
        service: Arc<Service>,
        request: &ReplyRequest,
        conversation: Option<String>,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let mut prepared = prepare(&service, request, conversation.as_deref()).await?;
        if request.truncates {
            make_room(&service, &mut prepared, request.tokens_max);
        }
        let prompt_tokens = prepared.tokens.len();
        if prompt_tokens == 0 {
            return Err(ApiError::invalid("the prompt has no tokens"));
        }
        let vocabulary = service.tokenizer.vocabulary_size();
        if let Some(id) = prepared.tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ApiError::field(
                "prompt_token_ids",
                format_args!("{id} is no token; the vocabulary has {vocabulary}"),
            ));
        }
        let context_max = service.context_max as usize;
        let room = context_max.saturating_sub(prompt_tokens);
        let tokens_max = match request.tokens_max {
            Some(asked) if asked as usize <= room => asked,
            None if room > 0 => {
                // As many as fit, also into the device pool; the engine refuses a prompt beyond it.
                let pool = (service.tokens_capacity as usize).saturating_sub(prompt_tokens).max(1);
                room.min(pool) as u32
            }
            asked => {
                return Err(ApiError::context_length(service.context_max, prompt_tokens, asked));
            }
        };
        let (sender, events) = mpsc::unbounded_channel();
        let turn = prepared.turn.as_ref();
        (service.submit)(Command::Generate(Generate {
            tokens: prepared.tokens,
            salt: Salt(request.cache_salt.as_bytes().into()),
            cache: request.cache,
            conversation: conversation.map(Into::into),
            start: turn.and_then(|turn| turn.resume.kept.as_ref()).map(|kept| kept.start.clone()),
            sampling: request.sampling.clone(),
            tokens_max,
            stop_tokens: service.stop_tokens.clone(),
            events: sender,
        }))?;
        Ok(Self {
            watch: Watch::new(&service.metrics, arrived, prompt_tokens),
            service,
            events,
            reply: Reply::new(request.stops.clone()),
            prompt_tokens,
            account: Account::default(),
            dropped: prepared.turn.as_ref().map_or(0, |turn| turn.resume.dropped),
            turn: prepared.turn.filter(|_| !request.cache.no_store).map(|turn| turn.keep(request)),
        })
    }

    /// The next thing that happens. Not to be called after `Finished` or an error.
    pub async fn next(&mut self) -> Result<Step, ApiError> {
        let Some(event) = self.events.recv().await else {
            self.watch.failed();
            return Err(ApiError::internal("the engine stopped before the reply was complete"));
        };
        match event {
            Event::Deleted => {
                self.turn = None;
                Ok(Step::Started)
            }
            Event::Unbroken => {
                if let Some(turn) = &mut self.turn {
                    turn.resume.kept = None;
                }
                Ok(Step::Started)
            }
            Event::Started => Ok(Step::Started),
            Event::Prompt(account) => {
                self.account = account;
                Ok(Step::Started)
            }
            Event::Token { token, alternatives } => {
                self.watch.token();
                let report = TokenReport { chosen: token, alternatives };
                let delta = self.reply.push(&self.service.tokenizer, report);
                if self.reply.is_stopped() {
                    self.events.close(); // The engine cancels what nobody reads.
                    self.end(FinishReason::Stop);
                    return Ok(Step::Finished(delta, FinishReason::Stop));
                }
                Ok(Step::Delta(delta))
            }
            Event::Finished(reason) => {
                let delta = self.reply.finish();
                self.end(reason);
                Ok(Step::Finished(delta, reason))
            }
            Event::Failed(error) => {
                self.watch.failed();
                Err(error.into())
            }
        }
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        let (prompt, reply) = (self.prompt_tokens, self.reply.token_count());
        Usage { prompt, reply, account: self.account, dropped: self.dropped }
    }

    fn end(&mut self, reason: FinishReason) {
        self.watch.finished(reason);
        if let Some(turn) = self.turn.take() {
            self.record(turn);
        }
    }

    fn record(&self, mut turn: Turn) {
        let tokenizer = &self.service.tokenizer;
        let (seen, bytes) = self.reply.seen_tokens();
        let mut messages: Vec<_> = turn.messages.iter().map(digest).collect();
        messages.push(digest(&TemplateMessage {
            role: "assistant".to_owned(),
            content: self.reply.text().to_owned(),
            name: None,
        }));
        turn.rendered.push_str(&quote::quote(tokenizer, &self.reply.text()[..bytes]));
        turn.tokens.extend_from_slice(seen);
        let record = Record::after(turn.resume, messages, &turn.rendered, turn.tokens);
        self.service.conversations.put(&turn.name, record);
    }
}

/// Truncates the history of a prompt that leaves no room for its reply, if that helps. What the system says
/// stays, and so do the conversation's first tokens: attention leans on them (StreamingLLM's sinks).
fn make_room(service: &Service, prepared: &mut Prepared, tokens_max: Option<u32>) {
    let Some(turn) = &mut prepared.turn else { return };
    let room = service.context_max.min(service.tokens_capacity);
    let reply = tokens_max.unwrap_or(room / REPLY_SHARE);
    let over = (turn.tokens.len() + reply as usize).saturating_sub(room as usize);
    if over == 0 || turn.resume.tokens.is_empty() {
        return;
    }
    // Up to where the system's words end in the prompt; templates may trim them.
    let mut system_end = 0;
    for message in turn.messages.iter().take_while(|message| message.role == "system") {
        let words = quote::quote(&service.tokenizer, message.content.trim());
        let found = turn.rendered[system_end..].find(&words);
        system_end += found.map_or(0, |at| at + words.len());
    }
    let in_system = quote::encode(&service.tokenizer, &turn.rendered[..system_end]);
    let sinks = service.tokenizer.with_bos(in_system).len().max(1);
    let said = turn.tokens.split_off(turn.resume.tokens.len());
    if service.conversations.truncate(&turn.name, &mut turn.resume, sinks, over) {
        service.metrics.truncated();
    }
    turn.tokens = [turn.resume.tokens.as_slice(), &said].concat();
    prepared.tokens.clone_from(&turn.tokens);
}

async fn prepare(
    service: &Arc<Service>,
    request: &ReplyRequest,
    conversation: Option<&str>,
) -> Result<Prepared, ApiError> {
    let text_bytes = match &request.prompt {
        Prompt::Tokens(tokens) => return Ok(Prepared { tokens: tokens.clone(), turn: None }),
        Prompt::Text(text) => text.len(),
        Prompt::Messages(messages) => messages.iter().map(|message| message.content.len()).sum(),
    };
    // Checked before the text is cut into tokens, which costs more than reading it did.
    if text_bytes > service.context_max as usize * service.tokenizer.token_bytes_max() {
        return Err(ApiError::text_too_long(service.context_max, text_bytes));
    }
    let named = match (&request.prompt, conversation) {
        (Prompt::Messages(messages), Some(id)) => {
            let name = service.conversations.name(request.cache_salt.as_bytes(), id);
            // A record matters only behind a reply, so the first turn needs none.
            let has_reply = messages.iter().any(|message| message.role == "assistant");
            let record = if has_reply { service.conversations.find(&name).await } else { None };
            Some((name, record))
        }
        _ => None,
    };
    let (service, prompt) = (service.clone(), request.prompt.clone());
    tokio::task::spawn_blocking(move || match prompt {
        Prompt::Messages(messages) => prepare_chat(&service, messages, named),
        Prompt::Text(text) => {
            let ids = service.tokenizer.encode(&text, Specials::Parse);
            Ok(Prepared { tokens: service.tokenizer.with_bos(ids), turn: None })
        }
        Prompt::Tokens(tokens) => Ok(Prepared { tokens, turn: None }),
    })
    .await
    .map_err(|error| ApiError::internal(format!("preparing the prompt failed: {error}")))?
}

fn prepare_chat(
    service: &Service,
    messages: Vec<TemplateMessage>,
    named: Option<(Name, Option<Arc<Record>>)>,
) -> Result<Prepared, ApiError> {
    let rendered = service.render(&messages)?;
    let resume = match named.as_ref().and_then(|(_, record)| record.as_ref()) {
        None => Resume::default(),
        Some(record) => {
            let digests: Vec<_> = messages.iter().map(digest).collect();
            record.resume(&digests, &rendered)
        }
    };
    if let Some(reason) = resume.diverged {
        service.metrics.diverged(reason);
    }
    let (covered_bytes, covered_messages) = resume.covered();
    let retokenised: usize = messages[covered_messages..]
        .iter()
        .filter(|message| message.role == "assistant")
        .map(|message| service.tokenizer.encode(&message.content, Specials::Text).len())
        .sum();
    service.metrics.retokenised(retokenised);
    let rest = quote::encode(&service.tokenizer, &rendered[covered_bytes..]);
    let tokens = if covered_bytes == 0 {
        service.tokenizer.with_bos(rest)
    } else {
        [resume.tokens.as_slice(), &rest].concat()
    };
    let turn =
        named.map(|(name, _)| Turn { name, messages, rendered, tokens: tokens.clone(), resume });
    Ok(Prepared { tokens, turn })
}

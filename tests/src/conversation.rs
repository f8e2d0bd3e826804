//! A conversation held with a served model, turn by turn, and the same turn asked cold.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::client::{Answer, Client, ClientError, Message, Question};

/// What a person asks, turn after turn. The first question brings a text along, as people do, so that
/// there is a history worth keeping.
pub const QUESTIONS: [&str; 6] = [
    "Here is a note from the keeper of a small lighthouse. \"The lamp was lit at half past four, for \
     the fog came early. Two fishing boats went by before dark; the second was the Marigold, and her \
     skipper waved. The oil will last until Thursday if the wind stays in the west. On Monday I \
     mended the third stair, which had been loose since the storm in March, and painted the rail \
     green, because there was no white left in the store. My sister writes that the new doctor in \
     the village keeps bees and that he will bring us honey in June. The foghorn needs a new valve; \
     I have asked for it twice, and the harbour office has answered once, to say that my letter was \
     on the wrong form. The gulls have nested on the boathouse again. I let them. In the evening I \
     read the old logbook: on this day fifty years ago the keeper saw a whale from the gallery and \
     wrote down its length, which nobody believed. The barometer is falling slowly. Tomorrow I will \
     carry up more oil, write the right form, and look for the whale.\" Who wrote this note?",
    "Which colour is the rail now, and why?",
    "What does the foghorn need?",
    "Who keeps bees?",
    "What happened fifty years ago?",
    "What will the keeper do tomorrow?",
];

/// A text that nobody used before: names conversations, salts cold runs.
pub fn unused_name(purpose: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanoseconds =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos());
    format!("{purpose}-{nanoseconds:x}-{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// One conversation: what was said so far.
#[derive(Clone, Debug)]
pub struct Conversation {
    id: String,
    salt: Option<String>,
    tokens_max: u32,
    messages: Vec<Message>,
}

impl Conversation {
    /// A new conversation, with answers of at most `tokens_max` tokens.
    pub fn new(tokens_max: u32) -> Self {
        Self { id: unused_name("conversation"), salt: None, tokens_max, messages: Vec::new() }
    }

    /// Shares nothing with conversations before it, though the words be the same.
    #[must_use]
    pub fn salted(mut self) -> Self {
        self.salt = Some(unused_name("salt"));
        self
    }

    /// Name of the conversation.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How many turns were answered.
    pub fn turns(&self) -> usize {
        self.messages.len() / 2
    }

    /// The next turn: asks, and keeps question and answer.
    pub fn say(&mut self, client: &Client, text: &str) -> Result<Answer, ClientError> {
        self.messages.push(Message::user(text));
        let answer = client.ask(&Question {
            messages: &self.messages,
            conversation: &self.id,
            salt: self.salt.as_deref(),
            tokens_max: self.tokens_max,
        });
        match &answer {
            Ok(answer) => self.messages.push(Message::assistant(&answer.text)),
            Err(_) => {
                self.messages.pop();
            }
        }
        answer
    }

    /// Asks the last turn again as if nothing were in any tier, for at most `tokens_max` tokens.
    pub fn ask_last_turn_cold(
        &self,
        client: &Client,
        tokens_max: u32,
    ) -> Result<Answer, ClientError> {
        let upto_question = self.messages.len().saturating_sub(1);
        client.ask(&Question {
            messages: &self.messages[..upto_question],
            conversation: &self.id,
            salt: Some(&unused_name("cold")),
            tokens_max,
        })
    }

    /// The same, for an answer as long as the first one could be.
    pub fn repeat_last_turn_cold(&self, client: &Client) -> Result<Answer, ClientError> {
        self.ask_last_turn_cold(client, self.tokens_max)
    }
}

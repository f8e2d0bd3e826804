//! What a client is told when something is wrong: OpenAI's error object, with the right status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::request::GenerateError;

/// Seconds after which a client may try again when the queue is full or the server is on its way up or
/// down: about one turn.
const RETRY_AFTER_SECONDS: u16 = 2;

/// An answer that is not what the client hoped for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    /// OpenAI's `code`.
    code: Option<&'static str>,
    /// The field at fault.
    param: Option<String>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into() }
    }

    /// 400: the request cannot be served as it is.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: a field's value cannot be used.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        Self { param: Some(name.to_owned()), ..Self::invalid(format!("`{name}`: {message}")) }
    }

    /// 400: nobody knows this field.
    pub fn unknown_field(name: &str) -> Self {
        Self {
            code: Some("unknown_field"),
            ..Self::field(name, "unknown field; this server refuses what it would have to ignore")
        }
    }

    /// 400: a field of the OpenAI API that this server does not serve.
    pub fn unsupported(name: &str, message: impl std::fmt::Display) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(name, message) }
    }

    /// 400: the body is not JSON.
    pub fn json(message: impl std::fmt::Display) -> Self {
        Self {
            code: Some("invalid_json"),
            ..Self::invalid(format!("the body is not valid JSON: {message}"))
        }
    }

    /// 400: prompt and reply do not fit.
    pub fn context_length(context_max: u32, prompt: usize, reply: Option<u32>) -> Self {
        let asked = match reply {
            Some(reply) => format!(
                "{} tokens ({prompt} in the prompt and {reply} for the reply)",
                prompt as u64 + u64::from(reply)
            ),
            None => format!("{prompt} tokens in the prompt and at least one for the reply"),
        };
        Self {
            code: Some("context_length_exceeded"),
            param: Some("messages".to_owned()),
            ..Self::invalid(format!(
                "This model's maximum context length is {context_max} tokens. However, you requested \
                 {asked}. Please shorten the messages or the reply."
            ))
        }
    }

    /// 400: so much text that it cannot fit, whatever its tokens are.
    pub fn text_too_long(context_max: u32, bytes: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            param: Some("messages".to_owned()),
            ..Self::invalid(format!(
                "This model's maximum context length is {context_max} tokens. However, your prompt has \
                 {bytes} bytes of text, which is more than that many tokens can hold."
            ))
        }
    }

    /// 404: another model than the one served.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".to_owned()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("The model `{asked}` does not exist; this server serves `{served}`."),
            )
        }
    }

    /// 404: nothing is on record under this name.
    pub fn no_such_conversation(id: &str) -> Self {
        Self {
            code: Some("conversation_not_found"),
            param: Some("id".to_owned()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!(
                    "Nothing is on record of the conversation `{id}` under this model and `cache_salt`: a turn is \
                     recorded when its reply is complete and `X-Conversation-Id` named it."
                ),
            )
        }
    }

    /// 404: no such path.
    pub fn no_such_path(method: &str, path: &str) -> Self {
        Self {
            code: Some("unknown_url"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("Unknown request URL: {method} {path}."),
            )
        }
    }

    /// 405: the path exists, for another method.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        Self {
            code: Some("method_not_allowed"),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                format!("{method} is not allowed for {path}."),
            )
        }
    }

    /// 408: the body did not come in time.
    pub fn body_timeout(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the request's body did not arrive within {seconds} seconds"),
        )
    }

    /// 413: more bytes than any prompt needs.
    pub fn body_too_large(limit: usize) -> Self {
        Self {
            code: Some("request_too_large"),
            ..Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the request's body is larger than {limit} bytes"),
            )
        }
    }

    /// 503: try again.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    /// 503: nobody keeps conversations between their turns now.
    pub fn no_cache() -> Self {
        Self {
            code: Some("cache_unavailable"),
            ..Self::unavailable("no cache daemon is attached now; turns are answered without it")
        }
    }

    /// 500: ours to mend.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// With another OpenAI `param`.
    #[must_use]
    pub fn at(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// Status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The error object, as the body or as an event of a stream that has begun.
    pub fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let message = error.to_string();
        match error {
            GenerateError::QueueFull { .. } => {
                Self { code: Some("queue_full"), ..Self::unavailable(message) }
            }
            GenerateError::ShuttingDown => Self::unavailable(message),
            GenerateError::TooLarge { .. } | GenerateError::ContextTooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
            }
            GenerateError::UnknownToken { .. } => Self::invalid(message).at("prompt_token_ids"),
            GenerateError::EmptyPrompt => Self::invalid(message),
            GenerateError::Backend => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let response = ApiError::from(GenerateError::QueueFull { waiting: 3 }).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn a_context_that_is_too_long_is_answered_with_the_numbers() {
        let body = ApiError::context_length(8192, 8000, Some(500)).body();
        assert_eq!(body["error"]["code"], "context_length_exceeded");
        let message = body["error"]["message"].as_str().unwrap();
        for number in ["8192", "8000", "500", "8500"] {
            assert!(message.contains(number), "{message}");
        }
    }
}

//! The model's chat template: messages in, one prompt text out.
//!
//! Templates are written for the `jinja2` of Python's `transformers`; what they rely on beyond the
//! language is added here: `raise_exception`, `strftime_now`, a `tojson` that leaves `<` alone, Python's
//! string methods, `{% generation %}` blocks, and the `trim_blocks` and `lstrip_blocks` habits.

use jiff::Timestamp;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use super::TextError;

/// One message, as a template sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
    /// The participant's name, where one was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// A template did not accept the messages: the client's to mend.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's chat template refused the messages: {0}")]
pub struct RenderError(String);

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`.
    pub fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TextError::Template(describe(&error)))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| TextError::Template(describe(&error)))?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt that asks for the reply to `messages`.
    pub fn render(&self, messages: &[TemplateMessage]) -> Result<String, RenderError> {
        let template =
            self.environment.get_template(NAME).map_err(|e| RenderError(describe(&e)))?;
        template
            .render(context! {
                messages => Serde(messages),
                add_generation_prompt => true,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
            })
            .map_err(|error| RenderError(describe(&error)))
    }
}

/// The message of an error with those of its causes, without the template's source.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// `{% generation %}` marks what a training run learns from; for rendering it says nothing.
fn without_generation_blocks(source: &str) -> String {
    let mut text = source.to_owned();
    for word in ["generation", "endgeneration"] {
        for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
            // An empty comment in its place keeps what `-` does to the white space around it.
            let comment = format!("{}{}", open.replace('%', "#"), close.replace('%', "#"));
            text = text.replace(&format!("{open} {word} {close}"), &comment);
        }
    }
    text
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja's function signature")]
fn strftime_now(format: String) -> Result<String, Error> {
    let now = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(&format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// As Python's `json.dumps(ensure_ascii=False)`: minijinja's own escapes `<`, `>`, `&` and `'` for HTML.
#[expect(clippy::needless_pass_by_value, reason = "minijinja's filter signature")]
fn tojson(value: Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let bad = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    // Known to jinja2's callers, without effect here: keys keep their order, text stays as it is.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let text = match indent {
        None => python_spaces(&serde_json::to_value(&value).map_err(bad)?),
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut bytes = Vec::new();
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            value.serialize(&mut serializer).map_err(bad)?;
            String::from_utf8_lossy(&bytes).into_owned()
        }
    };
    Ok(Value::from_safe_string(text))
}

/// JSON with Python's `", "` and `": "`.
fn python_spaces(value: &serde_json::Value) -> String {
    use serde_json::Value as Json;
    match value {
        Json::Array(items) => {
            format!("[{}]", items.iter().map(python_spaces).collect::<Vec<_>>().join(", "))
        }
        Json::Object(fields) => {
            let fields: Vec<_> = fields
                .iter()
                .map(|(key, value)| {
                    format!("{}: {}", Json::from(key.as_str()), python_spaces(value))
                })
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> TemplateMessage {
        TemplateMessage { role: role.to_owned(), content: content.to_owned(), name: None }
    }

    fn render(source: &str, messages: &[TemplateMessage]) -> Result<String, RenderError> {
        ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned()).unwrap().render(messages)
    }

    #[test]
    fn smollms_own_template_renders_as_transformers_does() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            render(source, &[message("user", "a < b & 'c'")]).unwrap(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
             <|im_end|>\n<|im_start|>user\na < b & 'c'<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_raised_exception_is_the_clients_error_and_keeps_its_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn pythons_string_methods_and_tokens_are_there() {
        let source = "{{ bos_token }}{% for m in messages %}{% if m.content.startswith('a') %}{{ \
                      m.content.strip().split('-')[-1] }}{% endif %}{% endfor %}{{ eos_token }}";
        assert_eq!(render(source, &[message("user", "a-b ")]).unwrap(), "<s>b</s>");
    }

    #[test]
    fn tojson_escapes_nothing_for_html() {
        assert_eq!(
            render("{{ {'a<': ['é', 1, none]} | tojson }}", &[]).unwrap(),
            "{\"a<\": [\"é\", 1, null]}"
        );
        assert_eq!(render("{{ [1] | tojson(indent=2) }}", &[]).unwrap(), "[\n  1\n]");
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc", &[]).unwrap(), "a\nb\nc");
    }

    #[test]
    fn generation_blocks_are_transparent() {
        assert_eq!(render("a {%- generation -%} b{% endgeneration %}c", &[]).unwrap(), "abc");
    }

    #[test]
    fn the_date_is_there() {
        assert_eq!(render("{{ strftime_now('%Y') | length }}", &[]).unwrap(), "4");
        assert!(render("{{ strftime_now('%') }}", &[]).is_err());
    }

    #[test]
    fn a_template_that_does_not_compile_is_refused() {
        let error = ChatTemplate::new("{% if %}", String::new(), String::new()).unwrap_err();
        assert!(error.to_string().contains("does not compile"), "{error}");
    }
}

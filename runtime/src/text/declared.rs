//! Token ids of a declared system prompt, as requests that use it begin with.

use super::quote;
use super::template::{ChatTemplate, RenderError, TemplateMessage};
use super::tokenizer::{Specials, Tokenizer};

/// What prompts with this system message have in common, as chats and (taken as plain text) as completions.
pub fn token_ids(
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    system: &str,
) -> Result<Vec<Vec<u32>>, RenderError> {
    let mut prompts = vec![tokenizer.with_bos(tokenizer.encode(system, Specials::Parse))];
    if let Some(template) = template {
        // Whatever the template puts between the system message and what a user says is shared as well: two
        // users who say different things from the first token on tell how far that goes.
        let ids = |said: &str| {
            let message = |role: &str, content: &str| TemplateMessage {
                role: role.to_owned(),
                content: quote::quote(tokenizer, content),
                name: None,
            };
            let rendered = template.render(&[message("system", system), message("user", said)])?;
            Ok::<_, RenderError>(tokenizer.with_bos(quote::encode(tokenizer, &rendered)))
        };
        let (one, other) = (ids("a")?, ids("7")?);
        let same = one.iter().zip(&other).take_while(|(one, other)| one == other);
        prompts.push(same.map(|(id, _)| *id).collect());
    }
    Ok(prompts)
}

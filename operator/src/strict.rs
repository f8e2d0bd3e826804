//! Reads a `ConversationModel` from YAML as strictly as `kubectl apply` does against a real API
//! server: the same schema, the same defaults, the same rules, without a server.
//!
//! Checked: unknown fields, types, bounds and choices of the schema, and all CEL rules. Of patterns
//! only those that a type of ours checks too (sizes, spans).

use kube::Resource;
use serde_json::Value;

use crate::api::{self, ConversationModel};

/// Most faults that are listed; a file of the wrong kind has one for each line.
const FAULTS_MAX: usize = 20;

/// A text is not an acceptable model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StrictError {
    /// It is not YAML.
    #[error("not YAML: {0}")]
    Yaml(#[from] serde_yaml::Error),
    /// It is another kind of object.
    #[error(
        "expected apiVersion {wanted_version} and kind {wanted_kind}, got {version} and {kind}"
    )]
    OtherKind {
        /// What we read.
        wanted_version: String,
        /// What we read.
        wanted_kind: String,
        /// What is there.
        version: String,
        /// What is there.
        kind: String,
    },
    /// The schema refuses it.
    #[error("{}", .0.join("\n"))]
    Schema(Vec<String>),
    /// A value is not what its field takes.
    #[error("{0}")]
    Value(#[from] serde_json::Error),
    /// A rule of the definition refuses it.
    #[error("{}", .0.join("\n"))]
    Rules(Vec<String>),
}

/// Reads a model.
pub fn model_from_yaml(text: &str) -> Result<ConversationModel, StrictError> {
    let value: Value = serde_yaml::from_str(text)?;
    expect_kind(&value)?;
    let faults = faults(&value);
    if !faults.is_empty() {
        return Err(StrictError::Schema(faults));
    }
    let model: ConversationModel = serde_json::from_value(value)?;
    model.validate_cel().map_err(|errors| {
        StrictError::Rules(errors.into_vec().iter().map(ToString::to_string).collect())
    })?;
    Ok(model)
}

fn expect_kind(value: &Value) -> Result<(), StrictError> {
    let field = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or("none").to_owned();
    let (version, kind) = (field("apiVersion"), field("kind"));
    let wanted_version = ConversationModel::api_version(&()).into_owned();
    let wanted_kind = ConversationModel::kind(&()).into_owned();
    if (&version, &kind) == (&wanted_version, &wanted_kind) {
        return Ok(());
    }
    Err(StrictError::OtherKind { wanted_version, wanted_kind, version, kind })
}

/// What the schema has against the object.
fn faults(value: &Value) -> Vec<String> {
    let version = api::crd().spec.versions.into_iter().next();
    let schema = version.and_then(|version| version.schema?.open_api_v3_schema);
    let schema = serde_json::to_value(schema).unwrap_or_default();
    let mut faults = Vec::new();
    let fields = value.as_object().into_iter().flatten();
    for (name, value) in fields {
        match name.as_str() {
            "apiVersion" | "kind" | "metadata" => {}
            _ => check_field(&schema, name, name, value, &mut faults),
        }
    }
    if value.get("spec").is_none() {
        faults.push("spec: required".into());
    }
    faults.truncate(FAULTS_MAX);
    faults
}

fn check_field(schema: &Value, name: &str, path: &str, value: &Value, faults: &mut Vec<String>) {
    match schema.get("properties").and_then(|properties| properties.get(name)) {
        Some(schema) => check(schema, path, value, faults),
        None if schema.get("additionalProperties").is_some() => {}
        None => faults.push(format!("unknown field {path:?}")),
    }
}

fn check(schema: &Value, path: &str, value: &Value, faults: &mut Vec<String>) {
    if value.is_null() {
        return; // The API server drops it; what is required is missed below by `get`.
    }
    let kind = schema["type"].as_str().unwrap_or_default();
    let matches = match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        _ => true,
    };
    if !matches {
        faults.push(format!("{path}: {value} must be of type {kind}"));
        return;
    }
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        faults.push(format!("{path}: {value} must be one of {}", Value::from(choices.clone())));
    }
    let mut bound = |name: &str, measured: f64, words: &str| {
        let Some(limit) = schema[name].as_f64() else { return };
        let broken = if name.starts_with("min") { measured < limit } else { measured > limit };
        if broken {
            faults.push(format!("{path}: {value} must {words} {limit}"));
        }
    };
    if let Some(number) = value.as_f64() {
        bound("minimum", number, "be at least");
        bound("maximum", number, "be at most");
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as f64;
        bound("minLength", length, "have a length of at least");
        bound("maxLength", length, "have a length of at most");
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        check_field(schema, name, &format!("{path}.{name}"), value, faults);
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required {
        if value.get(name).is_none_or(Value::is_null) {
            faults.push(format!("{path}.{name}: required"));
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check(&schema["items"], &format!("{path}[{index}]"), item, faults);
    }
}

#[cfg(test)]
mod tests;

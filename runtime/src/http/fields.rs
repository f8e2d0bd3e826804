//! The fields of a JSON object, taken one by one: what nobody took is unknown, and said so by name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// What is left of an object.
#[derive(Debug)]
pub struct Fields {
    left: Map<String, Value>,
    /// Where the object stands in the request, as a prefix of its fields' names.
    place: String,
}

impl Fields {
    /// The fields of a request's body.
    pub fn of_body(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body).map_err(ApiError::json)? {
            Value::Object(left) => Ok(Self { left, place: String::new() }),
            other => {
                Err(ApiError::json(format_args!("an object was expected, not {}", kind(&other))))
            }
        }
    }

    /// The fields of an object inside the request.
    pub fn of_value(place: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(left) => Ok(Self { left, place: format!("{place}.") }),
            other => Err(ApiError::field(
                place,
                format_args!("an object was expected, not {}", kind(&other)),
            )),
        }
    }

    /// The full name of a field, for messages.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    /// Takes a field; `null` is the same as absent, as clients send it so.
    pub fn take<T: DeserializeOwned>(&mut self, field: &str) -> Result<Option<T>, ApiError> {
        match self.left.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| ApiError::field(&self.name(field), error)),
        }
    }

    /// Takes a number and checks its range.
    pub fn number<T>(&mut self, field: &str, min: T, max: T) -> Result<Option<T>, ApiError>
    where
        T: DeserializeOwned + PartialOrd + std::fmt::Display + Copy,
    {
        let value = self.take::<T>(field)?;
        match value {
            Some(value) if !(min..=max).contains(&value) => Err(ApiError::field(
                &self.name(field),
                format_args!("{value} is out of range, which is from {min} to {max}"),
            )),
            value => Ok(value),
        }
    }

    /// Takes a field that this server does not serve. Absent, `null` and what means the same as absent
    /// pass.
    pub fn refuse(
        &mut self,
        field: &str,
        means_nothing: impl Fn(&Value) -> bool,
        why: &str,
    ) -> Result<(), ApiError> {
        match self.left.remove(field) {
            Some(value) if !value.is_null() && !means_nothing(&value) => {
                Err(ApiError::unsupported(&self.name(field), why))
            }
            _ => Ok(()),
        }
    }

    /// Takes a field that changes nothing here, whatever it says.
    pub fn ignore(&mut self, field: &str) {
        self.left.remove(field);
    }

    /// The end: nothing may be left.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(field) => Err(ApiError::unknown_field(&self.name(field))),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_took_is_named() {
        let mut fields = Fields::of_body(br#"{"a": 1, "frob": null}"#).unwrap();
        assert_eq!(fields.take::<u32>("a").unwrap(), Some(1));
        let error = fields.finish().unwrap_err();
        assert_eq!(error.body()["error"]["param"], "frob");
    }

    #[test]
    fn a_wrong_type_or_range_names_its_field() {
        let mut fields = Fields::of_body(br#"{"a": "x", "b": 3.5}"#).unwrap();
        assert_eq!(fields.take::<u32>("a").unwrap_err().body()["error"]["param"], "a");
        assert_eq!(fields.number("b", 0.0, 2.0).unwrap_err().body()["error"]["param"], "b");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in [&b"[1]"[..], b"3", b"", b"{", b"\xFF", b"{\"a\": 1} x"] {
            assert_eq!(Fields::of_body(body).unwrap_err().body()["error"]["code"], "invalid_json");
        }
    }

    #[test]
    fn nesting_without_end_is_an_error_not_a_crash() {
        let body = "[".repeat(1 << 20);
        assert!(Fields::of_body(body.as_bytes()).is_err());
    }
}

//! Classes of errors: who can do something about one.

use kube::Error;

/// Who can do something about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Time: it is tried again, with back-off. Nobody is told unless it lasts.
    Retry,
    /// The user: shown as a condition and an event; tried again, as the cause may lie elsewhere
    /// (a quota, a policy).
    UserMustFix,
    /// We: logged as an error and counted, since the operator sent what no server takes.
    Bug,
}

/// The class of what the API server, or the way to it, answered.
pub fn class_of(error: &Error) -> Class {
    let Error::Api(status) = error else {
        // The connection, a timeout, a proxy: all of them pass.
        return if matches!(error, Error::SerdeError(_) | Error::BuildRequest(_)) {
            Class::Bug
        } else {
            Class::Retry
        };
    };
    match status.code {
        // Conflict, gone, too many requests: the world moved on, look again.
        404 | 408 | 409 | 410 | 429 => Class::Retry,
        // A namespace that is being deleted forbids creation; that ends by itself.
        403 if status.message.contains("being terminated") => Class::Retry,
        // Quota, Pod Security, an admission policy (403); a value that only the server can judge,
        // such as a storage class that cannot expand (403, 422).
        403 | 422 => Class::UserMustFix,
        400..=499 => Class::Bug,
        _ => Class::Retry,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16, message: &str) -> Error {
        let status = serde_json::json!({"status": "Failure", "code": code, "message": message});
        Error::Api(serde_json::from_value(status).unwrap())
    }

    #[test]
    fn an_answer_is_sorted_by_who_can_act_on_it() {
        for (code, class) in [
            (409, Class::Retry),
            (429, Class::Retry),
            (500, Class::Retry),
            (503, Class::Retry),
            (403, Class::UserMustFix),
            (422, Class::UserMustFix),
            (400, Class::Bug),
            (415, Class::Bug),
        ] {
            assert_eq!(class_of(&api(code, "no")), class, "{code}");
        }
    }

    #[test]
    fn a_namespace_that_goes_is_no_fault_of_the_user() {
        let message =
            "unable to create new content in namespace chat because it is being terminated";
        assert_eq!(class_of(&api(403, message)), Class::Retry);
    }
}

//! What a request brings, read so that what is described is what is taken.

use crate::failure::Failure;
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use dunlin_model::CommandId;
use http::HeaderMap;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A JSON object. By itself, serde would take a list of a struct's fields in their order, too.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = NoBody;

    async fn from_request(request: Request, state: &S) -> Result<Self, NoBody> {
        let Json(value) = Json::from_request(request, state).await.map_err(NoBody::Unread)?;
        object(value).map(Self).map_err(NoBody::Refused)
    }
}

/// Why there is none.
pub enum NoBody {
    Unread(JsonRejection),
    Refused(Failure),
}

impl IntoResponse for NoBody {
    fn into_response(self) -> Response {
        match self {
            Self::Unread(rejection) => rejection.into_response(),
            Self::Refused(failure) => failure.into_response(),
        }
    }
}

/// A body that may be missing.
pub fn optional<T: Default + DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    object(serde_json::from_slice(body).map_err(|error| Failure::bad_request(format!("the body is not JSON: {error}")))?)
}

fn object<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    if !value.is_object() {
        return Err(Failure::invalid("the body must be a JSON object"));
    }
    serde_json::from_value(value).map_err(|error| Failure::invalid(format!("the body is not what it should be: {error}")))
}

/// The client's own id of its command, so that a repeat gets the first answer.
pub fn command_id(headers: &HeaderMap) -> Result<Option<CommandId>, Failure> {
    let Some(given) = headers.get("dunlin-command-id") else { return Ok(None) };
    let text = given.to_str().ok().filter(|text| !text.is_empty());
    let text = text.ok_or_else(|| Failure::bad_request("the header dunlin-command-id is empty or no text"))?;
    format!("user.{text}").parse().map(Some).map_err(|error| Failure::bad_request(format!("{error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::wire::StopMachine;

    #[test]
    fn a_body_is_an_object() {
        let check = |body: &str, is_taken: bool| assert_eq!(optional::<StopMachine>(body.as_bytes()).is_ok(), is_taken, "{body}");
        check("", true);
        check(" \n", true);
        check("{}", true);
        check(r#"{"signal": "SIGHUP", "timeout": 3}"#, true);
        check(r#"["SIGHUP", 3]"#, false);
        check("[null, null]", false);
        check("null", false);
        check(r#"{"signal": 1}"#, false);
        check("{", false);
    }

    #[test]
    fn a_command_has_an_id_that_somebody_chose() {
        let check = |given: Option<&str>, expected: Result<Option<&str>, ()>| {
            let headers = given.map(|given| ("dunlin-command-id".parse().unwrap(), given.parse().unwrap()));
            let id = command_id(&headers.into_iter().collect());
            assert_eq!(id.as_ref().map(|id| id.as_ref().map(CommandId::as_str)).map_err(|_| ()), expected, "{given:?}");
        };
        check(None, Ok(None));
        check(Some("mine-1"), Ok(Some("user.mine-1")));
        check(Some(""), Err(()));
        check(Some("a b"), Err(()));
        check(Some(&"x".repeat(200)), Err(()));
    }
}

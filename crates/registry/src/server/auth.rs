//! Who asks, and whether they may: Basic or Bearer, both handed to the caller's `Authorizer`.

use super::Server;
use super::answer::{Refusal, with};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use http::{HeaderMap, Method, StatusCode, header};
use std::sync::Arc;

/// Tokens of the platform are a few hundred bytes.
const MAX_CREDENTIAL_BYTES: usize = 16 * 1024;
/// How long a client keeps a token before it asks again; the token itself says how long it is good.
const TOKEN_LIFETIME_S: u64 = 300;

#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Anonymous,
    /// The password is a token of the platform.
    Basic { user: String, password: String },
    Bearer(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The repository is "": the first question of every client, and the exchange of a password for a token.
    Login,
    Pull,
    Push,
    Delete,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// No credentials, or wrong ones: the client is asked for others.
    Unauthenticated(String),
    Forbidden(String),
}

/// Decides for credentials, the name of a repository, and what is to be done with it.
pub type Authorizer = Arc<dyn Fn(&Credentials, &str, Access) -> Result<(), Denied> + Send + Sync>;

pub(super) struct Caller<'a> {
    server: &'a Server,
    credentials: Option<Credentials>,
    realm: String,
}

impl<'a> Caller<'a> {
    pub fn of(server: &'a Server, headers: &HeaderMap) -> Self {
        Self { server, credentials: credentials(headers), realm: realm(headers) }
    }

    pub fn may(&self, repo: &str, access: Access) -> Result<(), Refusal> {
        let Some(credentials) = &self.credentials else {
            return Err(self.challenge("the Authorization header is neither Basic nor Bearer".into(), repo, access));
        };
        match (self.server.authorize)(credentials, repo, access) {
            Ok(()) => Ok(()),
            Err(Denied::Unauthenticated(why)) => Err(self.challenge(why, repo, access)),
            Err(Denied::Forbidden(why)) => Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", why)),
        }
    }

    fn challenge(&self, why: String, repo: &str, access: Access) -> Refusal {
        let actions = match access {
            Access::Login => None,
            Access::Pull => Some("pull"),
            Access::Push => Some("pull,push"),
            Access::Delete => Some("delete"),
        };
        let mut challenge = format!("Bearer realm=\"{}\",service=\"{}\"", self.realm, self.server.service);
        if let Some(actions) = actions.filter(|_| repo.parse::<crate::Repo>().is_ok()) {
            challenge.push_str(&format!(",scope=\"repository:{repo}:{actions}\""));
        }
        Refusal { challenge: Some(challenge), ..Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", why) }
    }
}

/// Exchanges the password for a token: the password is one already, and is asked about at every request.
pub(super) fn token(server: &Server, headers: &HeaderMap, method: &Method) -> Result<Response, Refusal> {
    if method != Method::GET {
        // containers/image and docker fall back to GET
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "ask with GET and Basic credentials"));
    }
    let credentials = credentials(headers);
    let token = match &credentials {
        Some(Credentials::Basic { password, .. }) => password.clone(),
        Some(Credentials::Bearer(token)) => token.clone(),
        _ => {
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "log in with any user name and a token as the password");
            return Err(Refusal { challenge: Some(format!("Basic realm=\"{}\"", server.service)), ..refusal });
        }
    };
    match (server.authorize)(&Credentials::Bearer(token.clone()), "", Access::Login) {
        Ok(()) => {}
        Err(Denied::Unauthenticated(why)) => return Err(Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", why)),
        Err(Denied::Forbidden(why)) => return Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", why)),
    }
    let body = serde_json::json!({"token": token, "access_token": token, "expires_in": TOKEN_LIFETIME_S}).to_string();
    let response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    Ok(with(response, "cache-control", "no-store"))
}

/// `None` if there is a header that says neither.
fn credentials(headers: &HeaderMap) -> Option<Credentials> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Some(Credentials::Anonymous) };
    let text = value.to_str().ok().filter(|text| text.len() <= MAX_CREDENTIAL_BYTES)?;
    let (scheme, rest) = text.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Credentials::Bearer(rest.trim().to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(rest.trim()).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some(Credentials::Basic { user: user.to_owned(), password: password.to_owned() })
}

/// Where the client reaches us, in its own words: they come back to nobody but it.
fn realm(headers: &HeaderMap) -> String {
    let text = |name: &str| {
        let value = headers.get(name)?.to_str().ok()?.split(',').next()?.trim();
        let plain = value.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b));
        (plain && !value.is_empty()).then(|| value.to_owned())
    };
    let host = text("x-forwarded-host").or_else(|| text("host")).unwrap_or_else(|| "localhost".into());
    let scheme = if text("x-forwarded-proto").as_deref() == Some("https") { "https" } else { "http" };
    format!("{scheme}://{host}/v2/token")
}

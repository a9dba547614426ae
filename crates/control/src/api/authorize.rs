//! Who may do what. One table from method and path to the verb that is needed, so that no handler can
//! forget to ask.

use crate::failure::Failure;
use crate::Ctx;
use axum::extract::Request;
use dunlin_api::ErrorCode;
use dunlin_model::{AppName, OrgName};
use dunlin_model::token::{Capability, Verb};
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method};

/// Which socket a request came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entrance {
    /// One that only root can open.
    Root,
    /// The edge's: anybody may be behind it.
    Edge,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// Root on this host.
    Root,
    Token(Box<Capability>),
    /// Nobody in particular, on a path that is open.
    Anybody,
}

impl Caller {
    /// For the audit: `root`, or the id of the token.
    pub fn name(&self) -> &str {
        match self {
            Self::Root => "root",
            Self::Token(capability) => &capability.id,
            Self::Anybody => "anybody",
        }
    }

    /// Whether the caller may see that the app exists.
    pub fn sees(&self, org: &OrgName, app: &AppName) -> bool {
        match self {
            Self::Root => true,
            Self::Token(capability) => capability.allows(Verb::Read, org, Some(app)),
            Self::Anybody => false,
        }
    }

    /// Nobody makes a token that outlives their own.
    pub fn expires_at_ms(&self) -> Option<u64> {
        match self {
            Self::Token(own) => Some(own.expires_at_ms),
            Self::Root | Self::Anybody => None,
        }
    }

    /// Nobody makes a token that can do more than their own.
    pub fn may_grant(&self, ctx: &Ctx, verbs: &[Verb], apps: Option<&[AppName]>) -> bool {
        match self {
            Self::Root => true,
            Self::Anybody => false,
            Self::Token(own) => verbs.iter().all(|verb| match apps {
                None => own.allows(*verb, &ctx.org, None),
                Some(apps) => apps.iter().all(|app| own.allows(*verb, &ctx.org, Some(app))),
            }),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// Any valid token.
    Token,
    /// The verb on one app, or on the organization itself.
    Verb(Verb, Option<AppName>),
    /// No token is enough: who does that is root of all hosts.
    Root,
}

/// `verify` gives the capability of a token.
pub(crate) fn authorize(
    org: &OrgName,
    entrance: Entrance,
    request: &Request,
    verify: impl Fn(&str) -> Result<Capability, Failure>,
) -> Result<Caller, Failure> {
    let needs = needs(request.method(), request.uri().path())?;
    if entrance == Entrance::Root {
        return Ok(Caller::Root);
    }
    if needs == Needs::Nothing {
        return Ok(Caller::Anybody);
    }
    let capability = verify(bearer(request.headers())?)?;
    if needs == Needs::Root {
        return Err(Failure::new(ErrorCode::Forbidden, "only root on the host where control runs may do that, whatever a token allows")
            .hint("run it there, without --api"));
    }
    if let Needs::Verb(verb, app) = &needs
        && !capability.allows(*verb, org, app.as_ref())
    {
        let on = app.as_ref().map_or_else(|| "the organization".to_owned(), |app| format!("app {app}"));
        let verb = format!("{verb:?}").to_lowercase();
        return Err(Failure::new(ErrorCode::Forbidden, format!("the token {} does not allow {verb} on {on}", capability.id))
            .hint(format!("make one that does: `dunlin tokens create --verb {verb}` on the server")));
    }
    Ok(Caller::Token(Box::new(capability)))
}

pub(crate) fn bearer(headers: &HeaderMap) -> Result<&str, Failure> {
    let missing = || {
        Failure::new(ErrorCode::Unauthorized, "the request has no token")
            .hint("send `Authorization: Bearer <token>`; `dunlin tokens create` on the server makes one")
    };
    let value = headers.get(AUTHORIZATION).ok_or_else(missing)?;
    let value = value.to_str().map_err(|_| missing())?;
    let token = value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("FlyV1 "));
    token.map(str::trim).filter(|token| !token.is_empty()).ok_or_else(missing)
}

fn needs(method: &Method, path: &str) -> Result<Needs, Failure> {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let reads = *method == Method::GET || *method == Method::HEAD;
    Ok(match segments[..] {
        ["healthz"] | ["readyz"] => Needs::Nothing,
        ["v1", "ca"] | ["v1", "openapi.json"] => Needs::Nothing,
        ["metrics"] => Needs::Verb(Verb::Admin, None),
        ["v1", "version"] | ["v1", "platform", ..] => Needs::Token,
        ["v1", "tokens", ..] => Needs::Verb(Verb::Admin, None),
        ["v1", "cluster", "upgrade", ..] if !reads => Needs::Root,
        ["v1", "hosts", _, "debug"] => Needs::Verb(Verb::Admin, None),
        ["v1", "hosts", ..] | ["v1", "cluster", ..] => Needs::Verb(if reads { Verb::Read } else { Verb::Admin }, None),
        ["v1", "apps"] if reads => Needs::Token, // shows only what the caller sees
        ["v1", "apps"] => Needs::Verb(Verb::Deploy, None),
        ["v1", "apps", app, ref rest @ ..] => {
            // The raw segment, never a decoded one: a valid name needs no escapes.
            let app: AppName = app.parse().map_err(|error| Failure::bad_request(format!("{error}")))?;
            let verb = match rest {
                [] if *method == Method::DELETE => Verb::Admin,
                // Only there: a secret may be called `exec`, too.
                ["machines", _, "exec"] | ["machines", _, "exec", "stream"] => Verb::Exec,
                _ if reads => Verb::Read,
                _ => Verb::Deploy,
            };
            Needs::Verb(verb, Some(app))
        }
        _ => Needs::Token, // nothing is there; but that is not everybody's to know
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(method: Method, path: &str, expected: Needs) {
        assert_eq!(needs(&method, path).unwrap(), expected, "{method} {path}");
    }

    #[test]
    fn every_path_needs_its_verb() {
        let web = || Some("web".parse().unwrap());
        check(Method::GET, "/healthz", Needs::Nothing);
        check(Method::GET, "/metrics", Needs::Verb(Verb::Admin, None));
        check(Method::POST, "/v1/tokens", Needs::Verb(Verb::Admin, None));
        check(Method::GET, "/v1/hosts", Needs::Verb(Verb::Read, None));
        check(Method::POST, "/v1/hosts/tokens", Needs::Verb(Verb::Admin, None));
        check(Method::DELETE, "/v1/hosts/h2", Needs::Verb(Verb::Admin, None));
        check(Method::GET, "/v1/cluster/verify", Needs::Verb(Verb::Read, None));
        check(Method::GET, "/v1/cluster/upgrade", Needs::Verb(Verb::Read, None));
        check(Method::POST, "/v1/cluster/upgrade", Needs::Root);
        check(Method::POST, "/v1/cluster/upgrade/abort", Needs::Root);
        check(Method::GET, "/v1/hosts/h2/debug", Needs::Verb(Verb::Admin, None));
        check(Method::POST, "/v1/apps", Needs::Verb(Verb::Deploy, None));
        check(Method::GET, "/v1/apps/web/logs", Needs::Verb(Verb::Read, web()));
        check(Method::POST, "/v1/apps/web/releases", Needs::Verb(Verb::Deploy, web()));
        check(Method::POST, "/v1/apps/web/machines/0123456789abcd/exec", Needs::Verb(Verb::Exec, web()));
        check(Method::GET, "/v1/apps/web/machines/0123456789abcd/exec/stream", Needs::Verb(Verb::Exec, web()));
        check(Method::POST, "/v1/apps/web/secrets/exec", Needs::Verb(Verb::Deploy, web()));
        check(Method::DELETE, "/v1/apps/web/secrets/exec", Needs::Verb(Verb::Deploy, web()));
        check(Method::GET, "/v1/apps/web/secrets/exec", Needs::Verb(Verb::Read, web()));
        check(Method::DELETE, "/v1/apps/web", Needs::Verb(Verb::Admin, web()));
        check(Method::DELETE, "/v1/apps/web/machines/0123456789abcd", Needs::Verb(Verb::Deploy, web()));
        assert!(needs(&Method::GET, "/v1/apps/%77eb/logs").is_err(), "no second spelling of a name");
        check(Method::GET, "/anything", Needs::Token);
    }
}

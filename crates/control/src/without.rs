//! What a member serves of the API while control cannot be asked: commands to machines, their logs, and lists of what it has
//! heard. The handlers are control's own; where they ask desired state, these ask config facts ([`Owners`]).
//!
//! Tokens are checked by control's public key and by the revocations that this host has heard of. A host elsewhere checks
//! again: it is shown a proof of the token for the one call ([`dunlin_model::proof`]), never the token.

use crate::api::{Entrance, MAX_BODY_BYTES, NoFault, Requests, answered, authorize, bearer, of_owners};
use crate::failure::Failure;
use crate::now_ms;
use crate::owners::Owners;
use crate::tokens::verified;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use dunlin_api::wire::VersionInfo;
use dunlin_api::{ErrorCode, HostApi};
use dunlin_cluster::{SeeDetail, View};
use dunlin_model::token::{Capability, key_of_text};
use dunlin_model::{HostId, OrgName, Region};
use ed25519_dalek::VerifyingKey;
use http::Method;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Another host, asked for the bearer of this token, if its address is known.
pub type ReachFor = Arc<dyn Fn(&HostId, &Arc<str>) -> Option<Arc<dyn HostApi>> + Send + Sync>;

/// What a member has in control's place.
pub struct WithoutControl {
    pub view: View,
    /// Of this host.
    pub region: Region,
    pub see_detail: SeeDetail,
    pub host: Arc<dyn HostApi>,
    pub reach: ReachFor,
    pub org: OrgName,
    /// Of this server.
    pub version: VersionInfo,
    pub stop: CancellationToken,
}

/// Why control cannot be asked: whoever routes a request here puts it among the request's extensions.
#[derive(Debug, Clone)]
pub struct Away {
    pub control: HostId,
    pub why: String,
}

/// By which key tokens are checked, as control has last told its members.
pub fn token_key(view: &View) -> Option<VerifyingKey> {
    key_of_text(&view.current().config.platform.as_ref()?.token_key)
}

impl WithoutControl {
    /// For root on this host: without a token it commands the machines of this host.
    pub fn root_router(self: &Arc<Self>) -> Router {
        self.router(Entrance::Root)
    }

    /// For everybody else, by token.
    pub fn edge_router(self: &Arc<Self>) -> Router {
        self.router(Entrance::Edge)
    }

    fn router(self: &Arc<Self>, entrance: Entrance) -> Router {
        let router = of_owners().into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods));
        let door = Arc::new(Door { member: Arc::clone(self), entrance, requests: Requests::default() });
        router
            .fallback(only_control)
            .method_not_allowed_fallback(only_control)
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .layer(from_fn_with_state(door, outermost))
    }

    fn verify(&self, token: &str) -> Result<Capability, Failure> {
        let key = token_key(&self.view).ok_or_else(|| {
            Failure::new(ErrorCode::Unavailable, "this host has not heard yet by which key tokens are checked")
                .hint("try again once control was there, or on another server of the cluster")
        })?;
        let view = self.view.current();
        verified(token, &key, |id| view.config.revoked_tokens.iter().any(|revoked| revoked == id), now_ms())
    }
}

struct Door {
    member: Arc<WithoutControl>,
    entrance: Entrance,
    requests: Requests,
}

async fn outermost(State(door): State<Arc<Door>>, request: Request, next: Next) -> Response {
    let member = &door.member;
    // Root that sends a token is taken for who has it, and so gets at other hosts.
    let token = bearer(request.headers()).ok().map(Arc::<str>::from);
    let entrance = if token.is_some() { Entrance::Edge } else { door.entrance };
    let caller = authorize(&member.org, entrance, &request, |token| member.verify(token));
    let caller = caller.map(|caller| (caller, Owners::Member(Arc::clone(member), token)));
    answered(caller, request, next, &door.requests).await
}

async fn only_control(method: Method, away: Option<Extension<Away>>, request: Request) -> Response {
    let path = request.uri().path();
    let (control, why) = match away {
        Some(Extension(Away { control, why })) => (format!("control, which runs on host {control},"), why),
        None => ("control".to_owned(), "it is away".to_owned()),
    };
    let failure = Failure::new(ErrorCode::Unavailable, format!("{method} {path} is for control alone, and {control} cannot be asked from here: {why}"))
        .hint(
            "apps on all hosts go on meanwhile, and so do machine start, stop, restart, suspend and exec, ssh, logs, status and lists, at any server of the \
             cluster. Bring control's host back, or restore control from its backup on another one with `dunlin control restore`",
        );
    let mut response = failure.into_response();
    response.extensions_mut().insert(NoFault);
    response
}

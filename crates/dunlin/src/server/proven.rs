//! Calls to hosts for somebody: what a member shows of its caller's token, and how a host judges it.

use dunlin_api::Refusal;
use dunlin_api::remote::{Bearer, Judge, Right};
use dunlin_cluster::View;
use dunlin_control::token_key;
use dunlin_model::proof::Proof;
use dunlin_model::token::TokenError;
use std::sync::Arc;

/// Shows other hosts that `token` allows a call.
pub fn bearer(view: View, token: Arc<str>) -> Bearer {
    Arc::new(move |call| Proof::of(&token, &token_key(&view).ok_or(TokenError::BadSignature)?, call))
}

/// Judges by what control has told this host: the key of tokens, those that were revoked, and whose a machine is.
pub fn judge(view: View) -> Judge {
    Arc::new(move |proof, call, right| {
        let refuse = |why: String| Err(Refusal::Forbidden(why));
        let Some(key) = token_key(&view) else { return refuse("this host has not heard yet by which key tokens are checked".into()) };
        let capability = proof.verify(&key, call, super::now_ms()).map_err(|error| Refusal::Forbidden(error.to_string()))?;
        let (view, Right { verb, app, machine }) = (view.current(), right);
        if view.config.revoked_tokens.contains(&capability.id) {
            return refuse(format!("the token {} was revoked", capability.id));
        }
        let of_machine = |id| {
            let assigned = view.config.machines.get(id).map(|row| &row.spec.app);
            assigned.or_else(|| view.machines.get(id).map(|fact| &fact.app))
        };
        let owner = match machine {
            Some(id) => Some(of_machine(id).ok_or_else(|| Refusal::NoSuchMachine(id.clone()))?),
            None => None,
        };
        let (named, owner) = (app.as_ref().or(owner), owner.or(app.as_ref()));
        let (Some(app), true) = (named, named == owner) else { return refuse("the machine is of another app".into()) };
        let Some(fact) = view.config.apps.get(app) else { return refuse(format!("there is no app {app}, as far as this host has heard")) };
        if !capability.allows(*verb, &fact.org, Some(app)) {
            return refuse(format!("the token {} does not allow {} on app {app}", capability.id, format!("{verb:?}").to_lowercase()));
        }
        Ok(())
    })
}

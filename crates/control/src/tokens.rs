//! Tokens: made and signed here, verified offline, revoked by a row.

use crate::failure::Failure;
use crate::keys::random;
use dunlin_api::ErrorCode;
use dunlin_model::token::{Capability, TokenError, Verb};
use dunlin_model::{AppName, OrgName};
use ed25519_dalek::{SigningKey, VerifyingKey};
use std::collections::BTreeSet;
use std::sync::RwLock;

/// A year: longer-lived tokens are forgotten ones.
pub(crate) const MAX_LIFETIME_S: u64 = 366 * 24 * 3600;
/// A capability that names more apps should name none, and so cover all.
pub(crate) const MAX_APPS: usize = 64;

/// Signs and verifies; knows which ids are revoked.
pub(crate) struct Tokens {
    key: SigningKey,
    verifying: VerifyingKey,
    revoked: RwLock<BTreeSet<String>>,
}

impl Tokens {
    pub fn new(key: SigningKey) -> Self {
        Self { verifying: key.verifying_key(), key, revoked: RwLock::default() }
    }

    /// Adds to those that are revoked. Never takes one back: whoever lists the rows may have begun before a revocation
    /// that was answered since.
    pub fn revoke(&self, ids: impl IntoIterator<Item = String>) {
        self.revoked.write().unwrap_or_else(|e| e.into_inner()).extend(ids);
    }

    /// (id, token) of a new capability.
    pub fn create(
        &self,
        org: &OrgName,
        apps: Option<Vec<AppName>>,
        verbs: Vec<Verb>,
        expires_at_ms: u64,
    ) -> (String, String) {
        let id: String = random::<8>().iter().map(|byte| format!("{byte:02x}")).collect();
        let capability = Capability { id: id.clone(), org: org.clone(), apps, verbs, expires_at_ms };
        let token = capability.sign(&self.key);
        (id, token)
    }

    /// By which others check tokens.
    pub fn public_key(&self) -> VerifyingKey {
        self.verifying
    }

    /// The capability of a token, or why it gives none.
    pub fn verify(&self, token: &str, now_ms: u64) -> Result<Capability, Failure> {
        let is_revoked = |id: &str| self.revoked.read().unwrap_or_else(|e| e.into_inner()).contains(id);
        verified(token, &self.verifying, is_revoked, now_ms)
    }
}

/// The same with what is known elsewhere.
pub(crate) fn verified(token: &str, key: &VerifyingKey, is_revoked: impl Fn(&str) -> bool, now_ms: u64) -> Result<Capability, Failure> {
    let refuse = |why: String, hint: &str| Failure::new(ErrorCode::Unauthorized, why).hint(hint);
    const NEW: &str = "make a new one on the server with `dunlin tokens create`";
    let capability = Capability::verify(token, key, now_ms).map_err(|error| {
        let hint = match error {
            TokenError::Malformed => "send `Authorization: Bearer dunlin_v1...`",
            TokenError::BadSignature => "is this token from another server? make one here with `dunlin tokens create`",
            TokenError::Expired => NEW,
        };
        refuse(error.to_string(), hint)
    })?;
    if is_revoked(&capability.id) {
        return Err(refuse(format!("the token {} was revoked", capability.id), NEW));
    }
    Ok(capability)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_token_says_why() {
        let tokens = Tokens::new(SigningKey::from_bytes(&[1; 32]));
        let foreign = Tokens::new(SigningKey::from_bytes(&[2; 32]));
        let org: OrgName = "personal".parse().unwrap();
        let (id, token) = tokens.create(&org, None, vec![Verb::Read], 100);
        assert_eq!(tokens.verify(&token, 99).unwrap().id, id);
        let why = |tokens: &Tokens, token: &str, now_ms| tokens.verify(token, now_ms).unwrap_err().message;
        assert_eq!(why(&tokens, &token, 100), "the token has expired");
        assert_eq!(why(&foreign, &token, 0), "the token was not signed by this cluster");
        assert_eq!(why(&tokens, "abc", 0), "this is not a Dunlin token");
        tokens.revoke([id.clone()]);
        tokens.revoke([]); // a list from before
        assert_eq!(why(&tokens, &token, 0), format!("the token {id} was revoked"));
    }
}

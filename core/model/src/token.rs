//! Tokens: signed capabilities, verified offline. `dunlin_v1.<payload base64url>.<signature base64url>`.

use crate::{AppName, OrgName};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use serde::{Deserialize, Serialize};

const PREFIX: &str = "dunlin_v1";
/// Longer tokens are refused before they are decoded.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// What the bearer may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Random, so that one token can be revoked.
    pub id: String,
    pub org: OrgName,
    /// `None` = every app of the organization.
    pub apps: Option<Vec<AppName>>,
    pub verbs: Vec<Verb>,
    pub expires_at_ms: u64,
}

/// Exec has a verb of its own: reading or deploying an app does not open a shell in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    Read,
    Deploy,
    Admin,
    Exec,
    Pull,
    Push,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a Dunlin token")]
    Malformed,
    #[error("the token was not signed by this cluster")]
    BadSignature,
    #[error("the token has expired")]
    Expired,
}

impl Capability {
    /// Whether it covers `verb` on `app`; `None` asks about the organization itself.
    pub fn allows(&self, verb: Verb, org: &OrgName, app: Option<&AppName>) -> bool {
        let app_covered = match (&self.apps, app) {
            (None, _) => true,
            (Some(apps), Some(app)) => apps.contains(app),
            (Some(_), None) => false,
        };
        *org == self.org && app_covered && self.verbs.contains(&verb)
    }

    pub fn sign(&self, key: &SigningKey) -> String {
        let payload = BASE64.encode(serde_json::to_vec(self).expect("a capability is plain data"));
        let signed = format!("{PREFIX}.{payload}");
        let signature = BASE64.encode(key.sign(signed.as_bytes()).to_bytes());
        format!("{signed}.{signature}")
    }

    /// The capability of `token`, if `key` signed it and it has not expired.
    pub fn verify(token: &str, key: &VerifyingKey, now_ms: u64) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = parts(token)?;
        key.verify(signed.as_bytes(), &signature).map_err(|_| TokenError::BadSignature)?;
        Self::said(signed, now_ms)
    }

    /// What the signed half of a token says, if it has not expired. Whether it was signed is the caller's to know.
    pub(crate) fn said(signed: &str, now_ms: u64) -> Result<Self, TokenError> {
        let payload = signed.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.'));
        let payload = BASE64.decode(payload.ok_or(TokenError::Malformed)?).map_err(|_| TokenError::Malformed)?;
        let capability: Self = serde_json::from_slice(&payload).map_err(|_| TokenError::Malformed)?;
        if now_ms >= capability.expires_at_ms {
            return Err(TokenError::Expired);
        }
        Ok(capability)
    }
}

/// A public key of tokens, as others are told it.
pub fn key_text(key: &VerifyingKey) -> String {
    BASE64.encode(key.as_bytes())
}

/// The counterpart of [`key_text`].
pub fn key_of_text(text: &str) -> Option<VerifyingKey> {
    VerifyingKey::from_bytes(&BASE64.decode(text).ok()?.try_into().ok()?).ok()
}

/// What is signed of a token, and the signature.
pub(crate) fn parts(token: &str) -> Result<(&str, Signature), TokenError> {
    let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
    if !signed.starts_with(PREFIX) {
        return Err(TokenError::Malformed);
    }
    let signature = BASE64.decode(signature).map_err(|_| TokenError::Malformed)?;
    Ok((signed, Signature::from_slice(&signature).map_err(|_| TokenError::Malformed)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability() -> Capability {
        Capability {
            id: "t1".into(),
            org: "personal".parse().unwrap(),
            apps: Some(vec!["web".parse().unwrap()]),
            verbs: vec![Verb::Read, Verb::Pull],
            expires_at_ms: 2_000,
        }
    }

    #[test]
    fn a_token_carries_its_capability() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let token = capability().sign(&key);
        assert_eq!(Capability::verify(&token, &key.verifying_key(), 1_999).unwrap(), capability());
        assert_eq!(Capability::verify(&token, &key.verifying_key(), 2_000), Err(TokenError::Expired));
    }

    #[test]
    fn an_altered_or_foreign_token_is_refused() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let other = SigningKey::from_bytes(&[2; 32]);
        let token = capability().sign(&key);
        assert_eq!(
            Capability::verify(&token, &other.verifying_key(), 0),
            Err(TokenError::BadSignature)
        );
        for i in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(Capability::verify(&changed, &key.verifying_key(), 0).is_err(), "byte {i}");
        }
    }

    #[test]
    fn it_allows_no_more_than_it_says() {
        let org: OrgName = "personal".parse().unwrap();
        let web: AppName = "web".parse().unwrap();
        let api: AppName = "api".parse().unwrap();
        let c = capability();
        assert!(c.allows(Verb::Read, &org, Some(&web)));
        assert!(!c.allows(Verb::Exec, &org, Some(&web)));
        assert!(!c.allows(Verb::Read, &org, Some(&api)));
        assert!(!c.allows(Verb::Read, &org, None));
        assert!(!c.allows(Verb::Read, &"other".parse().unwrap(), Some(&web)));
    }
}

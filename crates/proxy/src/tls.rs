//! Certificates by server name, swapped whole while connections go on.

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::HashMap;
use std::sync::Arc;

/// One certificate to serve.
#[derive(Clone)]
pub struct CertSource {
    /// Leaf first.
    pub chain_pem: String,
    pub key_pem: String,
    /// Host names, `*.` for one label.
    pub names: Vec<String>,
}

/// Which certificate answers which name. The first source also answers unknown names and no name.
#[derive(Default)]
pub struct CertStore {
    exact: HashMap<String, Arc<CertifiedKey>>,
    /// By the name below the asterisk.
    wildcard: HashMap<String, Arc<CertifiedKey>>,
    default: Option<Arc<CertifiedKey>>,
}

#[derive(Debug, thiserror::Error)]
pub enum CertError {
    #[error("the certificate of {name} is not readable PEM")]
    Chain {
        name: String,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("the certificate of {name} is empty: its PEM has no CERTIFICATE block")]
    Empty { name: String },
    #[error("the key of the certificate of {name} is not readable PEM")]
    Key {
        name: String,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("the certificate of {name} cannot be served: its key is of no supported kind, or is another one's")]
    Mismatch {
        name: String,
        #[source]
        source: rustls::Error,
    },
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

impl CertStore {
    /// Serves nothing: every TLS handshake fails.
    pub fn empty() -> Self {
        Self::default()
    }

    pub fn build(sources: &[CertSource]) -> Result<Self, CertError> {
        let mut store = Self::default();
        for source in sources {
            let key = Arc::new(certified(source)?);
            store.default.get_or_insert_with(|| key.clone());
            for name in &source.names {
                let name = name.to_ascii_lowercase();
                match name.strip_prefix("*.") {
                    Some(parent) => store.wildcard.insert(parent.to_owned(), key.clone()),
                    None => store.exact.insert(name, key.clone()),
                };
            }
        }
        Ok(store)
    }

    fn find(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let found = name.and_then(|name| {
            self.exact.get(name).or_else(|| self.wildcard.get(name.split_once('.')?.1))
        });
        found.or(self.default.as_ref()).cloned()
    }
}

fn certified(source: &CertSource) -> Result<CertifiedKey, CertError> {
    let name = || source.names.first().cloned().unwrap_or_else(|| "no name".into());
    let chain = CertificateDer::pem_slice_iter(source.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| CertError::Chain { name: name(), source })?;
    if chain.is_empty() {
        return Err(CertError::Empty { name: name() });
    }
    let key = PrivateKeyDer::from_pem_slice(source.key_pem.as_bytes())
        .map_err(|source| CertError::Key { name: name(), source })?;
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .map_err(|source| CertError::Mismatch { name: name(), source })
}

pub(crate) struct Resolver(pub Arc<ArcSwap<CertStore>>);

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        self.0.load().find(name.as_deref())
    }
}

/// One configuration for all cores, so that a session resumes on any of them.
pub(crate) fn server_config(certs: Arc<ArcSwap<CertStore>>) -> Result<Arc<ServerConfig>, CertError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(CertError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Resolver(certs)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(CertError::Setup)?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(names: &[&str]) -> CertSource {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names.clone()).unwrap();
        CertSource { chain_pem: made.cert.pem(), key_pem: made.signing_key.serialize_pem(), names }
    }

    #[test]
    fn exact_names_win_over_wildcards_and_the_first_serves_the_rest() {
        let sources = [source(&["localhost"]), source(&["*.localhost"]), source(&["web.localhost"])];
        let store = CertStore::build(&sources).unwrap();
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        for (name, expected) in [
            (Some("localhost"), 0),
            (Some("web.localhost"), 2),
            (Some("api.localhost"), 1),
            (Some("a.b.localhost"), 0),
            (Some("example.org"), 0),
            (None, 0),
        ] {
            assert_eq!(store.find(name).unwrap().cert[0], der(&sources[expected].chain_pem), "{name:?}");
        }
        assert!(CertStore::empty().find(None).is_none());
    }

    #[test]
    fn a_foreign_key_is_refused() {
        let (mut one, other) = (source(&["one"]), source(&["other"]));
        one.key_pem = other.key_pem;
        assert!(matches!(CertStore::build(&[one]), Err(CertError::Mismatch { .. })));
    }
}

//! From certificates in the view to certificates that the edge serves.

use arc_swap::ArcSwap;
use dunlin_cluster::View;
use dunlin_model::HostId;
use dunlin_model::seal::OpeningKey;
use dunlin_proxy::{CertSource, CertStore};
use dunlin_view::{CertificateFact, Snapshot};
use std::sync::Arc;
use zeroize::Zeroizing;

/// The certificates that the edge serves now.
pub struct Served {
    host: HostId,
    key: OpeningKey,
    store: Arc<ArcSwap<CertStore>>,
    facts: Vec<CertificateFact>,
}

impl Served {
    pub fn new(host: HostId, key: OpeningKey, store: Arc<ArcSwap<CertStore>>) -> Self {
        Self { host, key, store, facts: Vec::new() }
    }

    /// Swaps other certificates in. One that cannot be used is left out and told of; the others are served.
    pub fn update(&mut self, snapshot: &Snapshot) {
        if snapshot.config.certificates.iter().eq(&self.facts) {
            return;
        }
        self.facts = snapshot.config.certificates.iter().cloned().collect();
        let sources: Vec<CertSource> = self.facts.iter().filter_map(|fact| open(fact, &self.host, &self.key)).collect();
        match CertStore::build(&sources) {
            Ok(built) => self.store.store(Arc::new(built)),
            Err(error) => tracing::error!(error = %chain(&error), "new certificates cannot be served; the old ones stay"),
        }
    }

    /// Goes on with every change of the view.
    pub async fn follow(mut self, view: View) {
        let mut changes = view.subscribe();
        self.update(&changes.current());
        loop {
            let snapshot = changes.changed().await;
            self.update(&snapshot);
        }
    }
}

fn open(fact: &CertificateFact, host: &HostId, key: &OpeningKey) -> Option<CertSource> {
    let context = format!("certificate/{}", fact.names.first()?);
    let sealed = match fact.sealed.get(host) {
        Some(sealed) => sealed,
        None if fact.sealed.is_empty() => &fact.sealed_key, // of before there were other hosts
        None => {
            tracing::info!(name = context, "the certificate's key is not sealed to this host yet");
            return None;
        }
    };
    let opened = key.open(&context, sealed).map_err(|error| {
        tracing::error!(name = context, %error, "a certificate's key cannot be opened; is this another host's data?");
    });
    let key_pem = Zeroizing::new(String::from_utf8_lossy(&opened.ok()?).into_owned());
    let source = CertSource { chain_pem: fact.chain_pem.clone(), key_pem: key_pem.to_string(), names: fact.names.clone() };
    match CertStore::build(std::slice::from_ref(&source)) {
        Ok(_) => Some(source),
        Err(error) => {
            tracing::error!(name = context, error = %chain(&error), "a certificate cannot be served");
            None
        }
    }
}

/// Whether the edge can answer over TLS.
pub fn ready(view: View) -> Box<dyn Fn() -> Result<(), String> + Send + Sync> {
    Box::new(move || match view.current().config.certificates.is_empty() {
        true => Err("the edge has no certificate yet".into()),
        false => Ok(()),
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

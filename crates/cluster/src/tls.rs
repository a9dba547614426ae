//! Mutual TLS between hosts: who shows what, and who is believed.
//!
//! A host shows its certificate and the authority's. It believes a certificate of the authority for one name under
//! `hosts.dunlin.internal`, unless that host was removed. Sessions are never resumed: a removed host would come back with one.

use crate::authority::{HOSTS_DOMAIN, Issued, tls_name};
use crate::member::MemberKeys;
use arc_swap::ArcSwap;
use dunlin_model::HostId;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature, verify_tls13_signature_with_raw_key};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// What both sides speak over QUIC.
pub(crate) const ALPN: &[u8] = b"dunlin/1";
/// What both sides speak when a joining host is dialed back: no member answers to it.
const JOINING_ALPN: &[u8] = b"dunlin-joining/1";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the {0} of this host cannot be read: restore member.json from a backup, or let the host leave and join anew")]
    Unreadable(&'static str),
    #[error("the certificate of this host is for {found}, not for {expected}")]
    WrongName { expected: HostId, found: String },
    #[error("the certificate of this host is for another key than the one that it has")]
    WrongKey,
    #[error("a new certificate comes from another authority than the cluster's: the host must join anew to change it")]
    WrongAuthority,
    #[error("TLS between hosts cannot be set up")]
    Setup(#[from] Error),
    #[error("the authority's certificate cannot be used to verify others")]
    Verifier(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The configurations of one host. What it shows can be renewed, and whom it refuses grows, while they are in use.
pub(crate) struct Tls {
    host: HostId,
    ca: CertificateDer<'static>,
    shown: Arc<Shown>,
    removed: Arc<Removed>,
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
    /// Clients may come without a certificate, to join.
    pub quic_server: Arc<ServerConfig>,
    pub quic_client: Arc<ClientConfig>,
    /// Believes any host of the cluster, whatever name was asked for; the caller looks who it is.
    pub quic_client_of_any: Arc<ClientConfig>,
}

impl Tls {
    pub fn new(host: &HostId, keys: &MemberKeys, issued: &Issued) -> Result<Self, TlsError> {
        let ca = certificate(&issued.ca_pem, "authority's certificate")?;
        let shown = Arc::new(Shown(ArcSwap::from_pointee(shown(host, keys, issued, &ca)?)));
        let removed = Arc::new(Removed::default());
        let roots = roots(&ca)?;
        let server_side = |may_be_unknown| server_config(&roots, &removed, &shown, may_be_unknown);
        let client_side = |any| client_config(&roots, &removed, &shown, any);
        let over_quic = |mut config: ClientConfig| {
            config.alpn_protocols = vec![ALPN.to_vec()];
            Arc::new(config)
        };
        let mut quic_server = server_side(Unknown::MayJoin)?;
        quic_server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            host: host.clone(),
            server: Arc::new(server_side(Unknown::Refused)?),
            client: Arc::new(client_side(Name::AsAsked)?),
            quic_server: Arc::new(quic_server),
            quic_client: over_quic(client_side(Name::AsAsked)?),
            quic_client_of_any: over_quic(client_side(Name::AnyHost)?),
            ca,
            shown,
            removed,
        })
    }

    /// Later handshakes show the new certificate.
    pub fn renew(&self, keys: &MemberKeys, issued: &Issued) -> Result<(), TlsError> {
        if certificate(&issued.ca_pem, "authority's certificate")? != self.ca {
            return Err(TlsError::WrongAuthority);
        }
        self.shown.0.store(Arc::new(shown(&self.host, keys, issued, &self.ca)?));
        Ok(())
    }

    /// From now on they are refused in both directions.
    pub fn refuse(&self, removed: BTreeSet<HostId>) {
        self.removed.0.store(Arc::new(removed));
    }

    pub fn is_removed(&self, host: &HostId) -> bool {
        self.removed.0.load().contains(host)
    }
}

/// The name under which a host is asked for.
pub(crate) fn server_name(host: &HostId) -> ServerName<'static> {
    ServerName::try_from(tls_name(host)).expect("a host's id is a DNS label")
}

/// The host that a chain speaks for. Says nothing of whether the chain is to be believed.
pub(crate) fn peer_host(certificates: &[CertificateDer<'_>]) -> Option<HostId> {
    let certificate = webpki::EndEntityCert::try_from(certificates.first()?).ok()?;
    let mut names = certificate.valid_dns_names();
    let (name, others) = (names.next()?, names.count());
    let host = name.strip_suffix(HOSTS_DOMAIN)?.strip_suffix('.')?;
    (others == 0).then(|| host.parse().ok()).flatten()
}

fn certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, TlsError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| TlsError::Unreadable(what))
}

fn shown(host: &HostId, keys: &MemberKeys, issued: &Issued, ca: &CertificateDer<'static>) -> Result<CertifiedKey, TlsError> {
    let leaf = certificate(&issued.certificate_pem, "certificate")?;
    let name = peer_host(std::slice::from_ref(&leaf));
    if name.as_ref() != Some(host) {
        let found = name.map_or("no host".into(), |name| name.to_string());
        return Err(TlsError::WrongName { expected: host.clone(), found });
    }
    let shown = CertifiedKey::new(vec![leaf, ca.clone()], private_key(keys)?);
    shown.keys_match().map_err(|_| TlsError::WrongKey)?;
    Ok(shown)
}

fn private_key(keys: &MemberKeys) -> Result<Arc<dyn SigningKey>, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(keys.tls_pem().as_bytes()).map_err(|_| TlsError::Unreadable("private key for TLS"))?;
    Ok(provider().key_provider.load_private_key(key)?)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(Arc::new(roots))
}

#[derive(Clone, Copy)]
enum Unknown {
    MayJoin,
    Refused,
}

#[derive(Debug, Clone, Copy)]
enum Name {
    AsAsked,
    AnyHost,
}

fn server_config(roots: &Arc<RootCertStore>, removed: &Arc<Removed>, shown: &Arc<Shown>, unknown: Unknown) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
    let verifier = match unknown {
        Unknown::MayJoin => verifier.allow_unauthenticated(),
        Unknown::Refused => verifier,
    };
    let inner = verifier.build().map_err(|error| TlsError::Verifier(error.into()))?;
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let verifier = Arc::new(OfClients { inner, removed: removed.clone() });
    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(shown.clone());
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn client_config(roots: &Arc<RootCertStore>, removed: &Arc<Removed>, shown: &Arc<Shown>, name: Name) -> Result<ClientConfig, TlsError> {
    let inner = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider()).build();
    let inner = inner.map_err(|error| TlsError::Verifier(error.into()))?;
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let verifier = Arc::new(OfServers { inner, removed: removed.clone(), name });
    let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_client_cert_resolver(shown.clone());
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// What this host shows in handshakes.
struct Shown(ArcSwap<CertifiedKey>);

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl rustls::client::ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Hosts that are gone for good, though their certificates are valid for some time.
#[derive(Debug, Default)]
struct Removed(ArcSwap<BTreeSet<HostId>>);

impl Removed {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<HostId, Error> {
        let host = peer_host(std::slice::from_ref(certificate)).ok_or(CertificateError::NotValidForName)?;
        if self.0.load().contains(&host) { Err(CertificateError::Revoked.into()) } else { Ok(host) }
    }
}

#[derive(Debug)]
struct OfClients {
    inner: Arc<dyn ClientCertVerifier>,
    removed: Arc<Removed>,
}

impl ClientCertVerifier for OfClients {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(&self, end: &CertificateDer<'_>, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end, chain, now)?;
        self.removed.check(end).map(|_| verified)
    }

    fn verify_tls12_signature(&self, message: &[u8], certificate: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(&self, message: &[u8], certificate: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct OfServers {
    inner: Arc<WebPkiServerVerifier>,
    removed: Arc<Removed>,
    name: Name,
}

impl ServerCertVerifier for OfServers {
    fn verify_server_cert(&self, end: &CertificateDer<'_>, chain: &[CertificateDer<'_>], name: &ServerName<'_>, ocsp: &[u8], now: UnixTime) -> Result<ServerCertVerified, Error> {
        let host = self.removed.check(end)?;
        match self.name {
            Name::AsAsked => self.inner.verify_server_cert(end, chain, name, ocsp, now),
            Name::AnyHost => self.inner.verify_server_cert(end, chain, &server_name(&host), ocsp, now),
        }
    }

    fn verify_tls12_signature(&self, message: &[u8], certificate: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(&self, message: &[u8], certificate: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Of a host that has no certificate yet: it believes the authority whose fingerprint its token has, and whom that vouches for.
pub(crate) fn to_join(ca_sha256: [u8; 32]) -> Result<ClientConfig, Error> {
    without_certificate(Arc::new(ByFingerprint { ca_sha256, provider: provider() }), ALPN)
}

/// Of whoever shows nothing in return.
fn without_certificate(verifier: Arc<dyn ServerCertVerifier>, alpn: &[u8]) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

#[derive(Debug)]
struct ByFingerprint {
    ca_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByFingerprint {
    fn verify_server_cert(&self, end: &CertificateDer<'_>, chain: &[CertificateDer<'_>], _: &ServerName<'_>, ocsp: &[u8], now: UnixTime) -> Result<ServerCertVerified, Error> {
        let is_it = |ca: &&CertificateDer<'_>| Sha256::digest(ca.as_ref()).as_slice() == self.ca_sha256;
        let ca = chain.iter().find(is_it).ok_or(CertificateError::UnknownIssuer)?;
        let host = peer_host(std::slice::from_ref(end)).ok_or(CertificateError::NotValidForName)?;
        let roots = roots(&ca.clone().into_owned())?;
        let inner = WebPkiServerVerifier::builder_with_provider(roots, self.provider.clone()).build();
        let inner = inner.map_err(|_| CertificateError::UnknownIssuer)?;
        inner.verify_server_cert(end, chain, &server_name(&host), ocsp, now)
    }

    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("hosts speak TLS 1.3".into()))
    }

    fn verify_tls13_signature(&self, message: &[u8], certificate: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Of a host that is dialed back while it joins: it shows its key, for which there is no certificate yet.
pub(crate) fn of_joining(keys: &MemberKeys) -> Result<ServerConfig, TlsError> {
    let key = private_key(keys)?;
    let public = key.public_key().ok_or(TlsError::Unreadable("private key for TLS"))?;
    let public = CertificateDer::from(public.to_vec());
    let shown = AlwaysResolvesServerRawPublicKeys::new(Arc::new(CertifiedKey::new(vec![public], key)));
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::new(shown));
    config.alpn_protocols = vec![JOINING_ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// Its counterpart: believes whoever has the private half of this key (SubjectPublicKeyInfo, DER), and nobody else.
pub(crate) fn to_joining(key: Vec<u8>) -> Result<ClientConfig, Error> {
    without_certificate(Arc::new(ByKey { key, provider: provider() }), JOINING_ALPN)
}

#[derive(Debug)]
struct ByKey {
    key: Vec<u8>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByKey {
    fn verify_server_cert(&self, end: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: &ServerName<'_>, _: &[u8], _: UnixTime) -> Result<ServerCertVerified, Error> {
        match end.as_ref() == self.key {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("hosts speak TLS 1.3".into()))
    }

    fn verify_tls13_signature(&self, message: &[u8], key: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

//! Which certificates a check takes: those that this host's authorities vouch for, or any where its owner says so.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

/// Made once for each process: a host whose authorities change is started again.
pub fn client(skip_verify: bool) -> Arc<ClientConfig> {
    static ANY: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    static OF_THE_SYSTEM: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = match skip_verify {
        true => ANY.get_or_init(|| Arc::new(any())),
        false => OF_THE_SYSTEM.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Arc::new(verified(roots))
        }),
    };
    config.clone()
}

/// Whom a certificate has to name: `name`, or else the address.
pub fn server_name(name: Option<&str>, address: IpAddr) -> Result<ServerName<'static>, InvalidDnsNameError> {
    match name {
        Some(name) => ServerName::try_from(name.to_owned()),
        None => Ok(address.into()),
    }
}

/// Takes certificates that these authorities vouch for.
pub fn verified(roots: RootCertStore) -> ClientConfig {
    builder().with_root_certificates(roots).with_no_client_auth()
}

/// Takes any certificate.
pub fn any() -> ClientConfig {
    let verifier = Arc::new(NoVerification(Arc::new(rustls::crypto::aws_lc_rs::default_provider())));
    builder().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
}

fn builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.expect("the provider has the cipher suites of TLS 1.2 and 1.3")
}

/// For `tls_skip_verify`, which the app's owner asked for: it reaches the machine's own address only.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

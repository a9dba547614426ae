//! TLS to a machine that is checked.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The certificate has to name `name`, or else the address; with `skip_verify` any will do.
pub async fn connect(stream: TcpStream, address: IpAddr, name: Option<&str>, skip_verify: bool) -> Result<TlsStream<TcpStream>, String> {
    static ANY: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    // Read once: a host whose authorities change is started again.
    static OF_THE_SYSTEM: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = match skip_verify {
        true => ANY.get_or_init(|| Arc::new(any())),
        false => OF_THE_SYSTEM.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Arc::new(verified(roots))
        }),
    };
    handshake(stream, address, name, config.clone()).await
}

async fn handshake(
    stream: TcpStream,
    address: IpAddr,
    name: Option<&str>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    let server = match name {
        Some(name) => ServerName::try_from(name.to_owned()).map_err(|_| format!("TLS: {name} is no name of a server"))?,
        None => address.into(),
    };
    TlsConnector::from(config).connect(server, stream).await.map_err(|error| {
        let is_certificate = error.get_ref().and_then(|error| error.downcast_ref::<Error>());
        match is_certificate {
            Some(Error::InvalidCertificate(why)) => format!(
                "TLS: the certificate is not taken: {why:?}; set tls_server_name to whom it names, \
                 let this host trust its authority, or set tls_skip_verify = true"
            ),
            _ => format!("TLS: {error}"),
        }
    })
}

fn verified(roots: RootCertStore) -> ClientConfig {
    builder().with_root_certificates(roots).with_no_client_auth()
}

fn any() -> ClientConfig {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::ServerConfig;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// A server whose certificate names `web.internal`, and roots that have its authority.
    async fn server() -> (TcpListener, TlsAcceptor, RootCertStore) {
        let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut authority = CertificateParams::new(vec![]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let mut roots = RootCertStore::empty();
        roots.add(authority.self_signed(&authority_key).unwrap().der().clone()).unwrap();
        let params = CertificateParams::new(vec!["web.internal".into()]).unwrap();
        let certificate = params.signed_by(&key, &Issuer::from_params(&authority, &authority_key)).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TlsAcceptor::from(Arc::new(config)), roots)
    }

    #[tokio::test]
    async fn a_certificate_is_taken_from_a_known_authority_and_for_the_name() {
        let (listener, acceptor, roots) = server().await;
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move { acceptor.accept(stream).await });
            }
        });
        let check = async |config: ClientConfig, name: Option<&str>, expected: &str| {
            let stream = TcpStream::connect(address).await.unwrap();
            let said = handshake(stream, address.ip(), name, Arc::new(config)).await.err().unwrap_or_default();
            assert!(said.is_empty() == expected.is_empty() && said.contains(expected), "{name:?}: {said}");
        };
        check(verified(roots.clone()), Some("web.internal"), "").await;
        check(verified(roots.clone()), Some("other.internal"), "set tls_server_name").await;
        check(verified(roots), None, "set tls_server_name").await;
        check(verified(RootCertStore::empty()), Some("web.internal"), "UnknownIssuer").await;
        check(any(), None, "").await;
        check(any(), Some("other.internal"), "").await;
    }
}

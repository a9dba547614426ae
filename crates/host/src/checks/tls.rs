//! TLS to a machine that is checked.

use rustls::{ClientConfig, Error};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The certificate has to name `name`, or else the address; with `skip_verify` any will do.
pub async fn connect(stream: TcpStream, address: IpAddr, name: Option<&str>, skip_verify: bool) -> Result<TlsStream<TcpStream>, String> {
    handshake(stream, address, name, dunlin_runtime::tls::client(skip_verify)).await
}

async fn handshake(
    stream: TcpStream,
    address: IpAddr,
    name: Option<&str>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    let server = dunlin_runtime::tls::server_name(name, address);
    let server = server.map_err(|_| format!("TLS: {} is no name of a server", name.unwrap_or_default()))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_runtime::tls::{any, verified};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::{RootCertStore, ServerConfig};
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

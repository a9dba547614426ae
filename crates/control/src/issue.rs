//! Pure certificate making: a certificate authority of the platform's own, and leaves under it.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::time::{Duration, SystemTime};

/// Clocks of clients may be behind.
const BACKDATE: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the certificate cannot be made")]
    Make(#[from] rcgen::Error),
}

/// A certificate (PEM; for a leaf, the chain without the root) and its PKCS#8 key.
pub struct Issued {
    pub chain_pem: String,
    pub key_pem: String,
}

/// A new authority that signs server certificates only.
pub fn create_ca(name: &str, now_ms: u64, valid_for: Duration) -> Result<Issued, IssueError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, now_ms, valid_for);
    let certificate = params.self_signed(&key)?;
    Ok(Issued { chain_pem: certificate.pem(), key_pem: key.serialize_pem() })
}

/// A server certificate for `names` (wildcards allowed), signed by the authority.
pub fn issue(ca: &Issued, names: &[String], now_ms: u64, valid_for: Duration) -> Result<Issued, IssueError> {
    let issuer = Issuer::from_ca_cert_pem(&ca.chain_pem, KeyPair::from_pem(&ca.key_pem)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = common_name(names.first().map_or("dunlin", String::as_str));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, now_ms, valid_for);
    let certificate = params.signed_by(&key, &issuer)?;
    Ok(Issued { chain_pem: certificate.pem(), key_pem: key.serialize_pem() })
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, now_ms: u64, valid_for: Duration) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(now_ms);
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + valid_for).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_made_under_a_stored_authority() {
        let now_ms = 1_800_000_000_000;
        let day = Duration::from_secs(24 * 3600);
        let ca = create_ca("test authority", now_ms, 3650 * day).unwrap();
        let leaf = issue(&ca, &["localhost".into(), "*.localhost".into()], now_ms, 90 * day).unwrap();
        assert!(leaf.chain_pem.starts_with("-----BEGIN CERTIFICATE-----"));
        assert!(leaf.key_pem.contains("PRIVATE KEY"));
        assert_ne!(leaf.key_pem, ca.key_pem);
    }
}

//! The internal authority, made once, and the certificate that the edge serves, renewed before it ends.

use crate::issue::{self, Issued};
use crate::keys::{KeyError, private_dir, random, write_private};
use crate::rows::{Change, RemovedHostRow, key};
use crate::{Ctx, now_ms};
use dunlin_model::HostId;
use dunlin_model::desired::{CertificateRow, HostRow};
use dunlin_model::seal::SealingKey;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// People install the authority by hand: it lives long.
const CA_VALID_DAYS: u32 = 3650;
/// Browsers refuse leaves of more than 398 days. Edges go on for so long without control, which makes the next one after
/// a month.
const LEAF_VALID_DAYS: u32 = 397;
const RENEW_BEFORE_DAYS: u32 = LEAF_VALID_DAYS - 30;
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// Served by the edge beside the apps.
const PLATFORM_NAMES: [&str; 2] = ["api", "registry"];
/// Keeps the certificate small enough for one handshake.
const MAX_SPELLED_OUT: usize = 500;
const RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the certificate authority in {} cannot be read", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Issue(#[from] issue::IssueError),
    #[error("the certificate's key cannot be sealed to the host")]
    Seal(#[from] dunlin_model::seal::SealError),
    #[error("the certificate cannot be stored")]
    Store(#[from] crate::failure::Failure),
}

/// `<data>/ca`: `ca.pem` for everybody, `ca.key` for root.
pub(crate) struct Authority {
    dir: PathBuf,
    ca: Issued,
}

impl Authority {
    pub fn load_or_create(dir: &Path, domain: &str) -> Result<Self, CertificateError> {
        private_dir(dir)?;
        let (cert, key) = (dir.join("ca.pem"), dir.join("ca.key"));
        if key.exists() && cert.exists() {
            let read = |path: &Path| {
                std::fs::read_to_string(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })
            };
            return Ok(Self { dir: dir.to_owned(), ca: Issued { chain_pem: read(&cert)?, key_pem: read(&key)? } });
        }
        let ca = issue::create_ca(&format!("Dunlin authority of {domain}"), now_ms(), CA_VALID_DAYS * DAY)?;
        // The certificate last: without it the pair counts as missing and is made again.
        write_private(&key, ca.key_pem.as_bytes())?;
        write_private(&cert, ca.chain_pem.as_bytes())?;
        Ok(Self { dir: dir.to_owned(), ca })
    }

    pub fn certificate_path(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    pub fn certificate_pem(&self) -> &str {
        &self.ca.chain_pem
    }
}

/// Names that the edge's certificate covers. Clients take no wildcard directly below a top-level name
/// (`*.localhost`), so below such a domain every name is spelled out.
async fn names(ctx: &Ctx) -> Result<Vec<String>, CertificateError> {
    let domain = &ctx.domain;
    let mut names = vec![domain.clone(), format!("*.{domain}")];
    if !domain.contains('.') {
        names.extend(PLATFORM_NAMES.iter().map(|name| format!("{name}.{domain}")));
        let apps = ctx.state.keys("apps/").await?;
        let served = apps.iter().filter_map(|key| key.strip_prefix("apps/")).take(MAX_SPELLED_OUT);
        names.extend(served.map(|app| format!("{app}.{domain}")));
    }
    Ok(names)
}

/// Makes the certificate if there is none, if it ends soon, if the host's key is another, or if a host was removed that
/// had its key.
pub(crate) async fn ensure(ctx: &Ctx) -> Result<(), CertificateError> {
    let names = names(ctx).await?;
    let row_key = key::certificate(&ctx.domain);
    let found = ctx.state.get::<StoredCertificate>(&row_key).await?;
    let soon_ms = now_ms() + (RENEW_BEFORE_DAYS * DAY).as_millis() as u64;
    let removed = ctx.state.list::<RemovedHostRow>("removed_hosts/").await?;
    let last_removed_at_ms = removed.iter().map(|row| row.value.removed_at_ms).max();
    let is_good = |row: &StoredCertificate| {
        row.certificate.names == names
            && row.certificate.not_after_ms > soon_ms
            && row.sealed_to == ctx.host_row.public_key
            && row.authority_pem == ctx.authority.ca.chain_pem
            && row.master_sealed.is_some()
            && last_removed_at_ms.is_none_or(|at_ms| at_ms < row.issued_at_ms)
    };
    if found.as_ref().is_some_and(|row| is_good(&row.value)) {
        return Ok(());
    }
    // Not within the millisecond of a removal: the next look would take it for one of before.
    let issued_at_ms = now_ms().max(last_removed_at_ms.map_or(0, |at_ms| at_ms + 1));
    let leaf = issue::issue(&ctx.authority.ca, &names, now_ms(), LEAF_VALID_DAYS * DAY)?;
    let to = SealingKey::from_base64(&ctx.host_row.public_key)?;
    let key_pem = leaf.key_pem.as_bytes();
    let master_sealed = Some(ctx.keys.master.sealing_key().seal(&row_key, key_pem, random())?);
    let certificate = CertificateRow {
        sealed_key: to.seal(&context(&names), key_pem, random())?,
        sealed: BTreeMap::new(),
        names,
        chain_pem: leaf.chain_pem,
        not_after_ms: now_ms() + (LEAF_VALID_DAYS * DAY).as_millis() as u64,
    };
    let row = StoredCertificate {
        certificate,
        sealed_to: ctx.host_row.public_key.clone(),
        authority_pem: ctx.authority.ca.chain_pem.clone(),
        master_sealed,
        issued_at_ms,
    };
    ctx.state.commit(Change::default().if_as_read(row_key.clone(), found.as_ref()).put(row_key, &row)).await?;
    tracing::info!(domain = %ctx.domain, days = LEAF_VALID_DAYS, "certificate issued");
    Ok(())
}

/// The row, with what tells whether it must be made again.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct StoredCertificate {
    #[serde(flatten)]
    pub certificate: CertificateRow,
    sealed_to: String,
    authority_pem: String,
    /// The key, so that it can be sealed to hosts that join later; `None`: of before there were such.
    #[serde(default)]
    master_sealed: Option<String>,
    #[serde(default)]
    issued_at_ms: u64,
}

fn context(names: &[String]) -> String {
    format!("certificate/{}", names[0])
}

/// Keys of certificates as they are sealed to hosts. Sealed again only when a key is another: every publication would
/// bring all of them anew otherwise.
#[derive(Default)]
pub(crate) struct SealedCertificates(BTreeMap<(String, HostId), Sealed>);

/// What was sealed to whom, and the result.
#[derive(Clone)]
struct Sealed {
    chain_pem: String,
    host_key: String,
    sealed: String,
}

impl SealedCertificates {
    /// The certificates for all hosts: each is an edge.
    pub fn rows(&mut self, ctx: &Ctx, stored: Vec<StoredCertificate>, hosts: &[HostRow]) -> Vec<CertificateRow> {
        let mut fresh = BTreeMap::new();
        let mut rows = Vec::new();
        for row in stored {
            let name = row.certificate.names.first().cloned().unwrap_or_default();
            let mut opened = None;
            let mut sealed = BTreeMap::new();
            for host in hosts {
                let place = (name.clone(), host.id.clone());
                let is_same = |known: &Sealed| known.chain_pem == row.certificate.chain_pem && known.host_key == host.public_key;
                let known = self.0.remove(&place).filter(is_same);
                let found = known.or_else(|| {
                    let key_pem = opened.get_or_insert_with(|| open(ctx, &name, &row)).as_ref()?;
                    seal_for(&row.certificate, key_pem, host)
                });
                if let Some(found) = found {
                    sealed.insert(host.id.clone(), found.sealed.clone());
                    fresh.insert(place, found);
                }
            }
            rows.push(CertificateRow { sealed, ..row.certificate });
        }
        self.0 = fresh;
        rows
    }
}

/// `None`: its key is made anew, or the master key is another one, and that must not keep all else from being published.
fn open(ctx: &Ctx, name: &str, row: &StoredCertificate) -> Option<Zeroizing<Vec<u8>>> {
    let opened = ctx.keys.master.open(&key::certificate(name), row.master_sealed.as_ref()?);
    opened.inspect_err(|error| tracing::error!(name, %error, "a certificate's key cannot be opened: is the master key another one?")).ok()
}

fn seal_for(certificate: &CertificateRow, key_pem: &[u8], host: &HostRow) -> Option<Sealed> {
    let to = SealingKey::from_base64(&host.public_key);
    let sealed = to.and_then(|to| to.seal(&context(&certificate.names), key_pem, random()));
    let sealed = sealed.inspect_err(|error| tracing::error!(host = %host.id, %error, "a certificate's key cannot be sealed to the host"));
    Some(Sealed { chain_pem: certificate.chain_pem.clone(), host_key: host.public_key.clone(), sealed: sealed.ok()? })
}

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let mut changes = ctx.state.changes();
    loop {
        let pause = match ensure(&ctx).await {
            Ok(()) => LOOK_EVERY,
            Err(error) => {
                tracing::error!(error = %crate::failure::chain(&error), "the certificate could not be renewed");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            // A new app may need its name in the certificate.
            Ok(()) = changes.changed() => {}
            () = crate::wall::pause(pause) => {}
        }
    }
}

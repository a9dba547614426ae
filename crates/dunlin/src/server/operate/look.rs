//! How this host does, as it finds itself.

use super::{Operated, hex};
use crate::{keeper, program};
use dunlin_control::upgrade::{Answered, Look, MachineLook};
use dunlin_runtime::features::check_all;
use dunlin_view::MachineFact;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

/// The self-test makes namespaces; once in a while is enough.
const TEST_EVERY: Duration = Duration::from_secs(4);
const EDGE_WITHIN: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: u64 = 16 << 10;
/// It varies by itself, and a new binary has no part in it.
const NOT_OF_THE_BINARY: &str = "free disk";

/// What takes a while, and is kept for a moment.
#[derive(Default)]
pub struct Looked {
    tested: Mutex<Option<(Instant, BTreeSet<String>)>>,
    binary: Mutex<Option<(FileId, String)>>,
}

type FileId = (u64, u64, i64, i64);

pub async fn look(operated: &Arc<Operated>) -> Look {
    let view = operated.view.current();
    let own = view.machines.iter().filter(|(_, fact)| fact.host == operated.settings.host_id);
    let (all, failed) = operated.proxy.answers();
    Look {
        life: operated.life,
        version: format!("dunlin {} ({})", crate::VERSION, crate::COMMIT),
        sha256: sha256(operated).await.unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the server's own binary cannot be read");
            String::new()
        }),
        trial: operated.trial(),
        lacks: lacks(operated).await,
        edge: edge(operated).await.err(),
        machines: own.map(|(id, fact)| (id.clone(), of_machine(fact))).collect(),
        answered: Answered { all, failed },
    }
}

fn of_machine(fact: &MachineFact) -> MachineLook {
    let crashed = fact.exit.as_ref().filter(|exit| !exit.requested_stop && exit.exit_code != Some(0));
    MachineLook {
        state: fact.state,
        version: fact.version.clone(),
        healthy: fact.is_healthy(),
        crashed: crashed.map(|exit| exit.attempt),
    }
}

/// Of the file that the keeper starts servers from.
async fn sha256(operated: &Operated) -> anyhow::Result<String> {
    let mut known = operated.looked.binary.lock().await;
    let data = operated.settings.data_dir.clone();
    let keeper = keeper::holder(&data)?.unwrap_or_default();
    let file = File::open(program::path_of(&keeper)?)?;
    let found = file.metadata()?;
    let id = (found.dev(), found.ino(), found.mtime(), found.mtime_nsec());
    if let Some((_, digest)) = known.as_ref().filter(|(known, _)| *known == id) {
        return Ok(digest.clone());
    }
    let digest = tokio::task::spawn_blocking(move || digest_of(file)).await??;
    *known = Some((id, digest.clone()));
    Ok(digest)
}

fn digest_of(mut file: File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

/// What `dunlin doctor` misses here.
async fn lacks(operated: &Operated) -> BTreeSet<String> {
    let mut tested = operated.looked.tested.lock().await;
    if let Some((_, lacks)) = tested.as_ref().filter(|(at, _)| at.elapsed() < TEST_EVERY) {
        return lacks.clone();
    }
    let data = operated.settings.data_dir.clone();
    let found = tokio::task::spawn_blocking(move || lacking(&data)).await;
    let lacks = found.unwrap_or_else(|_| BTreeSet::from(["the self-test itself".to_owned()]));
    *tested = Some((Instant::now(), lacks.clone()));
    lacks
}

fn lacking(data: &Path) -> BTreeSet<String> {
    let checks = check_all(data).into_iter().filter(|check| !check.ok && check.name != NOT_OF_THE_BINARY);
    checks.map(|check| check.name.to_owned()).collect()
}

/// A request as anybody's: in at the listener, by name to the API, and back.
async fn edge(operated: &Operated) -> Result<(), String> {
    let http = operated.settings.http;
    let ip = if http.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { http.ip() };
    let request = format!("GET /healthz HTTP/1.1\r\nhost: api.{}\r\nconnection: close\r\n\r\n", operated.settings.domain);
    let asked = async {
        let mut stream = TcpStream::connect(SocketAddr::new(ip, http.port())).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = match tokio::time::timeout(EDGE_WITHIN, asked).await {
        Err(_) => return Err(format!("no answer within {} s", EDGE_WITHIN.as_secs())),
        Ok(answer) => answer.map_err(|error| error.to_string())?,
    };
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    match line.starts_with(b"HTTP/1.1 200") {
        true => Ok(()),
        false => Err(format!("it answered {:?}", String::from_utf8_lossy(&line[..line.len().min(80)]))),
    }
}

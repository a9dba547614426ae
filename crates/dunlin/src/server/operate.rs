//! What control asks this host's server itself: how it does, to take a new binary on trial, to keep it or to go back.
//!
//! The binary comes over the cluster in one stream, is written beside the one that runs, must have the announced digest and say
//! its version, and takes the other one's place by a rename. `host/upgrade.json` names the upgrade that it is of, the keeper's
//! `run/upgrade.json` how the trial ended.

mod collect;
mod look;

use super::fleet::Fleet;
use crate::keeper::wire::{self, Said};
use crate::{keeper, program, upgrade};
use anyhow::{Context, bail};
use dunlin_cluster::{Service, Stream, View, read_frame, write_frame};
use dunlin_control::operate::{Answer, Ask, Install, MAX_BINARY_BYTES, NoAnswer, Operate, Sending};
use dunlin_control::upgrade::{INSTALLED_WITHIN_MS, SENT_WITHIN_MS, Trial};
use dunlin_host::Host;
use dunlin_model::HostId;
use dunlin_proxy::ProxyMetrics;
use crate::settings::Settings;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAX_ASK_BYTES: usize = 64 << 10;
const MAX_ANSWER_BYTES: usize = 16 << 20;
const READ_BYTES: usize = 256 << 10;
/// Between two pieces of a binary, on either side.
const MAX_SILENCE: Duration = Duration::from_secs(30);
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
const COLLECTED_WITHIN: Duration = Duration::from_secs(60);
/// The planner ends it before, by these.
const INSTALLED_WITHIN: Duration = Duration::from_millis(INSTALLED_WITHIN_MS);
const SENT_WITHIN: Duration = Duration::from_millis(SENT_WITHIN_MS + INSTALLED_WITHIN_MS);

/// This host's server, as control sees it.
pub struct Operated {
    pub settings: Settings,
    pub view: View,
    pub host: Arc<Host>,
    pub proxy: Arc<ProxyMetrics>,
    pub keeper: UnixStream,
    /// The keeper started this server to see whether its binary is any good.
    pub is_on_trial: bool,
    pub metrics: super::SharedMetrics,
    pub fleet: Option<Fleet>,
    life: u64,
    /// Taken in this life, which ends with it.
    taken: Mutex<Option<String>>,
    installing: tokio::sync::Mutex<()>,
    looked: look::Looked,
}

/// `host/upgrade.json`: what the last binary that control gave was of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    upgrade: String,
    sha256: String,
}

pub fn record_path(data_dir: &Path) -> PathBuf {
    data_dir.join("host/upgrade.json")
}

impl Operated {
    pub fn new(
        settings: Settings,
        (view, host, proxy): (View, Arc<Host>, Arc<ProxyMetrics>),
        keeper: (UnixStream, bool),
        metrics: super::SharedMetrics,
        fleet: Option<Fleet>,
    ) -> anyhow::Result<Arc<Self>> {
        let mut life = [0; 8];
        getrandom::fill(&mut life).context("no randomness")?;
        let (keeper, is_on_trial) = keeper;
        Ok(Arc::new(Self {
            settings,
            view,
            host,
            proxy,
            keeper,
            is_on_trial,
            metrics,
            fleet,
            life: u64::from_le_bytes(life),
            taken: Mutex::default(),
            installing: tokio::sync::Mutex::default(),
            looked: look::Looked::default(),
        }))
    }

    /// Answers control over the cluster, and nobody else.
    pub fn serve(self: &Arc<Self>, fleet: &Fleet) {
        let (operated, of) = (self.clone(), fleet.clone());
        fleet.cluster.serve(Service::Operate, Arc::new(move |peer, stream| match peer {
            Some(peer) if peer == of.control() => {
                let operated = operated.clone();
                Box::pin(async move {
                    if let Err(error) = operated.exchange(stream).await {
                        tracing::debug!(%error, "a question of control's broke off");
                    }
                })
            }
            _ => Box::pin(std::future::ready(())),
        }));
    }

    async fn exchange(self: Arc<Self>, mut stream: Stream) -> std::io::Result<()> {
        let ask = tokio::time::timeout(ANSWERED_WITHIN, read_frame(&mut stream, MAX_ASK_BYTES)).await??;
        let answer = match serde_json::from_slice(&ask) {
            Ok(Ask::Version { .. }) => Err(NoAnswer::Refused("that is asked on control's own host".into())),
            Ok(ask) => self.answer(ask, &mut stream).await,
            Err(_) => Err(NoAnswer::Refused(format!("version {} of dunlin does not know what is asked", crate::VERSION))),
        };
        let answer = serde_json::to_vec(&answer).map_err(std::io::Error::other)?;
        write_frame(&mut stream, &answer).await?;
        stream.shutdown().await
    }

    async fn answer(self: &Arc<Self>, ask: Ask, body: &mut (impl AsyncRead + Unpin)) -> Result<Answer, NoAnswer> {
        let answer = match ask {
            Ask::Look => {
                self.host.recovered().await; // before that it does not know how its machines do
                Ok(Answer::Look(Box::new(look::look(self).await)))
            }
            Ask::Version { path } => {
                let said = tokio::task::spawn_blocking(move || upgrade::version_of(&path)).await;
                said.context("it could not be tried").flatten().map(Answer::Version)
            }
            Ask::Install(install) => self.install(&install, body).await.map(|()| Answer::Done),
            Ask::Keep { upgrade } => self.say_of(&upgrade, &Said::Keep).map(|()| Answer::Done),
            Ask::GoBack { upgrade, why } => self.say_of(&upgrade, &Said::GoBack(why)).map(|()| Answer::Done),
            Ask::Collect => Ok(Answer::Collected(collect::collect(self).await)),
        };
        answer.map_err(|error| NoAnswer::Refused(format!("{error:#}")))
    }

    async fn install(&self, install: &Install, body: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<()> {
        let _one_at_a_time = self.installing.lock().await;
        match self.trial() {
            trial if trial.is_on() && trial.is_of(&install.upgrade) => return Ok(()), // whoever asked first has gone
            trial if trial.is_on() => bail!("the binary of another upgrade is on trial here; it ends by itself"),
            _ => {}
        }
        let data = &self.settings.data_dir;
        let keeper = keeper::holder(data)?.context("the keeper of this server is not known")?;
        let path = program::path_of(&keeper)?;
        let new = Fetched(program::beside(&path, ".fetched"));
        fetch(install, body, &new.0).await.context("the binary did not come whole")?;
        tracing::info!(upgrade = %install.upgrade, sha256 = %install.sha256, binary = %path.display(), "control gave a new binary");
        let record = Record { upgrade: install.upgrade.clone(), sha256: install.sha256.clone() };
        let data = data.clone();
        tokio::task::spawn_blocking(move || put_in_place(&data, &path, &new.0, &record)).await.context("it was not installed")??;
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(install.upgrade.clone());
        wire::say(&self.keeper, &Said::TakeUp { word_within: Duration::from_secs(install.word_within_s) })
            .context("the keeper could not be told of the new binary")
    }

    /// Passes control's word on, if it is about the binary that is on trial here.
    fn say_of(&self, id: &str, said: &Said) -> anyhow::Result<()> {
        match self.trial() {
            trial if !trial.is_of(id) => bail!("no binary of that upgrade was taken here"),
            trial if !trial.is_on() => Ok(()), // it was said before
            _ => wire::say(&self.keeper, said).context("the keeper could not be told"),
        }
    }

    /// What became of the binary that control gave last.
    fn trial(&self) -> Trial {
        let data = &self.settings.data_dir;
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(upgrade) = taken {
            return Trial::On { upgrade };
        }
        let Some(Record { upgrade, .. }) = read_record(data) else { return Trial::None };
        match program::outcome_of(data) {
            Some(program::Outcome::Proven) => Trial::Kept { upgrade },
            Some(program::Outcome::WentBack { why }) => Trial::WentBack { upgrade, why },
            None if self.is_on_trial => Trial::On { upgrade },
            None => Trial::None, // it never came to that: whoever was to tell the keeper has ended before
        }
    }
}

/// Is gone in the end.
struct Fetched(PathBuf);

impl Drop for Fetched {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // in the way of nobody
    }
}

fn read_record(data: &Path) -> Option<Record> {
    match fs::read(record_path(data)) {
        Ok(json) => serde_json::from_slice(&json).ok(),
        Err(_) => None,
    }
}

async fn fetch(install: &Install, body: &mut (impl AsyncRead + Unpin), to: &Path) -> anyhow::Result<()> {
    if install.bytes == 0 || install.bytes > MAX_BINARY_BYTES {
        bail!("it has {} bytes, where at most {MAX_BINARY_BYTES} may be", install.bytes);
    }
    let _ = fs::remove_file(to); // of a try that was cut off; if it stays, the next line says so
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(to).with_context(|| format!("{} cannot be made", to.display()))?;
    let mut file = tokio::fs::File::from_std(file);
    let (mut hash, mut left, mut buffer) = (Sha256::new(), install.bytes, vec![0; READ_BYTES]);
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = tokio::time::timeout(MAX_SILENCE, body.read(&mut buffer[..most])).await.context("it stopped coming")??;
        if read == 0 {
            bail!("it ended {left} bytes early");
        }
        hash.update(&buffer[..read]);
        file.write_all(&buffer[..read]).await?;
        left -= read as u64;
    }
    file.sync_all().await?;
    let found = hex(&hash.finalize());
    if found != install.sha256 {
        bail!("its sha256 is {found}, and {} was announced", install.sha256);
    }
    Ok(())
}

/// What cannot even say its version takes nobody's place. The one before stays as `<path>.previous`.
fn put_in_place(data: &Path, path: &Path, new: &Path, record: &Record) -> anyhow::Result<()> {
    upgrade::version_of(new)?;
    program::forget_outcome(data)?;
    let json = serde_json::to_vec(record)?;
    let at = record_path(data);
    let written = program::beside(&at, ".new");
    fs::write(&written, json).and_then(|()| File::open(&written)?.sync_all()).and_then(|()| fs::rename(&written, &at)).context("the upgrade cannot be noted down")?;
    program::install(&File::open(new)?, path, || {
        let previous = program::beside(path, ".previous");
        match fs::remove_file(&previous) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::hard_link(path, previous)
    })?;
    Ok(())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How control asks hosts: its own in the process, others over the cluster.
pub fn operator(own: Arc<Operated>) -> Operate {
    Arc::new(move |host: HostId, ask: Ask, sending: Option<Sending>| {
        let own = own.clone();
        Box::pin(async move {
            let within = match &ask {
                Ask::Install(_) => SENT_WITHIN,
                Ask::Collect => COLLECTED_WITHIN,
                _ => ANSWERED_WITHIN,
            };
            let silent = |why: String| NoAnswer::Silent(why);
            let asked = async {
                if host == own.settings.host_id {
                    return match sending {
                        Some(sending) => ask_own(&own, ask, sending).await,
                        None => own.answer(ask, &mut tokio::io::empty()).await,
                    };
                }
                let fleet = own.fleet.as_ref().ok_or_else(|| silent("this server is in no cluster".into()))?;
                ask_over_cluster(fleet, &host, &ask, sending).await.map_err(|error| silent(error.to_string()))?
            };
            tokio::time::timeout(within, asked).await.unwrap_or_else(|_| Err(silent(format!("it did not answer within {} s", within.as_secs()))))
        })
    })
}

/// The same file over the same way as to others, so that it is counted and stopped alike.
async fn ask_own(own: &Arc<Operated>, ask: Ask, sending: Sending) -> Result<Answer, NoAnswer> {
    let mut file = tokio::fs::File::open(&sending.path).await.map_err(|error| NoAnswer::Silent(error.to_string()))?;
    let (mut near, mut far) = tokio::io::duplex(READ_BYTES);
    let send = async move {
        if let Err(error) = send(&mut file, &sending, &mut near).await {
            tracing::debug!(%error, "the binary was not taken whole");
        }
    };
    let answer = async move { own.answer(ask, &mut far).await };
    tokio::join!(send, answer).1
}

async fn ask_over_cluster(fleet: &Fleet, host: &HostId, ask: &Ask, sending: Option<Sending>) -> std::io::Result<Result<Answer, NoAnswer>> {
    let mut stream = fleet.cluster.open(host, Service::Operate).await?;
    write_frame(&mut stream, &serde_json::to_vec(ask)?).await?;
    if let Some(sending) = sending {
        let mut file = tokio::fs::File::open(&sending.path).await?;
        match send(&mut file, &sending, &mut stream).await {
            Err(error) if matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::Interrupted) => return Err(error),
            // A host that refuses stops reading; its answer says why.
            Err(error) => tracing::debug!(%host, %error, "the binary was not taken whole"),
            Ok(()) => {}
        }
    }
    let answer = tokio::time::timeout(INSTALLED_WITHIN, read_frame(&mut stream, MAX_ANSWER_BYTES)).await??;
    serde_json::from_slice(&answer).map_err(std::io::Error::other)
}

/// To the end, however slow the other side is, unless it takes nothing for long or is not to have it any more. What is counted may
/// still be on its way.
async fn send(file: &mut (impl AsyncRead + Unpin), sending: &Sending, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    use std::io::{Error, ErrorKind};
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = file.read(&mut buffer).await?;
        let mut left = &buffer[..read];
        if left.is_empty() {
            return to.flush().await;
        }
        while !left.is_empty() {
            let taken = tokio::select! {
                () = sending.stop.cancelled() => return Err(Error::new(ErrorKind::Interrupted, "the host is not to have the binary any more")),
                taken = tokio::time::timeout(MAX_SILENCE, to.write(left)) => {
                    taken.map_err(|_| Error::new(ErrorKind::TimedOut, format!("it took nothing of the binary for {} s", MAX_SILENCE.as_secs())))??
                }
            };
            if taken == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            sending.note(taken as u64);
            left = &left[taken..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use tokio::time::{Instant, sleep};

    const BYTES: usize = 1 << 20;

    /// Sends to one who takes so many bytes each second, up to an end; how that ended, what was counted and how long it took.
    async fn sent_to(a_second: usize, end: usize, stop_after: Option<Duration>) -> (Result<(), ErrorKind>, u64, Duration) {
        let (mut near, mut far) = tokio::io::duplex(1 << 10);
        let reader = tokio::spawn(async move {
            let (mut bytes, mut taken) = (vec![0; a_second], 0);
            while taken < end {
                sleep(Duration::from_secs(1)).await;
                match far.read(&mut bytes).await.unwrap() {
                    0 => return,
                    read => taken += read,
                }
            }
            std::future::pending::<()>().await; // it has gone quiet, and holds the line
        });
        let (sending, began) = (Sending::new(PathBuf::new()), Instant::now());
        if let Some(after) = stop_after {
            let stop = sending.stop.clone();
            tokio::spawn(async move {
                sleep(after).await;
                stop.cancel();
            });
        }
        let ended = send(&mut &vec![7; BYTES][..], &sending, &mut near).await.map_err(|error| error.kind());
        reader.abort();
        (ended, sending.sent(), began.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_binary_is_sent_for_as_long_as_it_moves() {
        let (ended, sent, took) = sent_to(1 << 10, usize::MAX, None).await;
        assert_eq!((ended, sent), (Ok(()), BYTES as u64));
        assert!(took > Duration::from_secs(1_000), "{took:?}");
        let (ended, sent, took) = sent_to(1 << 10, 64 << 10, None).await;
        assert_eq!(ended, Err(ErrorKind::TimedOut));
        assert!(sent < 70 << 10 && took < Duration::from_secs(110), "{sent} in {took:?}");
        let (ended, sent, took) = sent_to(1 << 10, usize::MAX, Some(Duration::from_secs(20))).await;
        assert_eq!((ended, took), (Err(ErrorKind::Interrupted), Duration::from_secs(20)));
        assert!(sent < 30 << 10, "{sent}");
    }
}

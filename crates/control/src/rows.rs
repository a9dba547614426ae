//! Desired state, typed: keys, rows, and transactions that compare before they write.
//!
//! The only module that talks to the store. A write that depends on what was read names the revision
//! it read, so that two writers never undo each other: the later one gets [`Outcome::Conflict`] and
//! reads again.

use crate::failure::Failure;
use dunlin_api::ErrorCode;
use dunlin_cluster::PublicKeys;
use dunlin_model::desired::{Ipv4Prefix, MachineRow};
use dunlin_model::{AppName, Generation, HostId, MachineId, VolumeId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use dunlin_store::{Compare as StoreCompare, Op as StoreOp, Store, StoreError};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::sync::watch;

/// A freed address rests this long, so that nobody who remembers it reaches a stranger.
pub(crate) const ADDRESS_REST_MS: u64 = 24 * 3600 * 1000;

/// A row as it was read, with the revision of its last change.
#[derive(Debug, Clone)]
pub(crate) struct Row<T> {
    pub value: T,
    pub modified: u64,
}

/// `addresses/<ip>`: who has an address, or when it was freed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AddressRow {
    pub machine: MachineId,
    #[serde(default)]
    pub freed_at_ms: Option<u64>,
}

impl AddressRow {
    pub fn is_free(&self, now_ms: u64) -> bool {
        self.freed_at_ms.is_some_and(|at_ms| now_ms >= at_ms.saturating_add(ADDRESS_REST_MS))
    }
}

/// `secrets_version/<app>`: kept when the app is destroyed, so that a version never means two things.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SecretsVersionRow {
    /// The newest.
    pub version: u64,
    /// Versions whose sets are kept: the newest, and those that a kept release or a machine names.
    #[serde(default)]
    pub sets: BTreeSet<u64>,
}

/// `secrets_sets/<app>/<version, 20 digits>`: all secrets of an app as they were in one version. Never changed: a
/// release that is returned to finds the secrets that it was made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SecretsSetRow {
    /// JSON object name -> value, sealed to the master key with the row's key as context, base64.
    pub sealed: String,
}

/// `revoked/<token id>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RevokedRow {
    pub at_ms: u64,
}

/// `host_tokens/<id>`: lets one host join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostTokenRow {
    pub secret_digest: String,
    pub expires_at_ms: u64,
    pub used_by: Option<HostId>,
}

/// `members/<host>`: what is known of a host that joined, for control alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberRow {
    /// Of its keys.
    pub epoch: u32,
    pub keys: PublicKeys,
    pub addr: SocketAddr,
    /// That it ran when it last said so.
    pub version: String,
    /// When its certificate ends, or a day before. `None`: it was issued before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certified_until_ms: Option<u64>,
}

/// `removed_hosts/<id>`: kept for ever, so that an id never means two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemovedHostRow {
    pub removed_at_ms: u64,
    pub prefix: Ipv4Prefix,
}

pub(crate) mod key {
    use super::*;

    /// The last upgrade of the fleet.
    pub const UPGRADE: &str = "upgrade";

    pub fn app(app: &AppName) -> String {
        format!("apps/{app}")
    }
    pub fn release(app: &AppName, number: u32) -> String {
        format!("releases/{app}/{number:010}")
    }
    pub fn releases(app: &AppName) -> String {
        format!("releases/{app}/")
    }
    pub fn machine(id: &MachineId) -> String {
        format!("machines/{id}")
    }
    pub fn configs(id: &MachineId) -> String {
        format!("configs/{id}")
    }
    pub fn launch(id: &MachineId) -> String {
        format!("launches/{id}")
    }
    pub fn standing_in(id: &MachineId) -> String {
        format!("standing_in/{id}")
    }
    pub fn destroyed(app: &AppName, id: &MachineId) -> String {
        format!("destroyed/{app}/{id}")
    }
    pub fn destroyed_of(app: &AppName) -> String {
        format!("destroyed/{app}/")
    }
    pub fn tombstone(id: &MachineId) -> String {
        format!("tombstones/{id}")
    }
    pub fn volume(id: &VolumeId) -> String {
        format!("volumes/{id}")
    }
    pub fn volume_tombstone(id: &VolumeId) -> String {
        format!("volume_tombstones/{id}")
    }
    pub fn secret(app: &AppName, name: &str) -> String {
        format!("secrets/{app}/{name}")
    }
    pub fn secrets(app: &AppName) -> String {
        format!("secrets/{app}/")
    }
    pub fn secrets_version(app: &AppName) -> String {
        format!("secrets_version/{app}")
    }
    pub fn secrets_set(app: &AppName, version: u64) -> String {
        format!("secrets_sets/{app}/{version:020}")
    }
    pub fn secrets_sets(app: &AppName) -> String {
        format!("secrets_sets/{app}/")
    }
    pub fn plan(app: &AppName) -> String {
        format!("plans/{app}")
    }
    pub fn progress(app: &AppName) -> String {
        format!("progress/{app}")
    }
    pub fn events(app: &AppName, release: u32) -> String {
        format!("events/{app}/{release:010}")
    }
    pub fn all_events(app: &AppName) -> String {
        format!("events/{app}/")
    }
    pub fn host(id: &HostId) -> String {
        format!("hosts/{id}")
    }
    pub fn host_token(id: &str) -> String {
        format!("host_tokens/{id}")
    }
    pub fn member(host: &HostId) -> String {
        format!("members/{host}")
    }
    pub fn removed_host(host: &HostId) -> String {
        format!("removed_hosts/{host}")
    }
    pub fn certificate(name: &str) -> String {
        format!("certificates/{name}")
    }
    pub fn address(address: Ipv4Addr) -> String {
        format!("addresses/{address}")
    }
    pub fn revoked(id: &str) -> String {
        format!("revoked/{id}")
    }
}

/// One transaction: everything compared holds and all is written, or nothing is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Change {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
}

#[derive(Debug, Clone)]
pub(crate) enum Compare {
    Absent(String),
    Unchanged(String, u64),
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Put(String, Vec<u8>),
    Delete(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed,
    /// Something compared has changed since it was read.
    Conflict,
}

impl Change {
    pub fn absent(mut self, key: String) -> Self {
        self.compare.push(Compare::Absent(key));
        self
    }

    pub fn unchanged(mut self, key: String, modified: u64) -> Self {
        self.compare.push(Compare::Unchanged(key, modified));
        self
    }

    /// Holds if the row is still what was read, missing included.
    pub fn if_as_read<T>(self, key: String, read: Option<&Row<T>>) -> Self {
        match read {
            Some(row) => self.unchanged(key, row.modified),
            None => self.absent(key),
        }
    }

    pub fn put<T: Serialize>(mut self, key: String, value: &T) -> Self {
        let json = serde_json::to_vec(value).expect("rows are plain data");
        self.then.push(Op::Put(key, json));
        self
    }

    pub fn delete(mut self, key: String) -> Self {
        self.then.push(Op::Delete(key));
        self
    }

    pub fn also(mut self, other: Change) -> Self {
        self.compare.extend(other.compare);
        self.then.extend(other.then);
        self
    }
}

/// Rows that were read and are not understood yet.
pub(crate) struct Rows(Vec<dunlin_store::Kv>);

impl Rows {
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|row| row.key.as_str())
    }

    pub fn values<T: DeserializeOwned>(self) -> Result<Vec<T>, Failure> {
        Ok(self.keyed()?.into_iter().map(|(_, row)| row.value).collect())
    }

    pub fn keyed<T: DeserializeOwned>(self) -> Result<Vec<(String, Row<T>)>, Failure> {
        let parse = |row: dunlin_store::Kv| Ok((row.key.clone(), parse(&row.key, &row.value, row.modified)?));
        self.0.into_iter().map(parse).collect()
    }

    /// Machines, with their placement filled in.
    pub fn machines(self, incarnation: u64) -> Result<Vec<MachineRow>, Failure> {
        Ok(self.keyed()?.into_iter().map(|(_, row)| placed(row, incarnation).value).collect())
    }
}

/// The store, as control sees it.
pub(crate) struct State {
    store: Store,
}

impl State {
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    pub fn incarnation(&self) -> u64 {
        self.store.incarnation()
    }

    /// Above whatever hosts have heard of; gives the new one.
    pub async fn raise_incarnation(&self) -> Result<u64, Failure> {
        self.store.raise_incarnation().await.map_err(|error| unwritable(&error))
    }

    /// Finishes what waits and releases the database.
    pub async fn close(&self) {
        self.store.clone().close().await;
    }

    /// Rings at every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.store.changes()
    }

    pub async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Row<T>>, Failure> {
        let row = self.store.get(key).await.map_err(|error| unreadable(&error))?;
        row.map(|row| parse(&row.key, &row.value, row.modified)).transpose()
    }

    pub async fn list<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<Row<T>>, Failure> {
        Ok(self.list_keyed(prefix).await?.into_iter().map(|(_, row)| row).collect())
    }

    pub async fn list_keyed<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<(String, Row<T>)>, Failure> {
        let (rows, _) = self.store.range(prefix).await.map_err(|error| unreadable(&error))?;
        Rows(rows).keyed()
    }

    /// All rows of several prefixes, and the generation that they all are of.
    pub async fn at_once<const N: usize>(&self, prefixes: [&str; N]) -> Result<([Rows; N], Generation), Failure> {
        let (rows, revision) = self.store.ranges(&prefixes).await.map_err(|error| unreadable(&error))?;
        let mut rows = rows.into_iter();
        let rows = std::array::from_fn(|_| Rows(rows.next().unwrap_or_default()));
        Ok((rows, Generation { incarnation: self.incarnation(), revision }))
    }

    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>, Failure> {
        let (rows, _) = self.store.range(prefix).await.map_err(|error| unreadable(&error))?;
        Ok(rows.into_iter().map(|row| row.key).collect())
    }

    /// All machines, with their placement filled in.
    pub async fn machines(&self) -> Result<Vec<Row<MachineRow>>, Failure> {
        let rows = self.list::<MachineRow>("machines/").await?;
        Ok(rows.into_iter().map(|row| placed(row, self.incarnation())).collect())
    }

    pub async fn machines_of(&self, app: &AppName) -> Result<Vec<Row<MachineRow>>, Failure> {
        Ok(self.machines().await?.into_iter().filter(|row| row.value.spec.app == *app).collect())
    }

    pub async fn machine(&self, id: &MachineId) -> Result<Option<Row<MachineRow>>, Failure> {
        Ok(self.get::<MachineRow>(&key::machine(id)).await?.map(|row| placed(row, self.incarnation())))
    }

    pub async fn commit(&self, change: Change) -> Result<Outcome, Failure> {
        let compare = change.compare.into_iter().map(|compare| match compare {
            Compare::Absent(key) => StoreCompare::Absent(key),
            Compare::Unchanged(key, revision) => StoreCompare::Modified(key, revision),
        });
        let then = change.then.into_iter().map(|op| match op {
            Op::Put(key, value) => StoreOp::Put(key, value),
            Op::Delete(key) => StoreOp::Delete(key),
        });
        let answer = self.store.txn(compare.collect(), then.collect()).await;
        match answer.map_err(|error| unwritable(&error))? {
            Some(_) => Ok(Outcome::Committed),
            None => Ok(Outcome::Conflict),
        }
    }
}

/// A placement's revision is that of the transaction that wrote the row, which no writer knows beforehand.
fn placed(mut row: Row<MachineRow>, incarnation: u64) -> Row<MachineRow> {
    if row.value.placement.revision == 0 {
        row.value.placement = Generation { incarnation, revision: row.modified };
    }
    row
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8], modified: u64) -> Result<Row<T>, Failure> {
    let value = serde_json::from_slice(value)
        .map_err(|error| Failure::internal(&format!("the row {key} cannot be understood"), &error))?;
    Ok(Row { value, modified })
}

fn unreadable(error: &StoreError) -> Failure {
    match error {
        StoreError::Closed => stopping(),
        _ => Failure::internal("desired state cannot be read", error),
    }
}

/// Whoever asks while the process ends.
fn stopping() -> Failure {
    Failure::new(ErrorCode::Unavailable, "control stops").hint("try again in a moment")
}

fn unwritable(error: &StoreError) -> Failure {
    match error {
        StoreError::Full => Failure::new(ErrorCode::DiskFull, error.to_string())
            .hint("free some space in the data directory, then try again"),
        StoreError::Invalid(_) => Failure::invalid(error.to_string()),
        StoreError::Closed => stopping(),
        _ => Failure::internal("desired state cannot be written", error),
    }
}

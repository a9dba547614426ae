//! Wiring: everything is put together once, in this order.

use crate::certificates::{self, Authority, CertificateError};
use crate::dial_back::DialBack;
use crate::failure::Failure;
use crate::images::{BaseImages, Images, ResolveImage};
use crate::keys::{KeyError, Keys, private_dir};
use crate::kill::KillPoints;
use crate::operate::Operate;
use crate::rows::{Change, RemovedHostRow, SecretsVersionRow, State, key};
use crate::tokens::Tokens;
use crate::{Ctx, adopt, api, ended, forget, grow, launch, members, now_ms, project, reconcile, registry, returning, upgrade, watch_hosts};
use axum::Router;
use dunlin_api::{ErrorCode, HostApi};
use dunlin_api::wire::HostCost;
use dunlin_cluster::{HostReport, JoinAnswer, JoinRequest, MAX_JOIN_REQUEST_BYTES, View};
use dunlin_model::{HostId, OrgName};
use dunlin_model::desired::HostRow;
use dunlin_registry::ContentStore;
use dunlin_store::Store;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Appends Prometheus text.
pub type Metrics = Box<dyn Fn(&mut String) + Send + Sync>;
/// `Err` says what is missing.
pub type Ready = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Another host of the fleet, if its address is known.
pub type Reach = Arc<dyn Fn(&HostId) -> Option<Arc<dyn HostApi>> + Send + Sync>;
/// Asks another host whether it is there, and gives up after a second.
pub type Probe = Arc<dyn Fn(HostId) -> BoxFuture<'static, bool> + Send + Sync>;

/// What `server --role control` is told.
pub struct ControlConfig {
    pub data_dir: PathBuf,
    /// Apps are served as `<app>.<domain>`.
    pub domain: String,
    /// Ports of the edge, as people reach them.
    pub http_port: u16,
    pub https_port: u16,
    /// This host, written to the store at the start.
    pub host: HostRow,
    pub org: OrgName,
    pub version: String,
    pub commit: String,
    /// What this host cannot do for machines; people are told.
    pub costs: Vec<HostCost>,
    /// `None`: this server builds no images.
    pub builder: Option<BuilderSettings>,
    /// What builds and the resolver of images prefer; people are told when it is not what a name says.
    pub base_images: BaseImages,
    /// An app's machines are left where they are for this long after its last plan, before they move apart.
    pub rebalance_after_ms: u64,
    /// One of [`kill_points`](crate::kill_points); the process ends there.
    pub kill_at: Option<String>,
    pub metrics: Vec<Metrics>,
    pub ready: Vec<Ready>,
    /// `None`: this server is alone, and no host can join.
    pub fleet: Option<Fleet>,
}

/// What the running cluster lends to control.
#[derive(Clone)]
pub struct Fleet {
    /// Where other hosts reach this one.
    pub addr: SocketAddr,
    /// Whether a host answers others now.
    pub is_up: Arc<dyn Fn(&HostId) -> bool + Send + Sync>,
    /// What this host knows of the cluster, for people.
    pub ask: Arc<dyn Fn(FleetQuestion) -> BoxFuture<'static, serde_json::Value> + Send + Sync>,
    /// Whether a host that joins is reached.
    pub dial_back: DialBack,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FleetQuestion {
    /// Members, how fresh each is, what is behind.
    Status,
    /// Whether the logs that are held are what their writers signed.
    Verify,
}

#[derive(Debug, Clone)]
pub struct BuilderSettings {
    /// Unix socket of the registry, which builders push to.
    pub registry_socket: PathBuf,
}

/// What control works with and does not own.
pub struct Parts {
    pub store: Store,
    pub view: View,
    pub host: Arc<dyn HostApi>,
    /// The hosts of a fleet beside `host`.
    pub reach: Option<Reach>,
    /// Without it no host is ever held for dead.
    pub probe: Option<Probe>,
    pub images: ResolveImage,
    /// What the registry keeps: images of builds that nobody uses and of apps that were destroyed are removed.
    pub content: ContentStore,
    /// Asks a host's server itself: how it does, to take a new binary.
    pub operate: Operate,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("control cannot start without its keys")]
    Keys(#[from] KeyError),
    #[error("control cannot start without its certificate")]
    Certificate(#[from] CertificateError),
    #[error("desired state cannot be read or written")]
    Store(#[from] Failure),
    #[error("there is no kill point {name:?}; they are {}", crate::kill_points().join(", "))]
    UnknownKillPoint { name: String },
    #[error("control cannot start without the cluster's authority")]
    Cluster(#[from] dunlin_cluster::MemberError),
    #[error("contexts of earlier builds cannot be removed")]
    Leftovers(#[source] std::io::Error),
}

/// The running control role.
pub struct Control {
    ctx: Arc<Ctx>,
    tasks: JoinSet<()>,
}

impl Control {
    /// Loads or makes the keys, writes this host's row, publishes, and resumes what was under way.
    pub async fn start(config: ControlConfig, parts: Parts) -> Result<Self, StartError> {
        let kill = KillPoints::new(config.kill_at.as_deref()).map_err(|name| StartError::UnknownKillPoint { name })?;
        private_dir(&config.data_dir)?;
        let state = State::new(parts.store);
        let control_dir = config.data_dir.join("control");
        let versions = state.list::<SecretsVersionRow>("secrets_version/").await?;
        if versions.iter().any(|row| !row.value.sets.is_empty()) {
            Keys::refuse_lost(&control_dir)?;
        }
        let keys = Keys::load_or_create(&control_dir)?;
        let authority = Authority::load_or_create(&config.data_dir.join("ca"), &config.domain)?;
        let cluster = dunlin_cluster::Authority::load_or_create(&control_dir.join("cluster"), now_ms())?;
        api::remove_leftovers(&config.data_dir).map_err(StartError::Leftovers)?;
        let ctx = Arc::new(Ctx {
            state,
            view: parts.view,
            host: parts.host,
            reach: parts.reach,
            watched: watch_hosts::Watched::new(parts.probe),
            images: Images::new(parts.images, config.domain.clone()),
            content: parts.content,
            tokens: Tokens::new(keys.tokens.clone()),
            keys,
            authority,
            cluster,
            fleet: config.fleet,
            events: Default::default(),
            room: Default::default(),
            kill,
            org: config.org,
            domain: config.domain,
            http_port: config.http_port,
            https_port: config.https_port,
            host_row: config.host,
            version: config.version,
            commit: config.commit,
            costs: config.costs,
            data_dir: config.data_dir,
            builder: config.builder,
            base_images: config.base_images,
            rebalance_after_ms: config.rebalance_after_ms,
            metrics: config.metrics,
            ready: config.ready,
            requests: Default::default(),
            work: Notify::new(),
            launches: Notify::new(),
            upgrades: Notify::new(),
            operate: parts.operate,
            machines_writer: Mutex::new(()),
            hosts_writer: Mutex::new(()),
            dial_backs: Default::default(),
            challenges: Default::default(),
            secrets_writer: Mutex::new(()),
            build_slot: Arc::new(Semaphore::new(1)),
            published: AtomicBool::new(false),
            started_ms: now_ms(),
            stop: CancellationToken::new(),
        });
        // Before anybody can ask: a revoked token must not work until the first publication.
        let revoked = ctx.state.keys("revoked/").await?;
        ctx.tokens.revoke(revoked.iter().filter_map(|key| Some(key.strip_prefix("revoked/")?.to_owned())));
        adopt::after_restore(&ctx).await?;
        join(&ctx).await?;
        certificates::ensure(&ctx).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(project::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(watch_hosts::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(reconcile::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(launch::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(ended::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(forget::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(upgrade::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(grow::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(certificates::run(Arc::clone(&ctx), ctx.stop.clone()));
        Ok(Self { ctx, tasks })
    }

    /// The HTTP API, `/healthz`, `/readyz` and `/metrics` for root on this host: no token is asked for, so
    /// serve it on a 0600 unix socket and nowhere else.
    pub fn root_router(&self) -> Router {
        api::router(Arc::clone(&self.ctx), api::Entrance::Root)
    }

    /// The same for everybody else, by token: what the edge forwards to.
    pub fn edge_router(&self) -> Router {
        api::router(Arc::clone(&self.ctx), api::Entrance::Edge)
    }

    /// Who may push to and pull from which repository, for the registry.
    pub fn registry_authorizer(&self) -> dunlin_registry::Authorizer {
        registry::authorizer(Arc::clone(&self.ctx))
    }

    /// Digests of all images that releases or machines name; the collector of garbage keeps them.
    pub async fn images_in_use(&self) -> Result<Vec<String>, Failure> {
        registry::images_in_use(&self.ctx).await
    }

    /// Lets a host join that has a token.
    pub async fn join(&self, request: JoinRequest) -> Result<JoinAnswer, Failure> {
        members::join(&self.ctx, request).await
    }

    /// What a member says of itself, and its certificate anew. The caller knows by the connection that it is that host.
    pub async fn renew(&self, host: &HostId, report: HostReport) -> Result<JoinAnswer, Failure> {
        members::renew(&self.ctx, host, report).await
    }

    /// The same for a transport, bytes in and out.
    pub fn enrolment(&self) -> Enrolment {
        Enrolment(Arc::clone(&self.ctx))
    }

    /// Of the store: desired state of an earlier one is older than all of this.
    pub fn incarnation(&self) -> u64 {
        self.ctx.state.incarnation()
    }

    /// Where the hosts of the cluster are, as they said last.
    pub async fn addresses(&self) -> Result<Vec<(HostId, SocketAddr)>, Failure> {
        members::addresses(&self.ctx).await
    }

    /// The authority's certificate, which people may trust.
    pub fn ca_certificate_path(&self) -> PathBuf {
        self.ctx.authority.certificate_path()
    }

    /// Ends followers and tasks, and closes the store; a plan under way goes on at the next start.
    pub async fn shutdown(mut self) {
        self.ctx.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.ctx.state.close().await;
    }
}

/// How hosts join and renew. An answer is JSON: what was asked for, or an [`ErrorBody`](dunlin_api::ErrorBody).
#[derive(Clone)]
pub struct Enrolment(Arc<Ctx>);

impl Enrolment {
    /// A [`JoinRequest`] or a [`ReturnRequest`](dunlin_cluster::ReturnRequest), from anybody.
    pub async fn join(&self, request: &[u8]) -> Vec<u8> {
        if request.len() <= MAX_JOIN_REQUEST_BYTES && serde_json::from_slice::<Returns>(request).is_ok_and(|asks| asks.returning.is_some()) {
            return written(match parsed(request) {
                Ok(request) => returning::returning(&self.0, request).await,
                Err(failure) => Err(failure),
            });
        }
        let answer = match parsed(request) {
            Ok(request) => members::join(&self.0, request).await,
            Err(failure) => Err(failure),
        };
        written(answer)
    }

    /// A [`HostReport`] of the member at the other end of the connection.
    pub async fn renew(&self, host: &HostId, report: &[u8]) -> Vec<u8> {
        let answer = match parsed(report) {
            Ok(report) => members::renew(&self.0, host, report).await,
            Err(failure) => Err(failure),
        };
        written(answer)
    }
}

/// By what one kind of request is told from the other.
#[derive(serde::Deserialize)]
struct Returns {
    #[serde(default)]
    returning: Option<serde::de::IgnoredAny>,
}

fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    if bytes.len() > MAX_JOIN_REQUEST_BYTES {
        return Err(Failure::new(ErrorCode::TooLarge, format!("a request to join has at most {MAX_JOIN_REQUEST_BYTES} bytes")));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        Failure::bad_request(format!("the request to join cannot be read: {error}")).hint("are both hosts of a similar version? see `dunlin version`")
    })
}

fn written(answer: Result<impl serde::Serialize, Failure>) -> Vec<u8> {
    let json = match answer {
        Ok(answer) => serde_json::to_vec(&answer),
        Err(failure) => {
            if failure.code == ErrorCode::Unavailable {
                tracing::info!(%failure, "a host asks again later");
            } else {
                tracing::warn!(%failure, "a host was refused");
            }
            serde_json::to_vec(&failure.body())
        }
    };
    json.expect("plain data")
}

/// Writes this host's row, if it is another than the stored one.
async fn join(ctx: &Ctx) -> Result<(), Failure> {
    let key = key::host(&ctx.host_row.id);
    let found = ctx.state.get::<HostRow>(&key).await?;
    // A cordon is an operator's, and outlives restarts.
    let kept = found.as_ref().map(|found| &found.value);
    let row = HostRow {
        cordoned: kept.is_some_and(|row| row.cordoned),
        draining: kept.is_some_and(|row| row.draining),
        joined_at_ms: kept.map_or_else(now_ms, |row| row.joined_at_ms),
        ..ctx.host_row.clone()
    };
    if ctx.state.get::<RemovedHostRow>(&key::removed_host(&row.id)).await?.is_some() {
        return Err(Failure::new(ErrorCode::NameTaken, format!("a host {} was removed, and its id is never used again", row.id))
            .hint("start this server with another --host-id"));
    }
    if found.as_ref().is_some_and(|found| found.value == row) {
        return Ok(());
    }
    ctx.state.commit(Change::default().if_as_read(key.clone(), found.as_ref()).put(key, &row)).await?;
    Ok(())
}

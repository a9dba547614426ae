//! Wiring: everything is put together once, in this order.

use crate::certificates::{self, Authority, CertificateError};
use crate::failure::Failure;
use crate::images::{BaseImages, Images, ResolveImage};
use crate::keys::{KeyError, Keys, private_dir};
use crate::kill::KillPoints;
use crate::rows::{Change, SecretsVersionRow, State, key};
use crate::tokens::Tokens;
use crate::{Ctx, api, ended, forget, grow, launch, now_ms, project, reconcile, registry};
use axum::Router;
use dunlin_api::HostApi;
use dunlin_api::wire::HostCost;
use dunlin_cluster::View;
use dunlin_model::OrgName;
use dunlin_model::desired::HostRow;
use dunlin_registry::ContentStore;
use dunlin_store::Store;
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
    /// One of [`kill_points`](crate::kill_points); the process ends there.
    pub kill_at: Option<String>,
    pub metrics: Vec<Metrics>,
    pub ready: Vec<Ready>,
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
    pub images: ResolveImage,
    /// What the registry keeps: images of builds that nobody uses and of apps that were destroyed are removed.
    pub content: ContentStore,
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
        api::remove_leftovers(&config.data_dir).map_err(StartError::Leftovers)?;
        let ctx = Arc::new(Ctx {
            state,
            view: parts.view,
            host: parts.host,
            images: Images::new(parts.images, config.domain.clone()),
            content: parts.content,
            tokens: Tokens::new(keys.tokens.clone()),
            keys,
            authority,
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
            metrics: config.metrics,
            ready: config.ready,
            requests: Default::default(),
            work: Notify::new(),
            launches: Notify::new(),
            machines_writer: Mutex::new(()),
            secrets_writer: Mutex::new(()),
            build_slot: Arc::new(Semaphore::new(1)),
            published: AtomicBool::new(false),
            started_ms: now_ms(),
            stop: CancellationToken::new(),
        });
        // Before anybody can ask: a revoked token must not work until the first publication.
        let revoked = ctx.state.keys("revoked/").await?;
        ctx.tokens.revoke(revoked.iter().filter_map(|key| Some(key.strip_prefix("revoked/")?.to_owned())));
        join(&ctx).await?;
        certificates::ensure(&ctx).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(project::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(reconcile::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(launch::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(ended::run(Arc::clone(&ctx), ctx.stop.clone()));
        tasks.spawn(forget::run(Arc::clone(&ctx), ctx.stop.clone()));
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

/// Writes this host's row, if it is another than the stored one.
async fn join(ctx: &Ctx) -> Result<(), Failure> {
    let key = key::host(&ctx.host_row.id);
    let found = ctx.state.get::<HostRow>(&key).await?;
    // A cordon is an operator's, and outlives restarts.
    let cordoned = found.as_ref().is_some_and(|row| row.value.cordoned);
    let row = HostRow { cordoned, ..ctx.host_row.clone() };
    if found.as_ref().is_some_and(|found| found.value == row) {
        return Ok(());
    }
    ctx.state.commit(Change::default().if_as_read(key.clone(), found.as_ref()).put(key, &row)).await?;
    Ok(())
}

//! The server's process: wires the roles together, once, in this order, and takes them apart again.
//!
//! Host and edge come first and live from the view and their own journal, so that traffic flows before
//! control is there, and without it. Control that cannot start is tried again; meanwhile its API says why.

mod certs;
pub mod fleet;
mod front;
pub mod keys;
mod machines;
pub mod operate;
mod proven;
mod relay;
mod returning;
mod sweep;

use crate::keeper::{self, Sockets};
use crate::settings::{BaseImages, LogFormat, Role, Settings};
use anyhow::Context;
use arc_swap::ArcSwap;
use dunlin_api::wire::{HostCost, VersionInfo};
use dunlin_cluster::{Loaded, View};
use dunlin_control::{BuilderSettings, Control, ControlConfig, Enrolment, Metrics, Parts, RESTORED, Ready, WithoutControl};
use dunlin_host::{Host, HostConfig};
use dunlin_model::{HostId, OrgName};
use dunlin_model::desired::HostRow;
use dunlin_model::hash::fnv1a;
use dunlin_proxy::{AccessLog, CertStore, InternalHost, Limits, Proxy, ProxyConfig, Routes};
use dunlin_registry::{ContentStore, Images, Owners, RegistryState};
use dunlin_runtime::features::Abilities;
use dunlin_runtime::enclave::Enclave;
use dunlin_store::Store;
use front::Front;
use operate::Operated;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Requests under way may end within this when the server stops for good.
const DRAIN_ON_STOP: Duration = Duration::from_secs(15);
/// On a restart new connections wait in the backlog meanwhile, so it is short.
const DRAIN_ON_RESTART: Duration = Duration::from_secs(3);
/// Between tries to start control.
const CONTROL_RETRY: Duration = Duration::from_secs(5);
/// The main runtime carries the API, streams and waiting; the edge has threads of its own.
const RUNTIME_THREADS: usize = 2;

/// The server cannot run, and a restart would not change that.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DoNotRestart(pub String);

/// `outside`: what its machines are kept from, where this process has another network than the computer.
pub fn run(settings: Settings, sockets: Sockets, outside: Vec<Ipv4Addr>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?
        .block_on(serve(settings, sockets, outside))
}

async fn serve(settings: Settings, sockets: Sockets, outside: Vec<Ipv4Addr>) -> anyhow::Result<()> {
    let kill_at = KillAt::parse(settings.kill_at.as_deref())?;
    let _lock = sockets.lock.try_clone()?; // until the end of this function, whatever takes the rest apart
    let paths = Paths::new(&settings.data_dir);
    let stop = CancellationToken::new();
    let view = open_view(&paths)?;
    let content = ContentStore::open(&paths.registry).context("the registry's store cannot be opened")?;
    let abilities = Abilities::find(&instance(&settings.data_dir), &settings.data_dir, outside)?;
    let costs = costs(&abilities);
    let owners = Owners { first: abilities.ids.of_layers() };
    let images = Images::open_as(&paths.images, content.clone(), owners).context("the folder of images cannot be opened")?;
    let host_key = keys::host_key(&paths.host_key)?;
    let (udp, tcp) = sockets.cluster.as_ref().map(|(udp, tcp)| Ok::<_, std::io::Error>((udp.try_clone()?, tcp.try_clone()?))).transpose()?.unzip();
    let fleet = fleet::start(&settings, udp, &view).await?;
    if let Some(fleet) = &fleet {
        images.fetch_from(fleet.peers());
    }

    let host = start_host(&settings, abilities, &host_key, kill_at.host, view.clone(), images.clone())?;
    let (api, edge_api, registry) = (Front::new("the API"), Front::new("the API"), Front::new("the registry"));
    let proxy = start_edge(&settings, &sockets, &paths, &host, &view, &host_key, fleet.as_ref().zip(tcp))?;
    let fronts = [
        api.serve(front::listener(sockets.api)?, stop.clone()),
        edge_api.serve(front::bind(&paths.edge_socket, front::For::Root)?, stop.clone()),
        registry.serve(front::bind(&paths.registry_socket, front::For::Machines)?, stop.clone()),
        machines::serve(edge_api.clone(), front::bind(&paths.machines_socket, front::For::Machines)?, stop.clone()),
    ];
    let local_metrics = metrics(&host, &proxy, fleet.as_ref());
    api.set_metrics(local_metrics.clone());

    let keeper = (sockets.keeper.try_clone()?, std::env::var_os(crate::program::ON_TRIAL).is_some());
    let operated = Operated::new(settings.clone(), (view.clone(), host.clone(), proxy.metrics()), keeper, local_metrics.clone(), fleet.clone())?;

    let enrolment = Arc::new(OnceLock::new());
    if let Some(fleet) = &fleet {
        fleet.serve(host.clone(), &content, &edge_api, &registry);
        fleet.enrol(&enrolment);
        operated.serve(fleet);
        if fleet.runs_control() {
            tokio::spawn(fleet.clone().keep_certified(settings.clone(), stop.clone()));
        }
    }
    if !settings.roles.contains(&Role::Control) {
        match &fleet {
            Some(fleet) => {
                fleet.relay(without_control(&settings, fleet, &view, &host, stop.clone()), (&api, &edge_api, &registry));
                let sealing_key = host_key.sealing_key().to_base64();
                tokio::spawn(fleet.clone().keep_enrolled(settings.clone(), sealing_key, stop.clone()));
                tokio::spawn(fleet.clone().watch_removal(stop.clone()));
                tokio::spawn(sweep::of_member(host.clone(), content.clone(), images.clone(), stop.clone()));
            }
            None => {
                for front in [&api, &edge_api, &registry] {
                    front.close("this server runs without the control role, and has joined no cluster");
                }
            }
        }
    }
    let ready = sockets.keeper.try_clone()?;
    if !settings.roles.contains(&Role::Control) {
        keeper::say_ready(&ready);
    }
    let control = settings.roles.contains(&Role::Control).then(|| {
        let plan = ControlPlan {
            settings: settings.clone(),
            paths: paths.clone(),
            view: view.clone(),
            host: host.clone(),
            host_row: host_row(&settings, &host_key),
            content,
            images,
            costs,
            kill_at: kill_at.control,
            metrics: local_metrics,
            fronts: (api, edge_api, registry),
            fleet: fleet.clone(),
            enrolment,
            operated,
        };
        tokio::spawn(keep_control(plan, stop.clone(), ready))
    });
    tracing::info!(
        host = %settings.host_id, region = %settings.region, http = %settings.http, https = %settings.https,
        domain = %settings.domain, "server runs"
    );

    let ends = async {
        match &fleet {
            Some(fleet) => fleet.silenced().await,
            None => std::future::pending().await,
        }
    };
    let (drain_within, silenced) = tokio::select! {
        asked = wait_for_end(sockets.keeper) => (asked?, None),
        why = ends => (Duration::ZERO, Some(why)),
    };
    match &silenced {
        None => tracing::info!("server stops; machines go on"),
        Some(why) => tracing::error!("server stops, and its machines end: {why}"),
    }
    stop.cancel();
    let (drained, ()) = tokio::join!(proxy.drain(drain_within), async {
        if let Some(control) = control {
            let _ = control.await; // a panic in it was reported by itself
        }
    });
    if drained.cut > 0 {
        tracing::info!(connections = drained.cut, "still open at the end of the drain, and cut");
    }
    for front in fronts {
        let _ = front.await; // as above
    }
    host.shutdown().await;
    if let Some(fleet) = fleet {
        fleet.cluster.shutdown().await;
    }
    tokio::task::spawn_blocking(move || view.flush()).await?.context("the view's snapshot could not be written")?;
    if let Some(why) = silenced {
        // What it would run, the host whose copy it is runs too.
        let (data, prefix) = (settings.data_dir.clone(), settings.machine_prefix);
        tokio::task::spawn_blocking(move || dunlin_host::clean_up(&data, &instance(&data), prefix)).await?.context("machines could not be ended")?;
        return Err(DoNotRestart(why).into());
    }
    tracing::info!("server stopped");
    Ok(())
}

/// Where things are in the data directory.
#[derive(Clone)]
struct Paths {
    data: PathBuf,
    host_key: PathBuf,
    view: PathBuf,
    registry: PathBuf,
    images: PathBuf,
    store: PathBuf,
    edge_socket: PathBuf,
    registry_socket: PathBuf,
    machines_socket: PathBuf,
}

impl Paths {
    fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
            host_key: data.join("host/host.key"),
            view: data.join("view.snapshot"),
            registry: registry_dir(data),
            images: data.join("images"),
            store: data.join("control/store.db"),
            edge_socket: data.join("run/edge.sock"),
            registry_socket: data.join("run/registry.sock"),
            machines_socket: dunlin_host::machine_api_socket(data),
        }
    }
}

/// The content store of images; `dunlin image bootstrap` writes to it too.
pub fn registry_dir(data: &Path) -> PathBuf {
    data.join("registry")
}

/// Which role's kill point a test asked for.
#[derive(Default)]
struct KillAt {
    host: Option<String>,
    control: Option<String>,
}

impl KillAt {
    fn parse(point: Option<&str>) -> Result<Self, DoNotRestart> {
        let Some(point) = point else { return Ok(Self::default()) };
        let of_host = [dunlin_host::KILL_POINTS, dunlin_host::VOLUME_KILL_POINTS, dunlin_host::SUPERVISOR_KILL_POINTS];
        if of_host.iter().any(|points| points.contains(&point)) {
            return Ok(Self { host: Some(point.to_owned()), control: None });
        }
        if dunlin_control::kill_points().contains(&point) {
            return Ok(Self { host: None, control: Some(point.to_owned()) });
        }
        Err(DoNotRestart(format!("there is no kill point {point:?}")))
    }
}

fn open_view(paths: &Paths) -> anyhow::Result<View> {
    let (view, loaded) = View::open(&paths.view, now_ms()).context("the view's snapshot cannot be opened")?;
    match loaded {
        Loaded::Nothing => tracing::info!("no snapshot of the view: the first start"),
        Loaded::FromDisk { generation, saved_at_ms } => {
            let age_s = now_ms().saturating_sub(saved_at_ms) / 1000;
            tracing::info!(%generation, age_s, "view loaded from disk");
        }
        Loaded::Quarantined { to, reason } => {
            tracing::error!(moved_to = %to.display(), why = %reason, "the view's snapshot was damaged; control publishes a new one");
        }
    }
    Ok(view)
}

fn host_row(settings: &Settings, key: &dunlin_model::seal::OpeningKey) -> HostRow {
    HostRow {
        id: settings.host_id.clone(),
        region: settings.region.clone(),
        prefix: settings.machine_prefix,
        public_key: key.sealing_key().to_base64(),
        cpus: settings.cpus,
        memory_mb: settings.memory_mb,
        zone: settings.zone.clone(),
        labels: settings.labels.clone(),
        cordoned: false, // control keeps what an operator said
        draining: false,
        joined_at_ms: 0,
    }
}

fn costs(abilities: &Abilities) -> Vec<HostCost> {
    let told = abilities.costs().map(|lack| HostCost {
        name: lack.name.into(),
        found: lack.found.clone(),
        cost: lack.cost_if_missing.into(),
        fix: lack.fix.clone(),
    });
    told.collect()
}

fn start_host(
    settings: &Settings,
    abilities: Abilities,
    key: &dunlin_model::seal::OpeningKey,
    kill_at: Option<String>,
    view: View,
    images: Images,
) -> anyhow::Result<Arc<Host>> {
    if let Err(error) = dunlin_host::favour_server(&abilities) {
        tracing::warn!(error = format!("{error:#}"), "the server has no more weight than its machines");
    }
    let config = HostConfig {
        id: settings.host_id.clone(),
        region: settings.region.clone(),
        data_dir: settings.data_dir.clone(),
        instance: instance(&settings.data_dir),
        machine_prefix: settings.machine_prefix,
        cpus: settings.cpus,
        memory_mb: settings.memory_mb,
        abilities,
        rootfs_gb: settings.rootfs_gb,
        autostop_after_ms: settings.autostop_after_s * 1000,
        ready_machines: settings.ready_machines.into(),
        key: key.clone(),
        kill_at,
    };
    Ok(Host::start(config, view, images)?)
}

/// A name for this server's control groups and firewall table: of its data directory, so that several
/// servers share a computer, and the same after every start.
pub fn instance(data_dir: &Path) -> String {
    let path = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
    if path == Path::new(dunlin_cli::DEFAULT_DATA_DIR) {
        return "dunlin".into();
    }
    let hash = fnv1a(path.as_os_str().as_encoded_bytes().iter().copied());
    format!("dunlin_{hash:016x}")
}

fn start_edge(
    settings: &Settings,
    sockets: &Sockets,
    paths: &Paths,
    host: &Arc<Host>,
    view: &View,
    key: &dunlin_model::seal::OpeningKey,
    fleet: Option<(&fleet::Fleet, TcpListener)>,
) -> anyhow::Result<Proxy> {
    let routes = match &fleet {
        Some((fleet, _)) => fleet.routes(settings.region.clone()),
        None => Routes::new(settings.region.clone()),
    };
    let store = Arc::new(ArcSwap::from_pointee(CertStore::empty()));
    // What the disk remembers is served from the first connection on; connections wait already.
    routes.update(&view.current());
    let mut served = certs::Served::new(settings.host_id.clone(), key.clone(), store.clone());
    served.update(&view.current());
    tokio::spawn(routes.clone().follow(view.clone()));
    tokio::spawn(served.follow(view.clone()));
    let internal = |name: &str, socket: &Path| InternalHost {
        hostname: format!("{name}.{}", settings.domain),
        unix_socket: socket.to_owned(),
    };
    let mut internal_hosts = vec![internal("api", &paths.edge_socket), internal("registry", &paths.registry_socket)];
    if settings.domain == "localhost" {
        // Few resolvers know `registry.localhost`, and container tools take plain HTTP from `localhost` alone.
        internal_hosts.push(InternalHost { hostname: "localhost".into(), unix_socket: paths.registry_socket.clone() });
    }
    let config = ProxyConfig {
        http: vec![sockets.http.try_clone()?],
        https: vec![sockets.https.try_clone()?],
        http_port: settings.http.port(),
        https_port: settings.https.port(),
        threads: 0,
        limits: Limits::default(),
        internal_hosts,
        access_log: access_log(settings.log_format),
        fleet: fleet.map(|(fleet, listener)| fleet::of_edge(fleet, listener)),
    };
    Ok(Proxy::start(config, routes, host.clone(), store)?)
}

/// Beside the server's own log, in its format; `DUNLIN_LOG=info,access=off` turns it off.
fn access_log(format: LogFormat) -> Option<AccessLog> {
    let format = match format {
        LogFormat::Text => dunlin_proxy::LogFormat::Text,
        LogFormat::Json => dunlin_proxy::LogFormat::Json,
    };
    let is_wanted = tracing::enabled!(target: "access", tracing::Level::INFO);
    is_wanted.then(|| AccessLog { format, sink: Box::new(std::io::stderr()) })
}

/// What a member answers of the API by itself.
fn without_control(settings: &Settings, fleet: &fleet::Fleet, view: &View, host: &Arc<Host>, stop: CancellationToken) -> WithoutControl {
    let version = VersionInfo {
        version: crate::VERSION.into(),
        commit: crate::COMMIT.into(),
        host: settings.host_id.to_string(),
        domain: settings.domain.clone(),
        http_port: settings.http.port(),
        https_port: settings.https.port(),
        costs: vec![],
    };
    WithoutControl {
        view: view.clone(),
        region: settings.region.clone(),
        see_detail: fleet.see_detail(),
        host: host.clone(),
        reach: fleet.reach_for(),
        org: first_org(),
        version,
        stop,
    }
}

/// There is no other yet.
fn first_org() -> OrgName {
    "personal".parse().expect("it is a name")
}

/// What this process can say of itself without control.
type SharedMetrics = Arc<dyn Fn(&mut String) + Send + Sync>;

fn metrics(host: &Arc<Host>, proxy: &Proxy, fleet: Option<&fleet::Fleet>) -> SharedMetrics {
    let (host, proxy, cluster) = (host.clone(), proxy.metrics(), fleet.map(|fleet| fleet.cluster.clone()));
    Arc::new(move |out| {
        host.render_metrics(out);
        proxy.render(out);
        if let Some(cluster) = &cluster {
            cluster.render_metrics(out);
        }
        front::process_metrics(out);
    })
}

/// What control is started from, as often as it takes.
struct ControlPlan {
    settings: Settings,
    paths: Paths,
    view: View,
    host: Arc<Host>,
    host_row: HostRow,
    content: ContentStore,
    images: Images,
    costs: Vec<HostCost>,
    kill_at: Option<String>,
    metrics: SharedMetrics,
    fronts: (Arc<Front>, Arc<Front>, Arc<Front>),
    fleet: Option<fleet::Fleet>,
    /// How hosts join, for whoever stands at the cluster's door.
    enrolment: Arc<OnceLock<Enrolment>>,
    operated: Arc<Operated>,
}

/// Starts control once the host knows its machines; if it cannot start, says why and tries again. Traffic goes on
/// meanwhile.
async fn keep_control(plan: ControlPlan, stop: CancellationToken, keeper: std::os::unix::net::UnixStream) {
    tokio::select! {
        () = stop.cancelled() => return,
        () = plan.host.recovered() => {}
    }
    let control = loop {
        let started = tokio::select! {
            () = stop.cancelled() => return,
            started = start_control(&plan) => started,
        };
        match started {
            Ok(Started::Here(control)) => break control,
            Ok(Started::Elsewhere(other)) => {
                plan.stay_off(&other, stop);
                return keeper::say_ready(&keeper);
            }
            Err(error) => {
                let why = format!("{error:#}");
                tracing::error!(error = %why, "control cannot start; apps go on, tried again in {} s", CONTROL_RETRY.as_secs());
                for front in [&plan.fronts.0, &plan.fronts.1, &plan.fronts.2] {
                    front.close(&why);
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(CONTROL_RETRY) => {}
        }
    };
    let (api, edge_api, registry) = &plan.fronts;
    let service = format!("registry.{}", plan.settings.domain);
    let state = RegistryState { store: plan.content.clone(), authorize: control.registry_authorizer(), service };
    registry.open(dunlin_registry::router(state));
    if let Some(fleet) = &plan.fleet {
        let _ = plan.enrolment.set(control.enrolment()); // control starts once
        if let Err(error) = fleet.publish(&plan.paths.data, control.incarnation()) {
            tracing::error!(error = format!("{error:#}"), "desired state cannot be told to other hosts");
        }
    }
    edge_api.open(control.edge_router());
    api.open(control.root_router());
    keeper::say_ready(&keeper);
    let incarnation = control.incarnation();
    let superseded = async {
        match &plan.fleet {
            Some(fleet) => fleet.superseded(incarnation).await,
            None => std::future::pending().await,
        }
    };
    let elsewhere = tokio::select! {
        () = stop.cancelled() => None,
        () = sweep::run(&control, &plan.content, &plan.images) => None,
        other = superseded => Some(other),
    };
    control.shutdown().await;
    if let Some(other) = elsewhere {
        plan.stay_off(&other, stop);
    }
}

enum Started {
    Here(Control),
    /// It was restored on this host meanwhile.
    Elsewhere(HostId),
}

impl ControlPlan {
    /// Another host has control by now, and all others obey that one: this server goes on as a member.
    fn stay_off(&self, other: &HostId, stop: CancellationToken) {
        tracing::error!(
            host = %other,
            "control was restored on another host and runs there: the control of this one stays off, and all hosts obey the other alone. \
             Once nothing of it is needed any more, remove control/ in this server's data directory"
        );
        let Some(fleet) = &self.fleet else { return };
        match fleet.is_member_of(other) {
            Ok(()) => drop(tokio::spawn(fleet.clone().keep_enrolled(self.settings.clone(), self.host_row.public_key.clone(), stop.clone()))),
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "that this host is a member now is not on disk: keep control/ until it is, or the next start takes it for a cluster of its own; restart the server to try again"
            ),
        }
        let (api, edge_api, registry) = &self.fronts;
        fleet.relay(without_control(&self.settings, fleet, &self.view, &self.host, stop.clone()), (api, edge_api, registry));
        tokio::spawn(sweep::of_member(self.host.clone(), self.content.clone(), self.images.clone(), stop));
    }
}

async fn start_control(plan: &ControlPlan) -> anyhow::Result<Started> {
    let path = plan.paths.store.clone();
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let store = tokio::task::spawn_blocking(move || Store::open(&path)).await?.context("desired state cannot be opened")?;
    if let Some(fleet) = &plan.fleet {
        let (rows, _) = store.range("hosts/").await.context("desired state cannot be read")?;
        // One that was just restored is not held against itself: it goes above whatever others know.
        let may_be_elsewhere = rows.len() > 1 && store.get(RESTORED).await.context("desired state cannot be read")?.is_none();
        if may_be_elsewhere
            && let Some(other) = fleet.superseded_meanwhile(store.incarnation()).await
        {
            store.close().await;
            return Ok(Started::Elsewhere(other));
        }
    }
    let shared = plan.metrics.clone();
    let metrics: Metrics = Box::new(move |out: &mut String| shared(out));
    let base_images = match plan.settings.base_images {
        BaseImages::Bootstrapped => dunlin_control::BaseImages::Bootstrapped,
        BaseImages::Upstream => dunlin_control::BaseImages::Upstream,
    };
    let config = ControlConfig {
        data_dir: plan.paths.data.clone(),
        domain: plan.settings.domain.clone(),
        http_port: plan.settings.http.port(),
        https_port: plan.settings.https.port(),
        host: plan.host_row.clone(),
        org: first_org(),
        version: crate::VERSION.into(),
        commit: crate::COMMIT.into(),
        costs: plan.costs.clone(),
        builder: Some(BuilderSettings { registry_socket: plan.paths.registry_socket.clone() }),
        base_images,
        rebalance_after_ms: plan.settings.rebalance_after_s * 1000,
        kill_at: plan.kill_at.clone(),
        metrics: vec![metrics],
        ready: vec![certs::ready(plan.view.clone()) as Ready],
        fleet: plan.fleet.as_ref().map(fleet::Fleet::lend),
    };
    let parts = Parts {
        store: store.clone(),
        reach: plan.fleet.as_ref().map(fleet::Fleet::reach),
        probe: plan.fleet.as_ref().map(fleet::Fleet::probe),
        view: plan.view.clone(),
        host: plan.host.clone(),
        images: dunlin_control::resolver(plan.content.clone(), base_images),
        content: plan.content.clone(),
        operate: operate::operator(plan.operated.clone()),
    };
    match Control::start(config, parts).await {
        Ok(control) => Ok(Started::Here(control)),
        Err(error) => {
            store.close().await; // or the next try finds it locked
            Err(error.into())
        }
    }
}

/// Until somebody ends us: how long requests under way may take.
async fn wait_for_end(keeper: std::os::unix::net::UnixStream) -> anyhow::Result<Duration> {
    keeper.set_nonblocking(true)?;
    let mut keeper = tokio::net::UnixStream::from_std(keeper)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut byte = [0];
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(DRAIN_ON_STOP),
            // A terminal sends it to the keeper too, which then says what it means.
            _ = interrupt.recv() => {}
            _ = hang_up.recv() => return Ok(DRAIN_ON_RESTART),
            read = keeper.read(&mut byte) => if !matches!(read, Ok(n) if n > 0) {
                tracing::warn!("the keeper is gone; ending, so that another can take over");
                return Ok(DRAIN_ON_RESTART);
            },
        }
    }
}

/// Removes what a stopped server left in the kernel.
pub fn cleanup(data: &Path) -> anyhow::Result<()> {
    if let Some(pid) = crate::keeper::holder(data)? {
        anyhow::bail!("a server (process {pid}) uses {}; stop it first", data.display());
    }
    let run = data.join("run");
    let enclave = Enclave::find(&run)?;
    match &enclave {
        Some(enclave) => dunlin_runtime::enclave::enter(enclave.descriptors()).context("the server's namespaces cannot be joined")?,
        // Whatever an ordinary user's server had in the kernel was in there.
        None if !rustix::process::geteuid().is_root() => return Ok(()),
        None => {}
    }
    // Which block the machines had does not matter for what is removed.
    let prefix = crate::settings::parse_prefix(crate::settings::DEFAULT_MACHINE_PREFIX).context("the default prefix")?;
    dunlin_host::clean_up(data, &instance(data), prefix)?;
    enclave.map_or(Ok(()), |enclave| enclave.end(&run)).context("the server's namespaces cannot be ended")
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_differ_by_directory_and_stay_the_same() {
        assert_eq!(instance(Path::new("/var/lib/dunlin")), "dunlin");
        let (one, other) = (instance(Path::new("/srv/a")), instance(Path::new("/srv/b")));
        assert_ne!(one, other);
        assert_eq!(one, instance(Path::new("/srv/a")));
    }

    #[test]
    fn kill_points_belong_to_a_role() {
        assert!(KillAt::parse(Some("host.before-spawn")).unwrap().host.is_some());
        assert!(KillAt::parse(Some("supervisor.before-join")).unwrap().host.is_some());
        assert!(KillAt::parse(Some("plan-after")).unwrap().control.is_some());
        assert!(KillAt::parse(Some("nowhere")).is_err());
    }
}

//! This server as a member of its cluster: what it listens for, whom it asks, and who is served what.

use super::front::Front;
use super::relay::{self, Relay};
use super::{proven, returning};
use crate::settings::{Role, Settings};
use anyhow::Context;
use axum::routing::get;
use dunlin_api::{ErrorBody, ErrorCode, HostApi};
use dunlin_api::remote::{self, Asker, Duplex, RemoteHost};
use dunlin_cluster::{
    Authority, Cluster, ClusterConfig, ControlHost, Handler, HostReport, MAX_JOIN_ANSWER_BYTES, MAX_JOIN_REQUEST_BYTES, Member, MemberKeys, SeeDetail, Service, Standing,
    View, read_frame, write_frame,
};
use dunlin_control::{Enrolment, FleetQuestion, ReachFor, WithoutControl, wall};
use dunlin_model::{AppName, HostId, Region};
use dunlin_proxy::{Elsewhere, Routes};
use dunlin_view::Freshness;
use dunlin_registry::{ContentStore, peer};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

const PROBE_WITHIN: Duration = Duration::from_secs(1);
/// What a frame on a stream to join begins with, if a member sends it: somebody else's request, or its own report.
const PASSED_ON: u8 = b'j';
const RENEW: u8 = b'r';
const MAX_ENROL_BYTES: usize = MAX_JOIN_REQUEST_BYTES + 1;
const ENROLLED_WITHIN: Duration = Duration::from_secs(30);
/// Before control starts others may say that it runs elsewhere by now; nobody waits longer for those that are away.
const HEARD_WITHIN: Duration = Duration::from_secs(4);
/// A host that is heard tells the newest desired state that it has.
const TELLS_WITHIN: Duration = Duration::from_millis(500);
/// Control was away for almost two years, or refuses this host.
const WORTH_AN_ALARM_DAYS: u64 = 60;
const LOOK_AT_CERTIFICATE: Duration = Duration::from_secs(3600);
const ASKED_BEFORE_CONTROL: usize = 3;
const LOOK_AT_IDENTITY: Duration = Duration::from_millis(500);
const LOOK_IF_REMOVED: Duration = Duration::from_secs(5);
const RENEW_RETRY: Duration = Duration::from_secs(5);
const RETRIES_AN_HOUR: u32 = 720;
/// So many failures in a row are not a start that takes its time.
const WORTH_A_WORD: u32 = 6;
/// Any address of the internet: nothing is sent there, the kernel only says by which of its own it would be reached.
const SOMEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

#[derive(Clone)]
pub struct Fleet {
    pub cluster: Cluster,
    pub member: Member,
    dir: PathBuf,
    view: View,
}

/// Takes part in the cluster. `None`: this server stays alone.
pub async fn start(
    settings: &Settings,
    socket: Option<UdpSocket>,
    view: &View,
) -> anyhow::Result<Option<Fleet>> {
    let Some(socket) = socket else { return Ok(None) };
    let dir = settings.data_dir.join("cluster");
    let member = if settings.roles.contains(&Role::Control) {
        of_control(settings, &dir)?
    } else {
        match Member::load(&dir)? {
            Some(member) => returning::with_all_logs(member, &dir).await?,
            None => {
                tracing::info!("this server has joined no cluster: it serves what it last knew");
                return Ok(None);
            }
        }
    };
    let listen = socket.local_addr().context("the cluster's socket has no address")?;
    let advertise = settings.advertise.unwrap_or_else(|| advertised(listen, &member));
    let config = ClusterConfig { member: member.clone(), socket, advertise, dir: dir.clone() };
    let cluster = Cluster::start(config, view.clone()).await.context("this server cannot take part in its cluster")?;
    tracing::info!(%listen, %advertise, host = %member.host, control = %member.control, "member of a cluster");
    Ok(Some(Fleet { cluster, member, dir, view: view.clone() }))
}

/// Control's own host, certified anew where that is due.
fn of_control(settings: &Settings, dir: &Path) -> anyhow::Result<Member> {
    let data = &settings.data_dir;
    if !authority_dir(data).exists() && Member::load(dir)?.is_some() {
        // A new authority would be one of a new cluster, and the others would refuse this host from then on.
        anyhow::bail!(
            "this host is a member of a cluster, and {}, with which control vouches for its members, is gone\n  \
             hint: bring it back, by `dunlin control restore` from a backup; if control runs on another host, start with --role host,proxy; \
             for a new cluster without the other hosts remove {} too",
            authority_dir(data).display(),
            dir.display()
        );
    }
    let authority = Authority::load_or_create(&authority_dir(&settings.data_dir), super::now_ms())?;
    let of = ControlHost {
        host: settings.host_id.clone(),
        region: settings.region.clone(),
        domain: settings.domain.clone(),
        machine_prefix: settings.machine_prefix,
    };
    Ok(Member::of_control(dir, &authority, &of, super::now_ms())?)
}

fn authority_dir(data: &Path) -> PathBuf {
    data.join("control/cluster")
}

/// The address by which this computer reaches the others is the one by which they reach it, if nobody says otherwise.
fn advertised(listen: SocketAddr, member: &Member) -> SocketAddr {
    let towards = member.peers.iter().find(|(host, _)| *host != member.host).map_or(SOMEWHERE, |(_, address)| *address);
    match crate::join::address_towards(towards, listen) {
        Ok(own) => own,
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "no way to others is known; only servers on this computer reach this one, unless --advertise says where");
            SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listen.port())
        }
    }
}

impl Fleet {
    /// What other members ask of this one; where control is, the API and the registry as well.
    pub fn serve(&self, host: Arc<dyn HostApi>, content: &ContentStore, api: &Arc<Front>, registry: &Arc<Front>) {
        let content = content.clone();
        let (fleet, judge) = (self.clone(), proven::judge(self.view.clone()));
        let commands: Handler = Arc::new(move |peer, stream| {
            // Only control commands machines by a word of its own: a member that was broken into does not get at those of
            // the others.
            let asker = match peer {
                Some(peer) if peer == fleet.control() => Asker::Control,
                Some(_) => Asker::Member(judge.clone()),
                None => return Box::pin(std::future::ready(())),
            };
            Box::pin(remote::serve(stream, host.clone(), asker))
        });
        self.cluster.serve(Service::Host, commands);
        self.of_members(Service::Blob, move |peer, stream| peer::serve(stream, peer, content.clone()));
        if self.runs_control() {
            for (service, front) in [(Service::Api, api), (Service::Registry, registry)] {
                let front = front.clone();
                self.of_members(service, move |_, stream| relay::answer(front.clone(), stream));
            }
        }
    }

    pub fn runs_control(&self) -> bool {
        self.member.control == self.member.host
    }

    /// The host that has control now, by its own signed word; until that is heard, the one that let this host join.
    pub fn control(&self) -> HostId {
        self.view.current().config.platform.as_ref().map_or_else(|| self.member.control.clone(), |platform| platform.control.clone())
    }

    fn of_members<F>(&self, service: Service, serve: impl Fn(HostId, dunlin_cluster::Stream) -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |peer, stream| match peer {
            Some(peer) => Box::pin(serve(peer, stream)),
            None => Box::pin(std::future::ready(())), // whoever is no member is told nothing
        });
        self.cluster.serve(service, handler);
    }

    /// A member's doors: what it is asked of the API and the registry, control answers; what needs no control, the member
    /// itself while control is away.
    pub fn relay(&self, without: WithoutControl, (root, edge, registry): (&Arc<Front>, &Arc<Front>, &Arc<Front>)) {
        let fleet = self.clone();
        let relay = Relay::new(self.cluster.clone(), Arc::new(move || fleet.control()));
        let without = Arc::new(without);
        edge.open(relay.router(Service::Api, Some(without.edge_router())));
        // What this host itself knows is told here: it is what helps when control is not reached.
        let status = self.lend().ask;
        let verify = status.clone();
        let own = relay
            .router(Service::Api, Some(without.root_router()))
            .route("/v1/cluster/status", get(move || async move { axum::Json(status(FleetQuestion::Status).await) }))
            .route("/v1/cluster/verify", get(move || async move { axum::Json(verify(FleetQuestion::Verify).await) }));
        root.open(own);
        registry.open(relay.router(Service::Registry, None));
    }

    /// The host that has control instead of this one, once it has said so: control was restored there, from a backup of a
    /// store that had `incarnation` at most.
    pub async fn superseded(&self, incarnation: u64) -> HostId {
        let mut changes = self.view.subscribe();
        let mut view = changes.current();
        loop {
            let platform = view.config.platform.as_ref().filter(|platform| platform.control != self.member.host);
            if let Some(platform) = platform
                && view.config.generation.incarnation > incarnation
            {
                return platform.control.clone();
            }
            view = changes.changed().await;
        }
    }

    /// The same before control starts: others are heard first, if they are there.
    pub async fn superseded_meanwhile(&self, incarnation: u64) -> Option<HostId> {
        let heard = async {
            let mut changes = self.view.subscribe();
            let mut view = changes.current();
            while !view.heard.iter().any(|(host, heard)| *host != self.member.host && *heard == Freshness::Fresh) {
                view = changes.changed().await;
            }
            tokio::time::sleep(TELLS_WITHIN).await;
        };
        tokio::select! {
            other = self.superseded(incarnation) => Some(other),
            () = async { drop(tokio::time::timeout(HEARD_WITHIN, heard).await) } => None,
        }
    }

    /// How control reaches a host other than its own.
    pub fn reach(&self) -> dunlin_control::Reach {
        let cluster = self.cluster.clone();
        let known: Mutex<BTreeMap<HostId, Arc<dyn HostApi>>> = Mutex::default();
        Arc::new(move |host| {
            cluster.address(host)?;
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let reached = known.entry(host.clone()).or_insert_with(|| Arc::new(RemoteHost::new(host.clone(), dial(&cluster, host))));
            Some(reached.clone())
        })
    }

    /// How this host reaches another for the bearer of a token.
    pub fn reach_for(&self) -> ReachFor {
        let (cluster, view) = (self.cluster.clone(), self.view.clone());
        Arc::new(move |host, token| {
            cluster.address(host)?;
            Some(Arc::new(RemoteHost::asked_for(proven::bearer(view.clone(), token.clone()), host.clone(), dial(&cluster, host))))
        })
    }

    /// A host that has no certificate yet is let in by control; any member passes its request on.
    pub fn enrol(&self, control: &Arc<OnceLock<Enrolment>>) {
        let fleet = self.clone();
        let control = control.clone();
        let handler: Handler = Arc::new(move |peer, mut stream| {
            let (cluster, to, control) = (fleet.cluster.clone(), fleet.control(), control.clone());
            let is_here = to == fleet.member.host;
            Box::pin(async move {
                let done = async {
                    let request = read_frame(&mut stream, MAX_ENROL_BYTES).await?;
                    let answer = match (is_here, peer, request.split_first()) {
                        (true, None, _) => enrolled(&control, Ask::Join(&request)).await,
                        (true, Some(_), Some((&PASSED_ON, request))) => enrolled(&control, Ask::Join(request)).await,
                        (true, Some(host), Some((&RENEW, report))) => enrolled(&control, Ask::Renew(&host, report)).await,
                        (false, None, _) => match ask(&cluster, &to, PASSED_ON, &request).await {
                            Ok(answer) => answer,
                            Err(error) => unavailable(&format!("control, which runs on host {to}, cannot be asked: {error}")),
                        },
                        _ => unavailable("this request is for the host that control runs on"),
                    };
                    write_frame(&mut stream, &answer).await?;
                    stream.shutdown().await
                };
                if let Err(error) = done.await {
                    tracing::debug!(%error, "a request to join broke off");
                }
            })
        });
        self.cluster.serve(Service::Join, handler);
    }

    /// Tells control what this host is now, and takes its certificate anew: at the start, when it is due, and when control
    /// begins anew from a backup.
    pub async fn keep_enrolled(self, settings: Settings, sealing_key: String, stop: CancellationToken) {
        let dir = self.dir.clone();
        let mut member = self.member.clone();
        let (mut told, mut failures) = (None, 0);
        loop {
            if self.cluster.is_removed() {
                return;
            }
            let lineage = self.lineage();
            let pause = if told.as_ref() == Some(&lineage) && !member.is_due(super::now_ms()) {
                LOOK_AT_CERTIFICATE
            } else {
                match self.renew(&member, &settings, &sealing_key).await {
                    Ok(renewed) => {
                        (told, failures) = (Some(lineage), 0);
                        if let Err(error) = renewed.save(&dir) {
                            tracing::error!(error = %error, "this host's new certificate is not on disk; it is asked for again after a restart");
                        }
                        member = renewed;
                        LOOK_AT_CERTIFICATE
                    }
                    Err(error) => {
                        failures += 1;
                        // Control may be starting, too; and a line each time would say nothing new.
                        if failures % RETRIES_AN_HOUR == 1 && let Some(ended_ms_ago) = member.ended_ms_ago(super::now_ms()) {
                            returning::tell_that_it_ended(ended_ms_ago, &error);
                        } else if failures == WORTH_A_WORD {
                            tracing::warn!(error = format!("{error:#}"), "control was not told of this host; apps go on, tried again every {} s", RENEW_RETRY.as_secs());
                        }
                        RENEW_RETRY
                    }
                }
            };
            let mut changes = self.view.subscribe();
            let begins_anew = async { while told.as_ref().is_none_or(|told| *told == self.lineage()) { changes.changed().await; } };
            // Once it is due, at the first that fails.
            if failures == 0 || failures % RETRIES_AN_HOUR == 1 {
                self.tell_if_it_ends();
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = wall::pause(pause) => {}
                () = begins_anew => {}
            }
        }
    }

    /// The others refuse a host that was removed, so that it hears nothing of it: where control is not there for this one, it asks.
    pub async fn watch_removal(self, stop: CancellationToken) {
        while !self.cluster.is_removed() {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_IF_REMOVED) => {}
            }
            let control = self.control();
            if self.cluster.is_up(&control) {
                continue;
            }
            let Some(notice) = returning::removal(&self.member, self.cluster.address(&control)).await else { continue };
            match self.cluster.removed(&notice).await {
                Ok(true) => {}
                Ok(false) => tracing::warn!(host = %notice.removed, "somebody says that this host was removed, and control has not signed that: it goes on"),
                Err(error) => tracing::error!(error = %error, "that this host was removed is not on disk, and it goes on until it is; tried again"),
            }
        }
        returning::tell_that_it_was_removed(&self.member.host);
    }

    /// Nobody has renewed for long: before the others refuse this host somebody has to look.
    fn tell_if_it_ends(&self) {
        let days = self.cluster.status().certificate_days_left;
        if (1..=WORTH_AN_ALARM_DAYS).contains(&days) {
            tracing::error!(
                days, control = %self.control(),
                "this host's certificate was not renewed for long and ends soon; the other hosts will refuse this one then: see that control runs and is reached"
            );
        }
    }

    /// Which control this host hears: where it is, and of which store.
    fn lineage(&self) -> (HostId, u64) {
        (self.control(), self.view.current().config.generation.incarnation)
    }

    /// The same for control's own host, which certifies itself.
    pub async fn keep_certified(self, settings: Settings, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = wall::pause(LOOK_AT_CERTIFICATE) => {}
            }
            if self.control() != self.member.host {
                return; // it was restored elsewhere, and that one certifies
            }
            self.tell_if_it_ends();
            let renewed = of_control(&settings, &self.dir).and_then(|member| Ok(self.cluster.renew(member.issued)?));
            if let Err(error) = renewed {
                tracing::error!(error = format!("{error:#}"), "this host's certificate could not be renewed");
            }
        }
    }

    /// Control was restored on another host: this one is a member like any other from now on, also after a restart and
    /// without what control had on its disk.
    pub fn is_member_of(&self, control: &HostId) -> anyhow::Result<()> {
        let mut member = Member::load(&self.dir)?.unwrap_or_else(|| self.member.clone());
        member.control = control.clone();
        member.said.controls = false;
        Ok(member.save(&self.dir)?)
    }

    async fn renew(&self, member: &Member, settings: &Settings, sealing_key: &str) -> anyhow::Result<Member> {
        let standing = Standing { region: member.region.clone(), machine_prefix: member.machine_prefix, epoch: member.epoch };
        let report = report(settings, sealing_key.to_owned(), &member.keys, self.cluster.advertised())?;
        let report = HostReport { standing: Some(standing), ..report };
        let report = serde_json::to_vec(&report)?;
        let has_ended = member.ended_ms_ago(super::now_ms()).is_some();
        if has_ended {
            // Kept is what control gives to a host that it knows by that certificate, which is the next thing that is asked for.
            let issued = returning::certified_anew(member, self.cluster.address(&self.control())).await?;
            self.cluster.show(&issued)?;
        }
        let answer = ask(&self.cluster, &self.control(), RENEW, &report).await?;
        let answer = crate::join::read(&answer)?;
        let renewed = Member { said: member.said.clone(), ..answer.member(member.host.clone(), member.keys.clone()) };
        self.cluster.renew(renewed.issued.clone())?;
        if has_ended {
            tracing::info!("this host has a certificate again: control knew its key");
        }
        Ok(renewed)
    }

    /// Returns once another process has this host's identity, with what to do about it.
    pub async fn silenced(&self) -> String {
        loop {
            if self.cluster.is_silenced()
                && let Some(why) = self.cluster.status().silenced
            {
                return why.to_string();
            }
            tokio::time::sleep(LOOK_AT_IDENTITY).await;
        }
    }

    /// Control tells all members what should be.
    pub fn publish(&self, data: &Path, incarnation: u64) -> anyhow::Result<()> {
        let authority = Authority::load_or_create(&authority_dir(data), super::now_ms())?;
        let (certificate, key) = authority.config_log(&self.member.region, incarnation);
        self.cluster.publish_config_of(certificate, key);
        Ok(())
    }

    /// What the cluster lends to control.
    pub fn lend(&self) -> dunlin_control::Fleet {
        let cluster = self.cluster.clone();
        dunlin_control::Fleet {
            addr: self.cluster.advertised(),
            is_up: self.is_up(),
            ask: Arc::new(move |question| {
                let cluster = cluster.clone();
                Box::pin(async move {
                    match question {
                        FleetQuestion::Status => {
                            serde_json::json!({ "host": cluster.host(), "cluster": cluster.status(), "members": cluster.members() })
                        }
                        FleetQuestion::Verify => serde_json::json!({ "host": cluster.host(), "unsound": cluster.verify().await }),
                    }
                })
            }),
            dial_back: self.dial_back(),
        }
    }

    /// Whether a host that joins is reached by this one.
    fn dial_back(&self) -> dunlin_control::DialBack {
        let cluster = self.cluster.clone();
        Arc::new(move |addr, keys| {
            let cluster = cluster.clone();
            Box::pin(async move { cluster.dial_back(addr, &keys).await })
        })
    }

    /// Whether a host answers control itself.
    pub fn probe(&self) -> dunlin_control::Probe {
        let cluster = self.cluster.clone();
        Arc::new(move |host: HostId| {
            let cluster = cluster.clone();
            Box::pin(async move { cluster.ping(&host, PROBE_WITHIN).await.is_ok() })
        })
    }

    pub fn is_up(&self) -> Arc<dyn Fn(&HostId) -> bool + Send + Sync> {
        let cluster = self.cluster.clone();
        Arc::new(move |host| cluster.is_up(host))
    }

    /// What the edge knows of machines elsewhere, and how far they are.
    pub fn routes(&self, region: Region) -> Arc<Routes> {
        let cluster = self.cluster.clone();
        let host = self.member.host.clone();
        let rtt = Box::new(move |host: &HostId| cluster.rtt(host));
        Routes::in_fleet(region, Elsewhere { host, rtt, see_detail: self.see_detail() })
    }

    /// Asks for what runs of an app in another region; it comes into the view.
    pub fn see_detail(&self) -> SeeDetail {
        let cluster = self.cluster.clone();
        Box::new(move |region: &Region, app: &AppName| cluster.see_detail(region, app))
    }

    /// From whom images are fetched: some near ones first, and then control, which has them all, before a large fleet is
    /// asked one by one for what is new.
    pub fn peers(&self) -> peer::Peers {
        let (cluster, fleet) = (self.cluster.clone(), self.clone());
        let dial: peer::Dial = Arc::new(move |host| {
            let (cluster, host) = (cluster.clone(), host.clone());
            Box::pin(async move { Ok(Box::new(cluster.open(&host, Service::Blob).await?) as Box<dyn peer::Duplex>) })
        });
        let (cluster, own) = (self.cluster.clone(), self.member.host.clone());
        peer::Peers::new(dial, move || {
            let others = cluster.members().into_iter().filter(|member| member.alive && member.id != own);
            let control = fleet.control();
            let mut near: Vec<_> = others.map(|member| (member.id == control, member.rtt_us.unwrap_or(u64::MAX), member.id)).collect();
            near.sort();
            if let Some((true, ..)) = near.last() && near.len() > ASKED_BEFORE_CONTROL {
                near[ASKED_BEFORE_CONTROL..].rotate_right(1);
            }
            near.into_iter().map(|(.., host)| host).collect()
        })
    }
}

fn dial(cluster: &Cluster, host: &HostId) -> remote::Dial {
    let (cluster, to) = (cluster.clone(), host.clone());
    Arc::new(move || {
        let (cluster, to) = (cluster.clone(), to.clone());
        Box::pin(async move { Ok(Box::new(cluster.open(&to, Service::Host).await?) as Box<dyn Duplex>) })
    })
}

/// What this host says of itself to control: when it joins, and at each start after that.
pub fn report(settings: &Settings, sealing_key: String, keys: &MemberKeys, addr: SocketAddr) -> anyhow::Result<HostReport> {
    Ok(HostReport {
        zone: settings.zone.clone(),
        labels: settings.labels.clone(),
        cpus: settings.cpus,
        memory_mb: settings.memory_mb,
        sealing_key,
        keys: keys.public()?,
        addr,
        version: crate::VERSION.into(),
        clock_ms: super::now_ms(),
        standing: None,
    })
}

enum Ask<'a> {
    Join(&'a [u8]),
    Renew(&'a HostId, &'a [u8]),
}

async fn enrolled(control: &OnceLock<Enrolment>, ask: Ask<'_>) -> Vec<u8> {
    match (control.get(), ask) {
        (None, _) => unavailable("control is still starting"),
        (Some(control), Ask::Join(request)) => control.join(request).await,
        (Some(control), Ask::Renew(host, report)) => control.renew(host, report).await,
    }
}

async fn ask(cluster: &Cluster, control: &HostId, what: u8, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let asked = async {
        let mut stream = cluster.open(control, Service::Join).await?;
        write_frame(&mut stream, &[&[what], body].concat()).await?;
        read_frame(&mut stream, MAX_JOIN_ANSWER_BYTES).await
    };
    tokio::time::timeout(ENROLLED_WITHIN, asked).await.map_err(std::io::Error::from).flatten()
}

fn unavailable(why: &str) -> Vec<u8> {
    let body = ErrorBody {
        error: why.to_owned(),
        status: ErrorCode::Unavailable,
        hint: Some("try again in a moment".into()),
        request_id: None,
    };
    serde_json::to_vec(&body).expect("plain data")
}

/// Machines of other hosts are asked for at their own host, over TCP.
pub fn of_edge(fleet: &Fleet, listener: TcpListener) -> dunlin_proxy::Fleet {
    let cluster = || fleet.cluster.clone();
    let (server, client, address, view) = (cluster(), cluster(), cluster(), fleet.view.clone());
    dunlin_proxy::Fleet {
        host: fleet.member.host.clone(),
        listeners: vec![listener],
        tls_server: Box::new(move || server.tls_server()),
        tls_client: Box::new(move || client.tls_client()),
        address: Box::new(move |host| address.address(host)),
        server_name: Cluster::server_name,
        peer_host: Box::new(move |certificates| {
            Cluster::peer_host(certificates).filter(|host| !view.current().config.removed_hosts.contains(host))
        }),
    }
}

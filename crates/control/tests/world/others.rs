//! Hosts beside the one where control is: each is a small host at the other end of pipes, which can be cut.

use super::{SmallHost, host_row};
use dunlin_api::HostApi;
use dunlin_api::remote::{Asker, Dial, Duplex, RemoteHost, serve};
use dunlin_cluster::{DialedBack, View};
use dunlin_control::operate::{NoAnswer, Operate};
use dunlin_control::{Fleet, Probe, Reach};
use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, Ipv4Prefix};
use dunlin_registry::ContentStore;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

#[derive(Clone)]
pub struct Others {
    hosts: Arc<BTreeMap<HostId, Other>>,
    pub dials: Arc<Dials>,
}

/// Hosts that join, as control dials them back.
pub struct Dials {
    /// What each dial shows.
    pub shows: Mutex<DialedBack>,
    /// Whom it was that was dialed.
    pub dialed: Mutex<Vec<SocketAddr>>,
    /// Dialing this one takes until it is another.
    pub holds: watch::Sender<Option<SocketAddr>>,
}

struct Other {
    host: Arc<SmallHost>,
    is_cut: watch::Sender<bool>,
    remote: Arc<RemoteHost>,
}

/// The `n`th host, in a region.
pub fn other_row(n: u8, region: &str) -> HostRow {
    HostRow {
        id: format!("h{n}").parse().unwrap(),
        region: region.parse().unwrap(),
        prefix: Ipv4Prefix { network: format!("10.20{n}.0.0").parse().unwrap(), length: 24 },
        ..host_row()
    }
}

impl Others {
    pub fn start(rows: &[HostRow], view: &View, data: &Path, content: &ContentStore) -> Self {
        let other = |row: &HostRow| {
            let host = SmallHost::start(row, view.clone(), data, content.clone());
            let (is_cut, watched) = watch::channel(false);
            let remote = Arc::new(RemoteHost::new(row.id.clone(), dial(host.clone(), watched)));
            (row.id.clone(), Other { host, is_cut, remote })
        };
        let shows = Mutex::new(DialedBack { udp: Ok(()), tcp: Ok(()) });
        let dials = Dials { shows, dialed: Mutex::default(), holds: watch::channel(None).0 };
        Self { hosts: Arc::new(rows.iter().map(other).collect()), dials: Arc::new(dials) }
    }

    pub fn host(&self, n: u8) -> &SmallHost {
        &self.hosts[&format!("h{n}").parse::<HostId>().unwrap()].host
    }

    /// Its power is cut, or comes back.
    pub fn set_dead(&self, n: u8, is_dead: bool) {
        let other = &self.hosts[&format!("h{n}").parse::<HostId>().unwrap()];
        other.host.frozen.store(is_dead, Ordering::SeqCst);
        other.is_cut.send_replace(is_dead);
    }

    fn is_cut(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|other| *other.is_cut.borrow())
    }

    pub fn reach(&self) -> Option<Reach> {
        let others = self.clone();
        Some(Arc::new(move |host: &HostId| Some(others.hosts.get(host)?.remote.clone() as Arc<dyn HostApi>)))
    }

    pub fn probe(&self) -> Option<Probe> {
        let others = self.clone();
        Some(Arc::new(move |host| {
            let answers = !others.is_cut(&host);
            Box::pin(async move { answers })
        }))
    }

    pub fn is_up(&self) -> Arc<dyn Fn(&HostId) -> bool + Send + Sync> {
        let others = self.clone();
        Arc::new(move |host| !others.is_cut(host))
    }

    pub fn fleet(&self) -> Fleet {
        let dials = self.dials.clone();
        Fleet {
            addr: "10.0.0.1:7373".parse().unwrap(),
            is_up: self.is_up(),
            ask: Arc::new(|question| Box::pin(async move { serde_json::json!({ "asked": format!("{question:?}") }) })),
            dial_back: Arc::new(move |addr, _| {
                let dials = dials.clone();
                Box::pin(async move {
                    dials.dialed.lock().unwrap().push(addr);
                    dials.holds.subscribe().wait_for(|held| *held != Some(addr)).await.unwrap();
                    dials.shows.lock().unwrap().clone()
                })
            }),
        }
    }
}

fn dial(host: Arc<SmallHost>, is_cut: watch::Receiver<bool>) -> Dial {
    Arc::new(move || {
        let (host, mut is_cut) = (host.clone() as Arc<dyn HostApi>, is_cut.clone());
        Box::pin(async move {
            if *is_cut.borrow() {
                std::future::pending::<()>().await; // nobody says no
            }
            let (here, there) = tokio::io::duplex(8 * 1024);
            tokio::spawn(async move {
                tokio::select! {
                    () = serve(there, host, Asker::Control) => {}
                    _ = is_cut.wait_for(|is_cut| *is_cut) => {}
                }
            });
            Ok(Box::new(here) as Box<dyn Duplex>)
        })
    })
}

pub fn all_played_by(small: &Arc<SmallHost>) -> Reach {
    let small = small.clone();
    Arc::new(move |_| Some(small.clone() as Arc<dyn HostApi>))
}

/// Hosts here have no server of their own that could be asked.
pub fn no_servers() -> Operate {
    Arc::new(|host, _, _| Box::pin(async move { Err(NoAnswer::Silent(format!("host {host} has no server here"))) }))
}

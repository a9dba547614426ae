//! The last hop: admits or refuses a request before any byte is forwarded, from the agent's own table.

use crate::Host;
use crate::agent::{Input, No};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use dunlin_api::{Admission, AdmitRefusal, AdmitRequest, LastHop};
use dunlin_machine::{Deny, Order, Record, Verb};
use dunlin_model::{Generation, MachineId, MachineState, MachineVersion, Source};
use dunlin_view::MachineFact;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// An agent that does not come to a start within this time has other worries.
const START_WITHIN_MS: u64 = 10_000;
/// A machine that exited so often before it was healthy is not waited for: as many as with deploys (`dunlin-planner`).
const MAX_EXITS: u32 = 3;

/// What a request is checked against. Replaced whole when the machine's state changes; counters are
/// shared by all replacements.
struct Entry {
    version: MachineVersion,
    placement: Generation,
    address: IpAddr,
    state: MachineState,
    cordoned: bool,
    hard_limit: Option<u32>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    in_flight: AtomicU32,
    /// The most at once since the last look.
    peak: AtomicU32,
    /// The newest start for a request; `None` in it until it is answered.
    start: Mutex<Option<watch::Receiver<Option<Started>>>>,
}

/// The sequence of the fact that first shows the start, or a later one.
type Started = Result<u64, AdmitRefusal>;

#[derive(Default)]
pub struct Table {
    entries: ArcSwap<HashMap<MachineId, Arc<Entry>>>,
    writer: Mutex<()>,
}

impl Table {
    /// Follows the record; from now on requests see the new state.
    pub fn set(&self, id: &MachineId, record: &Record) {
        let _guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.entries.load();
        let counters = old.get(id).map(|entry| entry.counters.clone()).unwrap_or_default();
        let spec = record.spec();
        let entry = Entry {
            version: spec.version.clone(),
            placement: record.assignment.placement,
            address: record.assignment.address.into(),
            state: record.state,
            cordoned: record.cordoned,
            hard_limit: spec.services.iter().filter_map(|service| service.concurrency.hard_limit).min(),
            counters,
        };
        let mut next: HashMap<_, _> = (**old).clone();
        next.insert(id.clone(), Arc::new(entry));
        self.entries.store(Arc::new(next));
    }

    pub fn remove(&self, id: &MachineId) {
        let _guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next: HashMap<_, _> = (**self.entries.load()).clone();
        next.remove(id);
        self.entries.store(Arc::new(next));
    }

    /// Requests now, and the most at once since this was asked before.
    pub fn load_of(&self, id: &MachineId) -> (u32, u32) {
        let Some(entry) = self.get(id) else { return (0, 0) };
        let now = entry.counters.in_flight.load(Ordering::Acquire);
        (now, entry.counters.peak.swap(now, Ordering::AcqRel).max(now))
    }

    /// Requests in it now.
    pub fn in_flight(&self, id: &MachineId) -> u32 {
        self.get(id).map_or(0, |entry| entry.counters.in_flight.load(Ordering::Acquire))
    }

    fn get(&self, id: &MachineId) -> Option<Arc<Entry>> {
        self.entries.load().get(id).cloned()
    }
}

/// Counts one request until it is dropped.
struct InFlight(Arc<Counters>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

#[async_trait]
impl LastHop for Host {
    fn admit(&self, request: &AdmitRequest) -> Result<Admission, AdmitRefusal> {
        let entry = self.shared.table.get(&request.machine).ok_or(AdmitRefusal::NotHere)?;
        if entry.version != request.version || request.placement > entry.placement {
            return Err(AdmitRefusal::OtherVersion);
        }
        if entry.cordoned {
            return Err(AdmitRefusal::Cordoned);
        }
        match entry.state {
            MachineState::Started => {}
            MachineState::Stopping | MachineState::Updating | MachineState::Destroying => {
                return Err(AdmitRefusal::Draining);
            }
            state if state.is_asleep() => return Err(AdmitRefusal::Asleep),
            _ => return Err(AdmitRefusal::NotRunning),
        }
        let guard = InFlight(entry.counters.clone());
        let in_flight = entry.counters.in_flight.fetch_add(1, Ordering::AcqRel) + 1;
        entry.counters.peak.fetch_max(in_flight, Ordering::AcqRel);
        if entry.hard_limit.is_some_and(|limit| in_flight > limit) {
            return Err(AdmitRefusal::AtLimit); // dropping the guard takes it back
        }
        Ok(Admission { address: SocketAddr::new(entry.address, request.internal_port), guard: Box::new(guard) })
    }

    async fn wake(&self, machine: &MachineId, deadline_ms: u64) -> Result<(), AdmitRefusal> {
        let entry = self.shared.table.get(machine).ok_or(AdmitRefusal::NotHere)?;
        if entry.cordoned {
            return Err(AdmitRefusal::Cordoned);
        }
        let left = Duration::from_millis(deadline_ms.saturating_sub(crate::now_ms()));
        let woken = tokio::time::timeout(left, self.until_healthy(machine, &entry.counters));
        woken.await.unwrap_or_else(|_| Err(AdmitRefusal::DidNotWake("it was not healthy in time".into())))
    }
}

impl Host {
    /// Starts it if it sleeps, now or once it has stopped; not again when it ends at once. One that goes on crashing is not
    /// waited for.
    async fn until_healthy(&self, machine: &MachineId, counters: &Counters) -> Result<(), AdmitRefusal> {
        let mut changes = self.shared.view.subscribe();
        let mut snapshot = changes.current();
        let mut started = None;
        loop {
            let fact = snapshot.machines.get(machine).ok_or(AdmitRefusal::NotHere)?;
            match (fact.state, started) {
                _ if fact.is_healthy() => return Ok(()),
                (MachineState::Failed | MachineState::Destroying | MachineState::Destroyed, _) => {
                    return Err(AdmitRefusal::DidNotWake(why_not(fact)));
                }
                (state, Some(since)) if state.is_asleep() && fact.sequence >= since => {
                    return Err(AdmitRefusal::DidNotWake(why_not(fact)));
                }
                // A start begins a new count. The try that is under way is waited for in any case: what was lacking may be
                // there by now.
                (MachineState::Restarting, since) if fact.restarts >= MAX_EXITS && since.is_none_or(|since| fact.sequence >= since) => {
                    return Err(AdmitRefusal::DidNotWake(format!("{}, {} times", why_not(fact), fact.restarts)));
                }
                (state, None) if state.is_asleep() => {
                    started = Some(self.start_for_requests(machine, counters).await?);
                    snapshot = changes.current();
                    continue;
                }
                _ => {}
            }
            snapshot = changes.changed().await;
        }
    }

    /// One start for a thousand waiting requests. It has a task of its own: the request that caused it may
    /// give up, the others still wait for it.
    async fn start_for_requests(&self, machine: &MachineId, counters: &Counters) -> Started {
        let mut answered = {
            let mut newest = counters.start.lock().unwrap_or_else(PoisonError::into_inner);
            match newest.as_ref().filter(|start| start.borrow().is_none() && start.has_changed().is_ok()) {
                Some(under_way) => under_way.clone(),
                None => {
                    let (answer, answered) = watch::channel(None);
                    *newest = Some(answered.clone());
                    let (inputs, machine) = (self.inputs.clone(), machine.clone());
                    tokio::spawn(async move {
                        let started = start(&inputs, machine).await;
                        let _ = answer.send(Some(started)); // nobody waits any more
                    });
                    answered
                }
            }
        };
        let answer = answered.wait_for(Option::is_some).await.map_err(|_| stopping())?;
        answer.clone().unwrap_or_else(|| Err(stopping()))
    }
}

fn stopping() -> AdmitRefusal {
    AdmitRefusal::DidNotWake("the host's agent is stopping".into())
}

async fn start(inputs: &mpsc::Sender<Input>, machine: MachineId) -> Started {
    static WAKES: AtomicU64 = AtomicU64::new(0);
    let n = WAKES.fetch_add(1, Ordering::Relaxed);
    let now_ms = crate::now_ms();
    let id = format!("wake.{machine}.{now_ms}.{n}").parse().expect("letters, digits and dots");
    let deadline_ms = now_ms + START_WITHIN_MS;
    let order = Order { id, deadline_ms, generation: None, plan: None, expected_version: None, nonce: None, source: Source::Proxy, request_id: None, verb: Verb::Wake, room: Ok(()) };
    let (reply, answer) = oneshot::channel();
    inputs.send(Input::Command { machine, order, reply }).await.map_err(|_| stopping())?;
    match answer.await.map_err(|_| stopping())? {
        Ok(asked) => Ok(asked.sequence),
        Err(No::Denied(Deny::NoRoom { why })) => Err(AdmitRefusal::InsufficientCapacity(why)),
        Err(No::Denied(Deny::Cordoned)) => Err(AdmitRefusal::Cordoned),
        Err(No::Denied(Deny::Leased { owner, .. })) => Err(AdmitRefusal::DidNotWake(format!("it is leased by {owner}"))),
        Err(No::Denied(Deny::Unconfirmed)) => Err(AdmitRefusal::DidNotWake(dunlin_machine::UNCONFIRMED.into())),
        Err(No::Denied(Deny::IllegalMove { .. } | Deny::Over)) => Err(AdmitRefusal::NotRunning),
        Err(No::Denied(deny)) => Err(AdmitRefusal::DidNotWake(format!("{deny:?}"))),
        Err(No::NotKnown) => Err(AdmitRefusal::DidNotWake("it is gone".into())),
        Err(No::DiskFull) => Err(AdmitRefusal::DidNotWake("the disk of its host is full".into())),
    }
}

fn why_not(fact: &MachineFact) -> String {
    let ended = fact.exit.as_ref().map(|exit| match (&exit.error, exit.exit_code, exit.signal) {
        (Some(error), ..) => error.clone(),
        (None, Some(code), _) => format!("it ended with exit code {code} before it was healthy"),
        (None, None, Some(signal)) => format!("it was ended by signal {signal} before it was healthy"),
        (None, None, None) => "it ended before it was healthy".to_owned(),
    });
    fact.problem.clone().or(ended).unwrap_or_else(|| "it failed to start".into())
}

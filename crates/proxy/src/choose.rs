//! From a request to an admitted place on a machine: routing, waking, waiting, asking the last hop.

use crate::access::Record;
use crate::answer::fault;
use crate::exchange::admit_request;
use crate::listen::{Edge, Worker};
use crate::queue::{Patience, Waiting};
use crate::request::{Request, Sender};
use crate::time::now_ms;
use crate::upstream::{Conn, Upstream};
use crate::wake::{wake, wake_beside};
use dunlin_api::{Admission, AdmitRefusal};
use dunlin_model::MachineId;
use dunlin_routing::{Availability, Candidate, Decision, Detail, Head, Reject, Route, Ticket, WaitReason};
use dunlin_view::Freshness;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How often a request that waits looks again although nothing was heard: other edges give places back, too.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The same where another host has to be asked: that is a request to it each time.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// The news that a host has just acted on reach this edge within this time, if any do.
const NEWS_WITHIN: Duration = Duration::from_millis(250);
/// Machines that one request is offered to before it is given up.
const MAX_OFFERS: u32 = 8;

/// A place on a machine: of a request until its answer has ended, or of a connection until it is closed. The
/// host's count goes down before the edge's (fields are dropped in their order): whoever gets the edge's ticket
/// then finds room at the host.
pub(crate) struct Held {
    /// `None`: the machine's host, which is another one, has it.
    _admission: Option<Admission>,
    ticket: Ticket,
    _freed: Freed,
}

/// Tells one that waits that a place is free.
struct Freed {
    worker: Weak<Worker>,
    target: Arc<Candidate>,
}

impl Drop for Freed {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.upgrade()
            && worker.edge.metrics.waiting.load(Relaxed) > 0
        {
            worker.edge.queues.freed(&self.target.app);
        }
    }
}

pub(crate) enum Choice {
    /// The record holds the place. The connection is one that has it already.
    Place(Upstream, Option<Box<Conn>>),
    ToHttps,
}

/// What one look at the table came to.
enum Look {
    Done(Result<Choice, Reject>),
    /// It sleeps: to be woken, and asked again.
    Wake { target: Arc<Candidate>, ticket: Ticket },
    Wait { route: Arc<Route>, reason: WaitReason },
    /// A host refused; the table may know another machine.
    Again,
}

/// What was learned while looking for a place.
#[derive(Default)]
pub(crate) struct Search {
    /// Machines that refused or failed, true for the table with this serial.
    tried: Vec<MachineId>,
    /// Machines whose host says that they are full: passed over until the next look.
    full: Vec<MachineId>,
    /// Another host has said so, and knows best when that changes.
    is_full_elsewhere: bool,
    serial: u64,
    /// Of other regions, that this request waits for.
    detail: Detail,
    offers: u32,
    /// One whose host has said that it is not what the table believes, and when a host first said so of any.
    outdated: Option<(Arc<Candidate>, Instant)>,
    /// One that sleeps on another host, as that host said.
    asleep: Option<(Arc<Candidate>, Ticket)>,
    /// The last one that was woken.
    woken: Option<MachineId>,
    waiting: Option<Waiting>,
    patience: Patience,
    /// The table's news, once the request has waited.
    changed: Option<watch::Receiver<u64>>,
    /// Told to the client when nothing better comes.
    pub last_fault: Option<Box<Reject>>,
}

/// Nearly always the first look finds a place; what takes longer is boxed.
pub(crate) async fn choose(
    worker: &Rc<Worker>,
    record: &mut Record,
    search: &mut Search,
) -> Result<Choice, Reject> {
    if let Some(conn) = own(worker, record) {
        return Ok(Choice::Place(conn.to.clone(), Some(Box::new(conn))));
    }
    let first = match search.asleep.take() {
        Some((target, ticket)) => Look::Wake { target, ticket },
        None => search.look(worker, record),
    };
    match first {
        Look::Done(choice) => choice,
        first => Box::pin(search.look_until_done(worker, record, first)).await,
    }
}

/// A kept connection of this client to a machine where a request for this app may go.
fn own(worker: &Worker, record: &mut Record) -> Option<Conn> {
    let Record { request, client, .. } = record;
    if request.force_region.is_some() || request.prefer_region.is_some() {
        return None;
    }
    let table = worker.edge.routes.load();
    let route = table.find(&request.host)?;
    let wanted = request.force_instance.as_deref().or(request.prefer_instance.as_deref());
    let (conn, held) = worker.pool.take_own(client.id, |target| {
        let is_current = |c: &&Arc<Candidate>| c.machine == target.machine && c.version == target.version;
        let current = route.candidates.iter().find(is_current);
        current.is_some_and(|c| c.availability == Availability::Ready && c.service == target.service)
            && wanted.is_none_or(|wanted| wanted == target.machine.as_str())
            && (client.is_tls || !route.force_https)
    })?;
    record.route = Some(route.clone());
    record.held = Some(held);
    if let Upstream::Machine { target, .. } = &conn.to {
        worker.edge.routes.see(&target.region, &target.app);
        record.target = Some(target.clone());
    }
    Some(conn)
}

impl Search {
    pub fn begin() -> Self {
        Self { detail: Detail::OfTheBest, ..Self::default() }
    }

    pub fn failed(&mut self, machine: &MachineId, fault: Reject) {
        self.tried.push(machine.clone());
        self.last_fault = Some(Box::new(fault));
    }

    async fn look_until_done(
        &mut self,
        worker: &Rc<Worker>,
        record: &mut Record,
        mut look: Look,
    ) -> Result<Choice, Reject> {
        let edge = &worker.edge;
        loop {
            match look {
                Look::Done(choice) => return choice,
                Look::Again => {}
                Look::Wake { target, ticket } => {
                    self.queue(edge, record.route.as_ref())?;
                    let woken = wake(worker, &target, self.patience.until(edge)).await;
                    self.woken = Some(target.machine.clone());
                    match woken.and_then(|()| admit(edge, &target)) {
                        Ok(admission) => return Ok(self.place(worker, record, (target, ticket, admission))),
                        Err(refusal) => {
                            drop(ticket);
                            self.refused(record, &target, &refusal)?;
                            self.end_if_late(edge)?;
                        }
                    }
                }
                Look::Wait { route, reason } => {
                    self.queue(edge, Some(&route))?;
                    if reason == WaitReason::AtLimit {
                        worker.pool.give_up_kept(&route.app);
                    }
                    self.wait(edge, &route, reason).await?;
                }
            }
            look = self.look(worker, record);
        }
    }

    fn look(&mut self, worker: &Rc<Worker>, record: &mut Record) -> Look {
        let edge = &worker.edge;
        let (target, ticket) = match self.route(worker, record) {
            Decision::Redirect { .. } => return Look::Done(Ok(Choice::ToHttps)),
            Decision::Reject(reject) => return Look::Done(Err(self.last_fault.take().map_or(reject, |fault| *fault))),
            Decision::Wake { target, ticket } => {
                edge.routes.see(&target.region, &target.app);
                record.preferred_unavailable = false;
                return Look::Wake { target, ticket };
            }
            Decision::Wait { route, reason } => {
                if let Some(look) = self.ask_who_knows_better(worker, record) {
                    return look;
                }
                let reason = if self.full.is_empty() { reason } else { WaitReason::AtLimit };
                self.full.clear();
                self.look_further(worker, record, &route);
                return Look::Wait { route, reason };
            }
            Decision::Forward { target, ticket, preferred_unavailable, look_further, also_wake } => {
                edge.routes.see(&target.region, &target.app);
                if look_further && let Some(route) = &record.route {
                    self.look_further(worker, record, route);
                }
                if let Some(other) = also_wake {
                    wake_beside(worker, &other);
                }
                record.preferred_unavailable = preferred_unavailable;
                (target, ticket)
            }
        };
        match admit(edge, &target) {
            Ok(admission) => Look::Done(Ok(self.place(worker, record, (target, ticket, admission)))),
            // It went to sleep since the table was made.
            Err(AdmitRefusal::Asleep) if target.service.autostart => Look::Wake { target, ticket },
            Err(refusal) => match self.refused(record, &target, &refusal) {
                Ok(()) => Look::Again,
                Err(reject) => Look::Done(Err(reject)),
            },
        }
    }

    fn route(&mut self, worker: &Worker, record: &mut Record) -> Decision {
        let Record { request, route, client, .. } = record;
        let head = self.head(request, client.is_tls);
        let routes = &worker.edge.routes;
        let table = routes.load();
        if table.serial != self.serial {
            self.serial = table.serial;
            self.tried.clear();
        }
        if route.is_none() {
            *route = table.find(head.host).cloned();
        }
        let random = worker.random.next();
        if self.full.is_empty() {
            return table.route(&head, &self.tried, random, now_ms());
        }
        table.route(&head, &[&self.tried[..], &self.full].concat(), random, now_ms())
    }

    /// No machine is as the table believes, and no news have come: this edge hears too little. A host that has refused knows
    /// at least that, and its edge chooses.
    fn ask_who_knows_better(&mut self, worker: &Rc<Worker>, record: &mut Record) -> Option<Look> {
        self.outdated.as_ref().filter(|(_, since)| may_choose_another(record) && since.elapsed() >= NEWS_WITHIN)?;
        let (target, _) = self.outdated.take()?;
        let ticket = target.load.reserve(None)?;
        let to = Upstream::Hop { target: target.clone(), is_doubtful: true };
        Some(Look::Done(Ok(self.hold(worker, record, to, (target, ticket, None)))))
    }

    /// Asks for the detail of other regions that may have something for the request. It does not wait for it.
    fn look_further(&self, worker: &Worker, record: &Record, route: &Route) {
        let head = self.head(&record.request, record.client.is_tls);
        route.look_into(&head).into_iter().for_each(|region| worker.edge.routes.see(region, &route.app));
    }

    fn head<'r>(&self, request: &'r Request, is_tls: bool) -> Head<'r> {
        Head {
            host: &request.host,
            is_tls,
            force_instance: request.force_instance.as_deref(),
            prefer_instance: request.prefer_instance.as_deref(),
            force_region: request.force_region.as_deref(),
            prefer_region: request.prefer_region.as_deref(),
            detail: self.detail,
        }
    }

    fn place(
        &mut self,
        worker: &Rc<Worker>,
        record: &mut Record,
        (target, ticket, admission): (Arc<Candidate>, Ticket, Option<Admission>),
    ) -> Choice {
        let to = match &admission {
            Some(Admission { address, .. }) => Upstream::Machine { target: target.clone(), address: *address },
            None => {
                let is_doubtful = target.freshness != Freshness::Fresh && may_choose_another(record);
                Upstream::Hop { target: target.clone(), is_doubtful }
            }
        };
        self.hold(worker, record, to, (target, ticket, admission))
    }

    fn hold(
        &mut self,
        worker: &Rc<Worker>,
        record: &mut Record,
        to: Upstream,
        (target, ticket, admission): (Arc<Candidate>, Ticket, Option<Admission>),
    ) -> Choice {
        self.waiting = None;
        let freed = Freed { worker: Rc::downgrade(worker), target: target.clone() };
        record.target = Some(target);
        record.held = Some(Held { _admission: admission, ticket, _freed: freed });
        Choice::Place(to, None)
    }

    /// The machine's host, which is another one, did not take the request that was sent to it.
    pub fn refused_elsewhere(
        &mut self,
        record: &Record,
        target: &Arc<Candidate>,
        held: Option<Held>,
        refusal: &AdmitRefusal,
    ) -> Result<(), Reject> {
        let may_wake = *refusal == AdmitRefusal::Asleep && target.service.autostart;
        if may_wake && self.woken.as_ref() != Some(&target.machine)
            && let Some(Held { ticket, .. }) = held
        {
            // It went to sleep since the table was made.
            self.asleep = Some((target.clone(), ticket));
            return Ok(());
        }
        if matches!(refusal, AdmitRefusal::NotHere | AdmitRefusal::OtherVersion) {
            let since = self.outdated.as_ref().map_or_else(Instant::now, |(_, since)| *since);
            self.outdated = Some((target.clone(), since));
        }
        self.is_full_elsewhere |= *refusal == AdmitRefusal::AtLimit;
        self.refused(record, target, refusal)
    }

    fn refused(&mut self, record: &Record, target: &Candidate, refusal: &AdmitRefusal) -> Result<(), Reject> {
        let (id, machine) = (record.request.id.as_str(), &target.machine);
        tracing::debug!(request_id = id, %machine, %refusal, "refused by the last hop");
        if *refusal == AdmitRefusal::AtLimit {
            // Nothing is wrong with it: other edges send it requests, too, and a place becomes free again.
            self.full.push(machine.clone());
            return Ok(());
        }
        self.failed(machine, why(target, refusal));
        self.count_offer()
    }

    fn count_offer(&mut self) -> Result<(), Reject> {
        self.offers += 1;
        if self.offers <= MAX_OFFERS {
            return Ok(());
        }
        Err(self.last_fault.take().map_or_else(
            || fault(503, "PR09", "no machine took the request", "`dunlin status` shows the machines' states"),
            |fault| *fault,
        ))
    }

    /// Several machines that do not wake take no longer than one.
    fn end_if_late(&mut self, edge: &Edge) -> Result<(), Reject> {
        if Instant::now() < self.patience.until(edge) {
            return Ok(());
        }
        Err(self.last_fault.take().map_or_else(
            || fault(503, "PR09", "no machine took the request in time", "`dunlin status` shows the machines' states"),
            |fault| *fault,
        ))
    }

    /// Takes a place in the bounded queue, once.
    fn queue(&mut self, edge: &Arc<Edge>, route: Option<&Arc<Route>>) -> Result<(), Reject> {
        if self.waiting.is_none() {
            self.waiting = Some(Waiting::begin(edge, route)?);
        }
        Ok(())
    }

    async fn wait(&mut self, edge: &Edge, route: &Route, reason: WaitReason) -> Result<(), Reject> {
        let Some(changed) = &mut self.changed else {
            // Look once more after subscribing: no change is missed.
            self.changed = Some(edge.routes.subscribe());
            return Ok(());
        };
        let left = self.patience.left(reason, Instant::now(), edge.limits.wait_timeout);
        let instead = match reason {
            WaitReason::Detail => Some(Detail::OfMany),
            WaitReason::MoreDetail => Some(Detail::OfNone),
            _ => None,
        };
        if left.is_zero() && let Some(instead) = instead {
            self.detail = instead; // it did not come
            return Ok(());
        }
        if left.is_zero() {
            return Err(self.last_fault.take().map_or_else(|| reason.reject(route), |fault| *fault));
        }
        let again = if self.is_full_elsewhere { ASK_AGAIN } else { LOOK_AGAIN };
        let freed = async {
            match &self.waiting {
                Some(Waiting { freed: Some(freed), .. }) => freed.notified().await,
                _ => std::future::pending().await,
            }
        };
        // Whatever happens first: it means to look again.
        tokio::select! {
            () = freed => {}
            _ = changed.changed() => {}
            () = tokio::time::sleep(again.min(left)) => {}
        }
        Ok(())
    }
}

/// Once, and only if the client does not insist on a machine or a place.
fn may_choose_another(record: &Record) -> bool {
    let request = &record.request;
    request.sender == Sender::Client && request.force_instance.is_none() && request.force_region.is_none()
}

/// `None`: its host, which is another one, admits when it gets the request.
fn admit(edge: &Edge, target: &Candidate) -> Result<Option<Admission>, AdmitRefusal> {
    if edge.is_elsewhere(target) {
        return Ok(None);
    }
    edge.last_hop.admit(&admit_request(target)).map(Some)
}

fn why(target: &Candidate, refusal: &AdmitRefusal) -> Reject {
    let Candidate { app, machine, .. } = target;
    let hint = format!("`dunlin status -a {app}` and `dunlin logs -a {app} --machine {machine}` show why");
    let code = match refusal {
        AdmitRefusal::DidNotWake(_) => "PM01",
        AdmitRefusal::InsufficientCapacity(_) => "PM02",
        _ => "PM03",
    };
    fault(503, code, format!("machine {machine} of app {app} did not take the request: {refusal}"), hint)
}

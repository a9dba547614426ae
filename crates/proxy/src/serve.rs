//! One request, from its head to the end of its answer.

use crate::access::Record;
use crate::answer::{self, fault};
use crate::choose::{Choice, Search, choose};
use crate::downstream::Downstream;
use crate::exchange::{ClientFault, Exchange, Fault};
use crate::last_hop;
use crate::listen::Worker;
use crate::metrics::count;
use crate::reply::Notes;
use crate::request::Sender;
use crate::time::now_ms;
use crate::upstream::{Conn, Upstream, is_own_fault};
use dunlin_model::AppName;
use dunlin_routing::{Candidate, Reject};
use dunlin_view::Freshness;
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::{Duration, Instant};

/// Machines that a request is sent to in vain before it is given up.
const MAX_ATTEMPTS: u32 = 4;
/// Builds and log streams of the API may be silent for long before they answer.
const INTERNAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Between lines in the log that say the same.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

pub(crate) async fn serve(mut record: Box<Record>, down: &mut Downstream<'_>) {
    let worker = &record.worker.clone();
    if record.request.sender == Sender::Edge {
        return Box::pin(last_hop::serve(worker, &mut record, down)).await;
    }
    let served = match handle(worker, &mut record, down).await {
        Ok(()) => Ok(()),
        Err(End::Refused(reject)) => {
            record.code = reject.code;
            record.status = reject.status;
            Box::pin(answer::refuse(worker, &record.request, &reject, down)).await
        }
        Err(End::ToHttps) => {
            record.status = 308;
            Box::pin(answer::to_https(worker, &record.request, down)).await
        }
        Err(End::Broken(error)) => Err(error),
    };
    match served {
        Ok(()) => record.is_complete = true,
        Err(error) => {
            tracing::debug!(request_id = record.request.id.as_str(), %error, "an answer broke off");
            down.fail();
        }
    }
}

/// How a request ends that was not answered by a machine.
pub(crate) enum End {
    Refused(Reject),
    ToHttps,
    /// Nobody is there to be told anything.
    Broken(io::Error),
}

impl From<Reject> for End {
    fn from(reject: Reject) -> Self {
        Self::Refused(reject)
    }
}

async fn handle(worker: &Rc<Worker>, record: &mut Record, down: &mut Downstream<'_>) -> Result<(), End> {
    if let Some(fault) = record.request.fault.take() {
        return Err(End::Refused(*fault));
    }
    if let Some(socket) = worker.edge.internal.get(&*record.request.host) {
        return Box::pin(internal(worker, record, down, socket.clone())).await;
    }
    to_a_machine(worker, record, down).await
}

/// Looks for a machine of the app until one has answered.
pub(crate) async fn to_a_machine(worker: &Rc<Worker>, record: &mut Record, down: &mut Downstream<'_>) -> Result<(), End> {
    let timeout = worker.edge.limits.response_timeout;
    let mut search = Search::begin();
    let mut may_repeat = record.request.may_repeat();
    while record.attempts < MAX_ATTEMPTS {
        record.attempts += 1;
        if record.attempts > 1 {
            count(&worker.counters.retries);
        }
        let (to, own) = match unless_gone(down, pin!(choose(worker, record, &mut search))).await?? {
            Choice::Place(to, own) => (to, own),
            Choice::ToHttps => return Err(End::ToHttps),
        };
        let fault = match forward(worker, record, down, (&to, own), timeout).await {
            Ok(()) => return Ok(()),
            Err(Unanswered::Broken(error)) => return Err(End::Broken(error)),
            Err(Unanswered::Fault(fault)) => fault,
        };
        let held = record.held.take();
        let Some(target) = record.target.clone() else { return Err(lost().into()) };
        let load = &target.load;
        match fault {
            Fault::Client(fault) => return Err(blamed(fault)),
            Fault::TooSlow => {
                load.record_failure(now_ms());
                return Err(too_slow(&target.app, timeout).into());
            }
            Fault::Refused(refusal) => {
                record.attempts -= 1; // nothing was sent, and the search has a bound of its own
                search.refused_elsewhere(record, &target, held, &refusal)?;
            }
            Fault::Unsent(error) if is_own_fault(&error) => return Err(out_of_sockets(worker, &error).into()),
            Fault::Unsent(error) if worker.edge.is_elsewhere(&target) => {
                target.host_load.record_failure(now_ms());
                let (id, host) = (record.request.id.as_str(), &target.host);
                tracing::debug!(request_id = id, %host, %error, "host not reached");
                search.failed(&target.machine, host_not_reached(&target, &error));
            }
            Fault::Unsent(error) | Fault::Unreached(error) => {
                load.record_failure(now_ms());
                let (id, machine) = (record.request.id.as_str(), &target.machine);
                tracing::debug!(request_id = id, %machine, %error, "not reached");
                search.failed(machine, not_reached(&target, &error));
            }
            // It may have arrived all the same, so it goes elsewhere only if that does no harm; then as often as need be.
            Fault::Broken { error, .. } if is_silence(worker, &target, &error) => {
                let broken = broke_off(&target, &error);
                if !record.request.may_repeat() {
                    return Err(broken.into());
                }
                search.failed(&target.machine, broken);
            }
            Fault::Broken { error, was_kept } => {
                let broken = broke_off(&target, &error);
                if !was_kept {
                    load.record_failure(now_ms());
                    search.failed(&target.machine, broken.clone());
                }
                // Only what changes nothing, and only once: it may have been carried out.
                if !std::mem::take(&mut may_repeat) {
                    return Err(broken.into());
                }
            }
        }
    }
    Err(search.last_fault.map_or_else(lost, |fault| *fault).into())
}

/// Whether another host acknowledges nothing: then others are asked first, and no connection to it is used any more.
fn is_silence(worker: &Worker, target: &Candidate, error: &io::Error) -> bool {
    let is_silent = error.kind() == io::ErrorKind::TimedOut && worker.edge.is_elsewhere(target);
    if is_silent {
        target.host_load.record_failure(now_ms());
        worker.pool.drop_host(&target.host);
        tracing::debug!(host = %target.host, %error, "host silent");
    }
    is_silent
}

/// Why a request was not answered, or not to the end.
pub(crate) enum Unanswered {
    /// The client has seen nothing of an answer yet.
    Fault(Fault),
    /// The answer had begun.
    Broken(io::Error),
}

/// Sends the request, and passes the answer on to its end.
pub(crate) async fn forward(
    worker: &Rc<Worker>,
    record: &mut Record,
    down: &mut Downstream<'_>,
    (to, mut own): (&Upstream, Option<Box<Conn>>),
    timeout: Duration,
) -> Result<(), Unanswered> {
    loop {
        let kept = match to.counts_connections() {
            true => own.take().map(|own| *own).or_else(|| worker.pool.take_left(to)),
            false => worker.pool.take(to),
        };
        let mut conn = match kept {
            Some(conn) => conn,
            None => match unless_gone(down, Box::pin(worker.pool.connect(to)).as_mut()).await {
                Ok(Ok(conn)) => conn,
                Ok(Err(error)) => return Err(Unanswered::Fault(Fault::Unsent(error))),
                Err(_) => return Err(Unanswered::Fault(Fault::Client(ClientFault::Gone))),
            },
        };
        let was_reused = conn.is_reused;
        let mut exchange = Exchange::new(worker, &record.request, &record.traffic, down, &mut conn);
        exchange.admission = record.admission.take();
        let notes = Notes {
            preferred_unavailable: record.request.prefer_instance.as_deref().filter(|_| record.preferred_unavailable),
            stale: stale(worker, record),
        };
        let status = match exchange.head(timeout, notes).await {
            Ok(status) => status,
            Err(fault) => {
                record.admission = exchange.admission.take();
                let may_keep = exchange.may_keep();
                drop(exchange);
                if matches!(fault, Fault::Unsent(_)) && was_reused {
                    continue; // the other side had just closed it: the next one, or a new one
                }
                if matches!(fault, Fault::Refused(_) | Fault::Unreached(_)) && may_keep {
                    worker.pool.keep(conn);
                }
                return Err(Unanswered::Fault(fault));
            }
        };
        if matches!(to, Upstream::Hop { .. }) {
            count(&worker.counters.hop_sent);
        }
        record.status = status;
        if record.request.sender == Sender::Client {
            worker.counters.head_seconds.observe(record.started.elapsed());
        }
        if let Some(target) = &record.target {
            target.load.record_success();
            target.host_load.record_success();
            if target.freshness == Freshness::Old {
                count(&worker.counters.stale);
            }
        }
        let passed = if status == 101 {
            let _tunnel = Tunnel::begin(worker);
            Box::pin(exchange.tunnel()).await
        } else {
            exchange.body().await
        };
        let (is_whole, may_keep) = (exchange.is_whole(), exchange.may_keep());
        drop(exchange);
        if passed.is_ok() && may_keep {
            match record.held.take_if(|_| to.counts_connections()) {
                Some(held) => worker.pool.keep_own(record.client.id, conn, held),
                None => worker.pool.keep(conn),
            }
        } else if passed.is_ok() && is_whole {
            worker.pool.part(conn);
        }
        return passed.map_err(Unanswered::Broken);
    }
}

/// Whether what the edge knew of the machine may be long past, and why.
fn stale(worker: &Worker, record: &Record) -> Option<&'static str> {
    match &record.target {
        Some(target) if target.freshness == Freshness::Old => Some("old"),
        Some(_) if worker.edge.routes.load().is_cut_off => Some("cut-off"),
        _ => None,
    }
}

/// Counts an upgraded connection while it lives.
struct Tunnel<'a>(&'a AtomicUsize);

impl<'a> Tunnel<'a> {
    fn begin(worker: &'a Worker) -> Self {
        let tunnels = &worker.edge.metrics.tunnels;
        tunnels.fetch_add(1, Relaxed);
        Self(tunnels)
    }
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// To a part of this server that listens at a unix socket.
async fn internal(
    worker: &Rc<Worker>,
    record: &mut Record,
    down: &mut Downstream<'_>,
    socket: Arc<Path>,
) -> Result<(), End> {
    let client = &record.client;
    if !client.is_tls && !client.address.ip().is_loopback() {
        // What is asked here carries a token, which the network between must not see.
        let hint = "use the same address with https://, and replace the token that was sent in clear";
        return Err(fault(403, "PI04", "the platform's own API and registry answer over TLS only", hint).into());
    }
    let hint = "the apps go on meanwhile; `systemctl status dunlin` and its log show what the server does";
    let refusal = |status, code, reason| End::Refused(fault(status, code, reason, hint));
    match forward(worker, record, down, (&Upstream::Internal(socket), None), INTERNAL_RESPONSE_TIMEOUT).await {
        Ok(()) => Ok(()),
        Err(Unanswered::Broken(error)) => Err(End::Broken(error)),
        Err(Unanswered::Fault(fault)) => Err(match fault {
            Fault::Client(fault) => blamed(fault),
            Fault::Unsent(error) | Fault::Unreached(error) => {
                refusal(503, "PI01", format!("the control plane does not answer: {error}"))
            }
            Fault::Broken { error, .. } => refusal(502, "PI02", format!("the control plane broke off: {error}")),
            Fault::TooSlow | Fault::Refused(_) => refusal(504, "PI03", "the control plane did not answer in time".into()),
        }),
    }
}

/// Waits for something, unless the client leaves meanwhile.
pub(crate) async fn unless_gone<T>(down: &mut Downstream<'_>, mut future: Pin<&mut impl Future<Output = T>>) -> Result<T, End> {
    poll_fn(|cx| {
        if let Poll::Ready(done) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(done));
        }
        down.poll_gone(cx).map(|()| Err(blamed(ClientFault::Gone)))
    })
    .await
}

fn blamed(fault: ClientFault) -> End {
    let (status, reason) = match fault {
        ClientFault::Gone => {
            return End::Broken(io::Error::new(io::ErrorKind::ConnectionReset, "the client left before its answer"));
        }
        ClientFault::Silent => (408, "the request's body ended before it was complete".to_owned()),
        ClientFault::Malformed(reason) => (400, reason),
    };
    End::Refused(self::fault(status, "PC02", reason, "send the whole body, without long pauses"))
}

fn host_not_reached(target: &Candidate, error: &io::Error) -> Reject {
    let Candidate { app, machine, host, .. } = target;
    fault(
        502,
        "PU05",
        format!("host {host}, which has machine {machine} of app {app}, is not reached: {error}"),
        "try again; `dunlin hosts list` shows which hosts are up",
    )
}

fn not_reached(target: &Candidate, error: &io::Error) -> Reject {
    let (app, machine, port) = (&target.app, &target.machine, target.service.internal_port);
    fault(
        502,
        "PU01",
        format!("machine {machine} of app {app} does not accept connections on port {port}: {error}"),
        format!("the app must listen on 0.0.0.0:{port} (internal_port); `dunlin logs -a {app}` shows what it does"),
    )
}

fn broke_off(target: &Candidate, error: &io::Error) -> Reject {
    let (app, machine) = (&target.app, &target.machine);
    fault(
        502,
        "PU02",
        format!("machine {machine} of app {app} closed the connection before it answered: {error}"),
        format!("the request may have been carried out; `dunlin logs -a {app} --machine {machine}` shows what happened"),
    )
}

fn too_slow(app: &AppName, limit: Duration) -> Reject {
    fault(
        504,
        "PU03",
        format!("app {app} did not begin to answer within {} s", limit.as_secs()),
        format!("the request may still be carried out; `dunlin logs -a {app}` shows what it does"),
    )
}

fn out_of_sockets(worker: &Worker, error: &io::Error) -> Reject {
    // A person must look, but not at a line for each request.
    let now = Instant::now();
    if worker.complained.get().is_none_or(|last| now - last > COMPLAINT_INTERVAL) {
        worker.complained.set(Some(now));
        tracing::error!(%error, "no connection to a machine can be made: this server has run out of sockets");
    }
    fault(
        503,
        "PI05",
        format!("this server cannot open another connection: {error}"),
        "try again in a moment; its operator raises the limit of open files (LimitNOFILE, ulimit -n)",
    )
}

fn lost() -> Reject {
    fault(502, "PU04", "every attempt to forward the request failed", "try again; `dunlin status` shows the machines")
}

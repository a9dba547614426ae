//! The last hop for other edges: admits what they ask for from this host's own table, and forwards it to the machine.
//!
//! One attempt: where it fails, the edge is told how, and looks elsewhere itself; unless it knows that it knows little, and
//! has asked for another machine then. The head is passed on as it came, since
//! a member made it.

use crate::access::Record;
use crate::answer;
use crate::downstream::Downstream;
use crate::exchange::Fault;
use crate::hop::{Ask, Denial, What};
use crate::listen::Worker;
use crate::metrics::count;
use crate::serve::{End, Unanswered, forward, to_a_machine, unless_gone};
use crate::time::now_ms;
use crate::upstream::Upstream;
use dunlin_api::AdmitRefusal;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// The edge counts the same time, and its word is the client's answer: it goes first.
const EDGE_FIRST: Duration = Duration::from_secs(5);

pub(crate) async fn serve(worker: &Rc<Worker>, record: &mut Record, down: &mut Downstream<'_>) {
    if let Err(error) = handle(worker, record, down).await {
        tracing::debug!(request_id = record.request.id.as_str(), %error, "an answer to another edge broke off");
        down.fail();
    }
}

async fn handle(worker: &Rc<Worker>, record: &mut Record, down: &mut Downstream<'_>) -> io::Result<()> {
    if !record.client.is_member(&worker.edge) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "whoever asks is no member"));
    }
    if let Some(fault) = record.request.fault.take() {
        return answer::refuse(worker, &record.request, &fault, down).await;
    }
    let done = match record.request.hop.take().map(|ask| *ask) {
        None => Err(Stop::Denied(Denial::not_understood())),
        Some(ask @ Ask { what: What::Wake, .. }) => wake(worker, &ask, down).await,
        Some(ask) => pass_on(worker, record, ask, down).await,
    };
    match done {
        Ok(Passed::Answer) => Ok(()),
        Ok(Passed::Woken) => answer::short(worker, &record.request, 200, &[], down).await,
        Err(Stop::Denied(denial)) => {
            count(&worker.counters.hop_denied);
            let fields = denial.fields();
            let fields = fields.each_ref().map(|(name, value)| (*name, value.as_str()));
            answer::short(worker, &record.request, denial.status(), &fields, down).await
        }
        Err(Stop::Broken(error)) => Err(error),
    }
}

enum Passed {
    Answer,
    Woken,
}

enum Stop {
    Denied(Denial),
    /// The edge has left, or its answer broke off.
    Broken(io::Error),
}

impl From<AdmitRefusal> for Stop {
    fn from(refusal: AdmitRefusal) -> Self {
        Self::Denied(Denial::Refused(refusal))
    }
}

impl From<Denial> for Stop {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

async fn wake(worker: &Rc<Worker>, ask: &Ask, down: &mut Downstream<'_>) -> Result<Passed, Stop> {
    let deadline_ms = now_ms() + ask.wait.as_millis() as u64;
    let waking = tokio::time::timeout(ask.wait, worker.edge.last_hop.wake(&ask.admit.machine, deadline_ms));
    match unless_gone(down, pin!(waking)).await {
        Ok(Ok(woken)) => Ok(woken.map(|()| Passed::Woken)?),
        Ok(Err(_)) => Err(AdmitRefusal::DidNotWake(format!("not started within {} s", ask.wait.as_secs())).into()),
        Err(_) => Err(Stop::Broken(io::ErrorKind::ConnectionReset.into())),
    }
}

/// What an edge that hears of this host would know.
fn is_news(refusal: &AdmitRefusal) -> bool {
    use AdmitRefusal::{Cordoned, Draining, NotHere, NotRunning, OtherVersion};
    matches!(refusal, NotHere | OtherVersion | NotRunning | Draining | Cordoned)
}

/// As if the client had come to this edge, but that it is not sent on once more.
async fn to_another(worker: &Rc<Worker>, record: &mut Record, down: &mut Downstream<'_>) -> Result<Passed, Stop> {
    count(&worker.counters.hop_rerouted);
    match to_a_machine(worker, record, down).await {
        Ok(()) => Ok(Passed::Answer),
        Err(End::Refused(reject)) => {
            let told = answer::refuse(worker, &record.request, &reject, down).await;
            told.map(|()| Passed::Answer).map_err(Stop::Broken)
        }
        // The connection between edges is TLS, so nobody is sent there.
        Err(End::ToHttps) => Err(Denial::Unreached("the app answers over https only".into()).into()),
        Err(End::Broken(error)) => Err(Stop::Broken(error)),
    }
}

async fn pass_on(worker: &Rc<Worker>, record: &mut Record, ask: Ask, down: &mut Downstream<'_>) -> Result<Passed, Stop> {
    let (once, or_another) = match ask.what {
        What::Forward { once, or_another, .. } => (once, or_another),
        What::Wake => (false, false),
    };
    let admission = match worker.edge.last_hop.admit(&ask.admit) {
        Ok(admission) => admission,
        Err(refusal) if or_another && is_news(&refusal) => return Box::pin(to_another(worker, record, down)).await,
        Err(refusal) => return Err(refusal.into()),
    };
    let to = Upstream::Admitted { version: ask.admit.version, address: admission.address, once };
    record.admission = Some(admission);
    let timeout = worker.edge.limits.response_timeout + EDGE_FIRST;
    let mut may_repeat = record.request.may_repeat();
    loop {
        let fault = match forward(worker, record, down, (&to, None), timeout).await {
            Ok(()) => return Ok(Passed::Answer),
            Err(Unanswered::Broken(error)) => return Err(Stop::Broken(error)),
            Err(Unanswered::Fault(fault)) => fault,
        };
        return Err(match fault {
            // As the edge does with kept connections of its own: that it broke says nothing of the machine.
            Fault::Broken { was_kept: true, .. } if std::mem::take(&mut may_repeat) => continue,
            Fault::Broken { error, was_kept } => Denial::Broken { why: error.to_string(), kept: was_kept }.into(),
            Fault::Unsent(error) | Fault::Unreached(error) => Denial::Unreached(error.to_string()).into(),
            Fault::Refused(refusal) => refusal.into(),
            Fault::TooSlow => Denial::TooSlow.into(),
            Fault::Client(_) => Stop::Broken(io::Error::new(io::ErrorKind::ConnectionReset, "the edge broke off the request")),
        });
    }
}

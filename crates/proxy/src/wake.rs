//! Starting machines for requests, on this host or by way of theirs.

use crate::exchange::admit_request;
use crate::fields::line;
use crate::hop::{self, Ask, Denial, What};
use crate::listen::Worker;
use crate::metrics::count;
use crate::reply::{Reply, room};
use crate::time::now_ms;
use crate::upstream::{Conn, HEAD_TAKEN_WITHIN, Upstream};
use dunlin_api::AdmitRefusal;
use dunlin_routing::Candidate;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

/// The host knows better why it did not come up in time: its word is waited for so much longer.
const WORD_WITHIN: Duration = Duration::from_secs(1);

/// The host starts it once, however many ask.
pub(crate) async fn wake(worker: &Worker, target: &Arc<Candidate>, until: Instant) -> Result<(), AdmitRefusal> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(AdmitRefusal::DidNotWake("the request had waited for others already".into()));
    }
    count(&worker.counters.wakes);
    let in_time = if worker.edge.is_elsewhere(target) {
        tokio::time::timeout(left + WORD_WITHIN, Box::pin(wake_elsewhere(worker, target, left))).await
    } else {
        let deadline_ms = now_ms() + left.as_millis() as u64;
        tokio::time::timeout(left, worker.edge.last_hop.wake(&target.machine, deadline_ms)).await
    };
    in_time.unwrap_or_else(|_| Err(AdmitRefusal::DidNotWake(format!("not started within {} s", left.as_secs()))))
}

/// Starts one more without waiting for it; one such start a machine at a time, and after one that failed
/// none for a while: every request above the soft limit asks for it.
pub(crate) fn wake_beside(worker: &Rc<Worker>, target: &Arc<Candidate>) {
    if !worker.edge.waking().insert(target.machine.clone()) {
        return;
    }
    let (worker, target) = (worker.clone(), target.clone());
    tokio::task::spawn_local(async move {
        let limits = &worker.edge.limits;
        if let Err(refusal) = wake(&worker, &target, Instant::now() + limits.wait_timeout).await {
            tracing::warn!(machine = %target.machine, app = %target.app, %refusal, "one more machine could not be started");
            tokio::time::sleep(limits.wake_backoff).await;
        }
        worker.edge.waking().remove(&target.machine);
    });
}

async fn wake_elsewhere(worker: &Worker, target: &Arc<Candidate>, wait: Duration) -> Result<(), AdmitRefusal> {
    let to = Upstream::Hop { target: target.clone(), is_doubtful: false };
    let not_reached = |error: io::Error| {
        target.host_load.record_failure(now_ms());
        AdmitRefusal::DidNotWake(format!("its host {} is not reached: {error}", target.host))
    };
    loop {
        let kept = worker.pool.take(&to);
        let mut conn = match kept {
            Some(conn) => conn,
            None => worker.pool.connect(&to).await.map_err(not_reached)?,
        };
        match ask(&mut conn, target, wait).await {
            Ok(woken) => {
                worker.pool.keep(conn);
                return woken;
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                worker.pool.drop_host(&target.host);
                return Err(not_reached(error));
            }
            // The host had just closed it. To ask twice does no harm: there is one start.
            Err(_) if conn.is_reused => {}
            Err(error) => return Err(not_reached(error)),
        }
    }
}

/// The inner result is the host's.
async fn ask(conn: &mut Conn, target: &Candidate, wait: Duration) -> io::Result<Result<(), AdmitRefusal>> {
    let ask = Ask { admit: admit_request(target), wait, what: What::Wake };
    let mut head = b"POST / HTTP/1.1\r\n".to_vec();
    line(&mut head, b"host", target.host.as_str().as_bytes());
    line(&mut head, b"content-length", b"0");
    line(&mut head, hop::FIELD.as_bytes(), ask.value().as_bytes());
    head.extend_from_slice(b"\r\n");
    conn.be_quick();
    conn.io.write_all(&head).await?;
    conn.io.flush().await?;
    loop {
        if !conn.inbox.is_empty() {
            let mut space = room();
            if let Some((reply, size)) = Reply::read(conn.inbox.bytes(), &mut space, "POST").map_err(io::Error::other)? {
                let woken = match Denial::read(reply.fields) {
                    None if reply.status == 200 => Ok(()),
                    Some(Denial::Refused(refusal)) => Err(refusal),
                    Some(Denial::Unreached(why)) => Err(AdmitRefusal::DidNotWake(why)),
                    _ => return Err(io::Error::other("its answer is none to what was asked")),
                };
                conn.inbox.consume(size);
                return Ok(woken);
            }
        }
        if conn.inbox.is_full() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let filling = tokio::time::timeout(HEAD_TAKEN_WITHIN * 5 / 4, poll_fn(|cx| conn.inbox.poll_fill(&mut conn.io, cx)));
        let Ok(filled) = filling.await else {
            conn.be_patient(); // it has arrived, or the connection would be gone
            continue;
        };
        if filled? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

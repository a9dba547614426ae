//! The record of one request: counted and logged when its answer has ended, however it ended.

use crate::choose::Held;
use crate::listen::{Client, Worker};
use crate::log::Line;
use crate::metrics::{add, count};
use crate::request::{Request, Sender};
use dunlin_api::Admission;
use dunlin_model::MachineId;
use dunlin_routing::{Candidate, Route};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

pub(crate) struct Record {
    pub worker: Rc<Worker>,
    pub client: Rc<Client>,
    pub request: Request,
    pub started: Instant,
    pub route: Option<Arc<Route>>,
    pub target: Option<Arc<Candidate>>,
    pub attempts: u32,
    /// 0 until there is an answer.
    pub status: u16,
    /// Of an answer that the edge made itself.
    pub code: &'static str,
    pub preferred_unavailable: bool,
    pub traffic: Traffic,
    /// The whole answer was handed to the client's connection.
    pub is_complete: bool,
    /// Given back when the answer has ended.
    pub held: Option<Held>,
    /// For another edge, which holds the place itself.
    pub admission: Option<Admission>,
}

/// Bytes of bodies.
#[derive(Default)]
pub(crate) struct Traffic {
    /// Of the request, that went to the machine.
    pub bytes_in: Cell<u64>,
    /// Of the answer, that went to the client.
    pub bytes_out: Cell<u64>,
}

impl Record {
    /// Boxed: futures that hold it stay small enough to be cheap.
    pub fn begin(worker: &Rc<Worker>, client: &Rc<Client>, request: Request) -> Box<Self> {
        count(if request.sender == Sender::Edge { &worker.counters.hop_served } else { &worker.counters.requests });
        Box::new(Self {
            worker: worker.clone(),
            client: client.clone(),
            request,
            started: Instant::now(),
            route: None,
            target: None,
            attempts: 0,
            status: 0,
            code: "",
            preferred_unavailable: false,
            traffic: Traffic::default(),
            is_complete: false,
            held: None,
            admission: None,
        })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Self { worker, request, .. } = self;
        self.held = None;
        if request.sender == Sender::Edge {
            // It is counted, timed and logged where it came in.
            return worker.buffers.give_head_back(std::mem::take(&mut request.head));
        }
        let took = self.started.elapsed();
        worker.counters.request_seconds.observe(took);
        add(&worker.counters.bytes_in, self.traffic.bytes_in.get());
        add(&worker.counters.bytes_out, self.traffic.bytes_out.get());
        if let Some(route) = &self.route {
            let class = if self.is_complete { usize::from(self.status / 100).min(5) } else { 0 };
            route.load.answers[class].fetch_add(1, Relaxed);
        }
        worker.lines.append(&Line {
            request_id: request.id.as_str(),
            app: self.route.as_ref().map_or("", |route| route.app.as_str()),
            machine: self.target.as_ref().map_or("", |target| MachineId::as_str(&target.machine)),
            client: &self.client.ip,
            protocol: request.protocol.name(),
            is_tls: self.client.is_tls,
            method: request.method(),
            host: &request.host,
            path: request.path(),
            status: self.status,
            code: self.code,
            took,
            bytes_in: self.traffic.bytes_in.get(),
            bytes_out: self.traffic.bytes_out.get(),
            attempts: self.attempts,
            is_complete: self.is_complete,
        });
        worker.buffers.give_head_back(std::mem::take(&mut request.head));
    }
}

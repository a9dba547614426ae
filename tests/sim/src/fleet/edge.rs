//! Edges: each host routes requests by the real table, made of its own view, and the machine's host admits or refuses.

use super::Bug;
use super::wires::{Refusal, Word};
use super::world::World;
use dunlin_machine::{Order, Verb};
use dunlin_model::{AppName, MachineId, MachineVersion, Source};
use dunlin_routing::{Candidate, Decision, Head, Table, Vantage};
use std::sync::Arc;

/// Machines that one request is offered to before it is given up.
const MAX_OFFERS: u32 = 8;
const PATIENCE_MS: u64 = 10_000;
const AGAIN_MS: u64 = 300;
/// A host that does not answer.
const HOP_MS: u64 = 1_000;

pub struct Request {
    pub edge: usize,
    pub app: AppName,
    until_ms: u64,
    pub next_ms: u64,
    /// Machines that refused or failed, true for the table with this serial.
    tried: Vec<MachineId>,
    refused: Vec<MachineId>,
    serial: u64,
    offers: u32,
    /// Counts tries: an answer to an earlier one is none.
    try_: u32,
    target: Option<Arc<Candidate>>,
    pub ended: Option<Ended>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Answered,
    GivenUp,
}

impl World {
    pub fn request(&mut self, edge: usize, app: &AppName) -> u64 {
        self.made += 1;
        let (id, now_ms) = (self.made, self.ctx.now_ms);
        let request = Request {
            edge,
            app: app.clone(),
            until_ms: now_ms + PATIENCE_MS,
            next_ms: now_ms,
            tried: vec![],
            refused: vec![],
            serial: 0,
            offers: 0,
            try_: 0,
            target: None,
            ended: None,
        };
        self.requests.insert(id, request);
        id
    }

    /// Requests whose time has come look for a machine, again.
    pub fn edges_act(&mut self) {
        let now_ms = self.ctx.now_ms;
        self.requests.retain(|_, request| request.ended.is_none() || now_ms < request.until_ms + PATIENCE_MS);
        let due = self.requests.iter().filter(|(_, request)| request.ended.is_none() && request.next_ms <= now_ms);
        let due: Vec<u64> = due.map(|(id, _)| *id).collect();
        for id in due {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            if let Some(target) = request.target.take() {
                // Nothing came back.
                target.host_load.record_failure(now_ms);
                request.tried.push(target.machine.clone());
            }
            request.next_ms = now_ms + AGAIN_MS;
            if now_ms >= request.until_ms || request.offers > MAX_OFFERS {
                request.ended = Some(Ended::GivenUp);
                continue;
            }
            self.route(id);
        }
    }

    fn table(&mut self, edge: usize) -> Option<Arc<Table>> {
        let is_stale_for_ever = self.is(Bug::StaleTable);
        let member = &mut self.members[edge];
        let vantage = Vantage { host: Some(member.identity.host.clone()), ..Vantage::of(member.identity.region.parse().expect("a region")) };
        let process = member.process.as_mut()?;
        if process.table.is_none() || std::mem::take(&mut process.table_is_stale) && !(is_stale_for_ever && process.looks > 20) {
            let table = Table::build(&process.view, &process.loads, process.table.as_deref(), &vantage);
            process.table = Some(Arc::new(table));
        }
        process.table.clone()
    }

    fn route(&mut self, id: u64) {
        let (now_ms, random) = (self.ctx.now_ms, self.ctx.rng.draw());
        let edge = self.requests[&id].edge;
        let Some(table) = self.table(edge) else { return };
        let Some(request) = self.requests.get_mut(&id) else { return };
        if request.serial != table.serial {
            request.serial = table.serial;
            request.tried.clear();
            request.refused.clear();
        }
        let name = format!("{}.localhost", request.app);
        let head = Head { host: &name, ..Head::default() };
        match table.route(&head, &request.tried, random, now_ms) {
            Decision::Forward { target, .. } => self.forward(id, target),
            Decision::Wake { target, .. } => self.wake(id, &target),
            // A client tries again.
            Decision::Wait { .. } | Decision::Redirect { .. } | Decision::Reject(_) => {}
        }
    }

    fn judge(&mut self, id: u64, machine: &MachineId) {
        let request = &self.requests[&id];
        let (edge, refused) = (request.edge, request.refused.contains(machine));
        let Some(view) = self.members[edge].view() else { return };
        let is_gone = view.config.tombstones.contains_key(machine) || !view.config.machines.contains_key(machine);
        self.checks.is_routed(edge, machine, is_gone, refused);
    }

    fn forward(&mut self, id: u64, target: Arc<Candidate>) {
        self.judge(id, &target.machine);
        let now_ms = self.ctx.now_ms;
        let Some(request) = self.requests.get_mut(&id) else { return };
        (request.try_, request.offers, request.next_ms) = (request.try_ + 1, request.offers + 1, now_ms + HOP_MS);
        request.target = Some(target.clone());
        let (edge, try_) = (request.edge, request.try_);
        let word = Word::Hop { request: id, try_, machine: target.machine.clone(), version: target.version.clone(), placement: target.placement };
        let to = self.at(&target.host);
        self.say(edge, to, word);
    }

    /// Its host starts it, once; then it is asked as any other.
    fn wake(&mut self, id: u64, target: &Candidate) {
        self.judge(id, &target.machine);
        let (edge, to) = (self.requests[&id].edge, self.at(&target.host));
        let order = Order {
            id: format!("wake.{id}.{}", self.ctx.now_ms).parse().expect("letters, digits and dots"),
            deadline_ms: self.ctx.now_ms + PATIENCE_MS,
            generation: None,
            plan: None,
            expected_version: None,
            nonce: None,
            source: Source::Proxy,
            request_id: None,
            verb: Verb::Wake,
            room: Ok(()),
        };
        self.say(edge, to, Word::Wake { machine: target.machine.clone(), order: Box::new(order) });
    }

    pub fn served(&mut self, id: u64, try_: u32, hop: Result<MachineVersion, Refusal>) {
        let now_ms = self.ctx.now_ms;
        let ignores = self.is(Bug::IgnoreRefusal);
        let Some(request) = self.requests.get_mut(&id).filter(|request| request.try_ == try_) else { return };
        let Some(target) = request.target.take() else { return };
        let edge = request.edge;
        request.next_ms = now_ms;
        match hop {
            Ok(version) => {
                target.load.record_success();
                target.host_load.record_success();
                request.ended = Some(Ended::Answered);
                self.checks.is_answered(edge, &target.machine, &target.version, &version);
            }
            // It went to sleep since the table was made.
            Err(Refusal::Asleep) if target.service.autostart => {
                request.next_ms = now_ms + AGAIN_MS;
                self.wake(id, &target);
            }
            Err(refusal) => {
                request.refused.push(target.machine.clone());
                if !ignores {
                    request.tried.push(target.machine.clone());
                }
                self.ctx.tell(|| format!("h{edge}: {} refuses a request: {refusal:?}", target.machine));
            }
        }
    }
}

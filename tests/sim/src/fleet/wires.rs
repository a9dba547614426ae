//! Calls between hosts, over connections of their own: late, lost with the link, sometimes twice. What comes out of one is
//! what the other side said, or nothing.

use super::world::World;
use dunlin_machine::{Asked, Deny, Order};
use dunlin_model::{CommandId, Generation, MachineId, MachineState, MachineVersion};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
pub enum Word {
    Probe { round: u64 },
    Reached { round: u64 },
    Reserve { call: u64, machine: MachineId, memory_mb: u32 },
    Order { call: u64, machine: MachineId, order: Box<Order> },
    Said { call: u64, said: Said },
    /// A request, with the machine that the edge means.
    Hop { request: u64, try_: u32, machine: MachineId, version: MachineVersion, placement: Generation },
    Wake { machine: MachineId, order: Box<Order> },
    Served { request: u64, try_: u32, hop: Result<MachineVersion, Refusal> },
}

#[derive(Debug, Clone)]
pub enum Said {
    Reserved(Result<(), String>),
    Obeyed(Result<Asked, Deny>),
    /// The host does not have the machine.
    NotKnown,
}

/// What the last hop says instead of passing a request on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NotHere,
    OtherVersion,
    Cordoned,
    Asleep,
    NotRunning,
}

#[derive(Debug, Clone)]
pub struct Wire {
    pub from: usize,
    pub to: usize,
    pub word: Word,
}

#[derive(Default)]
pub struct Wires {
    under_way: BTreeMap<(u64, u64), Wire>,
    number: u64,
    cut: BTreeSet<(usize, usize)>,
}

impl Wires {
    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    pub fn next_ms(&self) -> u64 {
        self.under_way.first_key_value().map_or(u64::MAX, |((at, _), _)| *at)
    }

    pub fn arrive(&mut self, now_ms: u64) -> Option<Wire> {
        Some(self.under_way.first_entry().filter(|first| first.key().0 <= now_ms)?.remove())
    }

    fn put(&mut self, at_ms: u64, wire: Wire) {
        self.number += 1;
        self.under_way.insert((at_ms, self.number), wire);
    }
}

impl World {
    pub fn say(&mut self, from: usize, to: usize, word: Word) {
        let delay_ms = match (from == to, self.is_far(from, to)) {
            (true, _) => 0,
            (false, true) => self.ctx.rng.between(40, 80),
            (false, false) => self.ctx.rng.between(1, 4),
        };
        if self.wires.is_cut(from, to) {
            return;
        }
        let now_ms = self.ctx.now_ms;
        // Only orders may be said twice: whoever gets no answer repeats them, and the first may still be under way.
        if matches!(word, Word::Order { .. }) && !self.network.calm && self.ctx.rng.percent(8) {
            let late_ms = self.ctx.rng.between(0, 20_000);
            self.wires.put(now_ms + delay_ms + late_ms, Wire { from, to, word: word.clone() });
        }
        self.wires.put(now_ms + delay_ms, Wire { from, to, word });
    }

    pub fn arrive(&mut self, Wire { from, to, word }: Wire) {
        if self.members[to].process.is_none() {
            return;
        }
        match word {
            Word::Probe { round } => self.say(to, from, Word::Reached { round }),
            Word::Reached { round } => self.reached(from, round),
            Word::Reserve { call, machine, memory_mb } => {
                let reserved = self.members[to].agent.room(&machine, memory_mb);
                self.say(to, from, Word::Said { call, said: Said::Reserved(reserved) });
            }
            Word::Order { call, machine, order } => {
                let knows = self.members[to].agent.slots.as_ref().is_some_and(|slots| slots.contains_key(&machine));
                if !knows {
                    return self.say(to, from, Word::Said { call, said: Said::NotKnown });
                }
                self.orders.insert(order.id.clone(), call);
                self.ctx.promises.sent(&order);
                self.with_agent(to, |agent, ctx| agent.order(ctx, &machine, *order));
            }
            Word::Said { call, said } => self.said(call, said),
            Word::Wake { machine, order } => {
                self.ctx.promises.sent(&order);
                self.with_agent(to, |agent, ctx| agent.order(ctx, &machine, *order));
            }
            Word::Hop { request, try_, machine, version, placement } => {
                let hop = self.admit(to, &machine, &version, placement);
                self.say(to, from, Word::Served { request, try_, hop });
            }
            Word::Served { request, try_, hop } => self.served(request, try_, hop),
        }
    }

    /// An agent has answered a command: whoever asked last hears it.
    pub fn answered(&mut self, at: usize, command: &CommandId, answer: Result<Asked, Deny>) {
        if let Some(call) = self.orders.get(command).copied() {
            self.say(at, super::world::CONTROL, Word::Said { call, said: Said::Obeyed(answer) });
        }
    }

    /// From the agent's own table, as `dunlin_host`'s last hop.
    fn admit(&self, at: usize, machine: &MachineId, version: &MachineVersion, placement: Generation) -> Result<MachineVersion, Refusal> {
        let slots = self.members[at].agent.slots.as_ref();
        let record = slots.and_then(|slots| slots.get(machine)).ok_or(Refusal::NotHere)?.machine.record();
        let admits_all = self.is(super::Bug::AdmitAnyVersion);
        if !admits_all && (record.version() != version || placement > record.assignment.placement) {
            return Err(Refusal::OtherVersion);
        }
        match record.state {
            _ if record.cordoned => Err(Refusal::Cordoned),
            MachineState::Started => Ok(record.version().clone()),
            state if state.is_asleep() => Err(Refusal::Asleep),
            _ => Err(Refusal::NotRunning),
        }
    }
}

//! What people do, and what goes wrong.

use super::checks;
use super::member::Member;
use super::store::{Class, GROUP, app};
use super::world::{CONTROL, HOSTS, World};
use super::{member, rows};
use crate::promises::Promises;
use crate::supervisor::Behaviour;
use dunlin_gossip::Input;
use dunlin_machine::{Order, Verb};
use dunlin_model::desired::TombstoneReason;
use dunlin_model::{AppName, MachineId, MachineState, Source};

impl World {
    pub fn step(&mut self) {
        let at = self.ctx.rng.below(HOSTS as u64) as usize;
        match self.ctx.rng.below(100) {
            // Control that was restored takes nothing before it has adopted what the fleet knows.
            0..29 | 90..93 if self.restored.is_some() => {}
            0..10 => self.deploy_something(),
            10..16 => self.scale(),
            16..20 => self.destroy_by_hand(),
            20..24 => self.retire_the_worker(),
            24..29 => self.drain(at),
            29..42 => self.cut_links(at),
            42..54 => {
                self.ctx.tell(|| "links are whole again".into());
                self.heal();
            }
            54..62 => {
                let (power, after) = (self.ctx.rng.percent(30), self.ctx.rng.below(8));
                self.members[at].agent.dies_after = Some((after, power));
            }
            62..67 => self.kill(at, true),
            67..75 => {
                let after = self.ctx.rng.below(12);
                if let Some(control) = &mut self.control {
                    control.dies_after = Some(after);
                }
            }
            75..77 => self.set_clock(at),
            77..82 => self.members[at].backup = Some(self.members[at].disk()),
            82..86 => self.put_back(at),
            86..87 => self.wipe(at),
            87..90 => self.start_clone(at),
            90..93 => self.publish_half(),
            93..96 => self.claim(at),
            96..98 => self.backup = Some(self.store.clone()),
            98..100 => self.restore(),
            _ => {}
        }
        for _ in 0..2 {
            let (edge, app) = (self.ctx.rng.below(HOSTS as u64) as usize, self.any_app());
            if self.members[edge].process.is_some() && Class::of(&app).serves() {
                self.request(edge, &app);
            }
        }
        let pause_ms = self.ctx.rng.between(100, 1_800);
        self.pass(pause_ms);
    }

    fn any_app(&mut self) -> AppName {
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        self.ctx.rng.pick(&apps).expect("there are some")
    }

    // ---- people

    fn deploy_something(&mut self) {
        let app = self.any_app();
        let behaviours = [Behaviour::Serves, Behaviour::Serves, Behaviour::Serves, Behaviour::Deaf, Behaviour::Crashes, Behaviour::Missing];
        let behaviour = self.ctx.rng.pick(&behaviours).expect("there are some");
        self.deploy(&app, behaviour);
    }

    fn scale(&mut self) {
        let (app, count) = (app("web"), self.ctx.rng.between(2, 4) as u32);
        self.ctx.tell(|| format!("web: a person wants {count} of it"));
        self.app(&app).row.scale.insert(GROUP.into(), count);
        // A change of scale is a release.
        self.deploy(&app, Behaviour::Serves);
    }

    /// Only what may run twice: of the others a person makes sure first that it has stopped.
    fn destroy_by_hand(&mut self) {
        let web: Vec<MachineId> = self.store.machines_of(&app("web")).map(|row| row.id.clone()).collect();
        if let Some(id) = self.ctx.rng.pick(&web) {
            self.destroy(&id, TombstoneReason::Person);
        }
    }

    /// Stopped by its host's own word, then destroyed, so that another one takes its place wherever there is room.
    fn retire_the_worker(&mut self) {
        let worker = self.store.machines_of(&app("worker")).next().cloned();
        let Some(row) = worker else { return };
        let at = self.at(&row.host);
        let record = self.members[at].agent.slots.as_ref().and_then(|slots| slots.get(&row.id)).map(|slot| slot.machine.record().state);
        let is_watched = self.control.as_ref().is_some_and(|control| !control.watch.is_dead(&row.host));
        if !is_watched || self.wires.is_cut(CONTROL, at) || self.wires.is_cut(at, CONTROL) {
            return;
        }
        if record == Some(MachineState::Stopped) {
            return self.destroy(&row.id, TombstoneReason::Person);
        }
        self.helps.insert(row.spec.app.clone());
        self.command(at, &row.id, Verb::Stop { signal: None, timeout_ms: Some(1_000) });
    }

    /// A person's own command, that reaches its host at once.
    pub fn command(&mut self, at: usize, machine: &MachineId, verb: Verb) {
        self.made += 1;
        let order = Order {
            id: format!("person.{}", self.made).parse().expect("letters, digits and dots"),
            deadline_ms: self.ctx.now_ms + 60_000,
            generation: None,
            plan: None,
            expected_version: None,
            nonce: None,
            source: Source::User,
            request_id: None,
            verb,
            room: Ok(()),
        };
        self.ctx.tell(|| format!("a person tells {machine} to {}", order.verb.name()));
        self.ctx.promises.sent(&order);
        self.with_agent(at, |agent, ctx| agent.order(ctx, machine, order));
    }

    fn drain(&mut self, at: usize) {
        let others = self.store.hosts.iter().filter(|host| host.draining).count();
        let host = &mut self.store.hosts[at];
        let drains = !host.draining && others == 0;
        (host.draining, host.cordoned) = (drains, drains);
        self.store.commit();
        self.ctx.tell(|| format!("h{at} is {}", if drains { "drained" } else { "open" }));
    }

    // ---- links and clocks

    fn cut_links(&mut self, at: usize) {
        let count = self.members.len();
        let side: Vec<bool> = (0..count).map(|other| other == at || self.ctx.rng.percent(15)).collect();
        let one_way = self.ctx.rng.percent(35);
        // Some networks pass one kind of packet and not the other.
        let (gossip, calls) = self.ctx.rng.pick(&[(true, true), (true, true), (true, true), (true, false), (false, true)]).expect("five");
        let names: Vec<usize> = (0..count).filter(|at| side[*at]).collect();
        let what = if gossip && calls { "" } else if gossip { ", for gossip" } else { ", for calls" };
        self.ctx.tell(|| format!("cut off: {names:?}{what}{}", if one_way { ", one way" } else { "" }));
        for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
            if side[from] && !side[to] || !one_way && !side[from] && side[to] {
                if gossip {
                    self.network.cut(from, to);
                }
                if calls {
                    self.wires.cut(from, to);
                }
            }
        }
    }

    pub fn heal(&mut self) {
        self.network.heal();
        self.wires.heal();
    }

    fn set_clock(&mut self, at: usize) {
        let by_ms = self.ctx.rng.between(0, 120_000) as i64 - 60_000;
        self.members[at].skew_ms += by_ms;
        self.ctx.tell(|| format!("h{at}: its clock jumps by {by_ms} ms"));
    }

    // ---- disks

    /// Nothing is known of its machines but what was published: they are judged by what the disk says.
    fn forget_promises(&mut self, at: usize) {
        self.helps.extend(self.store.apps.keys().cloned());
        let own: Vec<MachineId> = self.ctx.promises.of.keys().filter(|id| self.is_on(id, at)).cloned().collect();
        self.ctx.promises.disk_lost(&own);
    }

    fn is_on(&self, id: &MachineId, at: usize) -> bool {
        self.checks.homes.get(id) == Some(&self.members[at].identity.host)
    }

    /// The disk of some time ago is in it at its next boot.
    fn put_back(&mut self, at: usize) {
        if at == CONTROL || self.members[at].is_silenced {
            return;
        }
        let Some(backup) = self.members[at].backup.clone() else { return };
        self.kill(at, true);
        self.ctx.tell(|| format!("h{at}: its disk is put back, to desired state {}", backup.config.generation));
        self.forget_promises(at);
        let (generation, now_ms) = (self.store.generation, self.ctx.now_ms);
        let member = &mut self.members[at];
        member.agent.put_back(backup.agent.as_ref());
        member.kept = backup;
        (member.behind, member.heard_since_ms) = (Some(generation), now_ms);
    }

    fn wipe(&mut self, at: usize) {
        if at == CONTROL || self.members[at].is_silenced || self.members.len() > HOSTS {
            return;
        }
        self.kill(at, true);
        self.ctx.tell(|| format!("h{at}: its disk is wiped, and it joins anew"));
        self.forget_promises(at);
        self.members[at].agent.put_back(None);
        self.members[at].backup = None;
        self.certify_anew(at);
    }

    /// A copy of a host's disk starts in another machine.
    fn start_clone(&mut self, of: usize) {
        if of == CONTROL || self.members.len() > HOSTS || self.members[of].is_silenced || self.members[of].kept.gossip.is_none() {
            return;
        }
        let disk = self.members[of].disk();
        let mut clone = Member::new(HOSTS, self.members[of].identity.clone());
        clone.is_clone = true;
        clone.agent.put_back(disk.agent.as_ref());
        clone.kept = member::Kept { agent: None, ..disk };
        self.helps.extend(self.store.apps.keys().cloned());
        self.of_clone = Promises::default();
        self.of_clone.follow(&self.ctx.promises);
        self.members.push(clone);
        self.ctx.tell(|| format!("a copy of h{of} starts as h{HOSTS}"));
        self.start(HOSTS);
    }

    // ---- rows that are wrong, and signed by who may sign them

    /// A bug of control's: machines are missing from what it publishes.
    fn publish_half(&mut self) {
        let until_ms = self.ctx.now_ms + self.ctx.rng.between(500, 4_000);
        let Some(control) = &mut self.control else { return };
        control.half_until_ms = until_ms;
        self.store.commit();
        self.ctx.tell(|| "control publishes half of what it should".into());
    }

    /// A broken host says something of another's machine.
    fn claim(&mut self, at: usize) {
        let host = &self.members[at].identity.host;
        let speaks = self.members[at].process.as_ref().filter(|process| process.said.is_some());
        let Some(view) = speaks.map(|process| &process.view) else { return };
        let others: Vec<_> = view.machines.values().filter(|fact| fact.host != *host).cloned().collect();
        let Some(fact) = self.ctx.rng.pick(&others) else { return };
        let mut fact = (*fact).clone();
        (fact.sequence, fact.state) = (fact.sequence + (1 << 40), MachineState::Failed);
        self.ctx.tell(|| format!("h{at} claims that {} of {} has failed", fact.id, fact.host));
        let (origin, changes) = (self.members[at].identity.origin, vec![rows::of_machine(&fact)]);
        self.handle(at, Input::Publish { origin, schema: 1, changes, at: None });
    }

    /// For the story.
    pub fn summary(&self) -> String {
        let lives = |checks::Lives { member, machine, .. }| format!("{} on h{member}", &machine.as_str()[..8]);
        self.living().into_iter().map(lives).collect::<Vec<_>>().join(", ")
    }
}

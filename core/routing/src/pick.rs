//! The choice among an app's machines.

use crate::{Availability, Candidate, Decision, Detail, Far, Head, Reject, Route, Table, WaitReason};
use dunlin_model::region::RegionExpr;
use dunlin_model::{MachineId, Region};
use dunlin_view::{Freshness, Summary};
use std::sync::Arc;

/// Up to this many machines all are compared; beyond, a few drawn ones suffice as long as one has room.
const SCAN_ALL: usize = 16;
/// How many are drawn.
const DRAWN: usize = 4;
/// Regions that are looked into at once: when the nearest has just died, the next is known already.
const LOOK_INTO: usize = 2;
/// And when neither told anything: the reporters of a region may promise what its hosts do not tell this edge.
const LOOK_FURTHER: usize = 16;

impl Table {
    /// The way of one request. `tried` are machines that this table sent it to in vain; `random` breaks
    /// ties.
    pub fn route(&self, head: &Head<'_>, tried: &[MachineId], random: u64, now_ms: u64) -> Decision {
        let Some(route) = self.find(head.host) else {
            return Decision::Reject(unknown_host(head.host));
        };
        if route.force_https && !head.is_tls {
            return Decision::Redirect { route: route.clone() };
        }
        let regions = match Regions::asked(head) {
            Ok(regions) => regions,
            Err(forced) => return Decision::Reject(no_region(forced)),
        };
        let ask = Ask { route, regions, tried, random, now_ms, detail: head.detail };
        if let Some(id) = head.force_instance {
            return ask.forced(id);
        }
        if let Some(forced) = head.force_region
            && !route.candidates.iter().any(|c| ask.may_serve(c))
        {
            return Decision::Reject(nobody_in_region(route, forced));
        }
        let mut preferred_unavailable = false;
        if let Some(id) = head.prefer_instance {
            match ask.preferred(id) {
                Some(decision) => return decision,
                None => preferred_unavailable = true,
            }
        }
        ask.any(preferred_unavailable)
    }
}

impl Route {
    /// The regions whose detail this request needs, nearest first: those that say they have what can serve it go before
    /// those that only can wake, and those before all others. None are left out, since what is starting is in no summary.
    pub fn look_into(&self, head: &Head<'_>) -> Vec<&Region> {
        let instance = |id: &str| self.candidates.iter().find(|c| c.machine.as_str() == id && c.availability == Availability::Unseen);
        if let Some(c) = head.force_instance.and_then(instance) {
            return vec![&c.region];
        }
        let Ok(regions) = Regions::asked(head) else { return vec![] };
        let mut far: Vec<&Far> = self.far.iter().filter(|far| regions.may_serve(&far.region)).collect();
        far.sort_by_key(|far| (regions.rank(&far.region), far.promise(), far.distance));
        far.truncate(if head.detail == Detail::OfMany { LOOK_FURTHER } else { LOOK_INTO });
        let mut wanted: Vec<&Region> = far.into_iter().map(|far| &far.region).collect();
        if let Some(c) = head.prefer_instance.and_then(instance)
            && !wanted.contains(&&c.region)
        {
            wanted.push(&c.region);
        }
        wanted
    }
}

impl Far {
    /// Smaller is better.
    fn promise(&self) -> u8 {
        match self.summary {
            Some(Summary { ready, .. }) if ready > 0 => 0,
            Some(Summary { wakeable, .. }) if wakeable > 0 => 1,
            None => 1,
            Some(_) => 2,
        }
    }

    fn is_promising(&self) -> bool {
        self.summary.is_some_and(|summary| summary.ready + summary.wakeable > 0)
    }

    /// How many of the machines that are not seen run: all, where nobody says.
    fn running(&self) -> usize {
        self.summary.map_or(self.unseen, |summary| self.unseen.min(summary.running as usize))
    }
}

struct Ask<'a> {
    route: &'a Arc<Route>,
    regions: Regions,
    tried: &'a [MachineId],
    random: u64,
    now_ms: u64,
    /// What is waited for, where that may be better than what is seen.
    detail: Detail,
}

/// The regions that a request names.
enum Regions {
    All,
    Prefer(RegionExpr),
    Force(RegionExpr),
}

impl Regions {
    /// A preference that cannot be read is none; the error is a demand that cannot.
    fn asked<'h>(head: &Head<'h>) -> Result<Self, &'h str> {
        if let Some(text) = head.force_region {
            return text.parse().map(Self::Force).map_err(|_| text);
        }
        Ok(head.prefer_region.and_then(|text| text.parse().ok()).map_or(Self::All, Self::Prefer))
    }

    /// It is where the request may go.
    fn may_serve(&self, region: &Region) -> bool {
        match self {
            Self::Force(named) => named.rank(region).is_some(),
            Self::All | Self::Prefer(_) => true,
        }
    }

    /// Smaller is better.
    fn rank(&self, region: &Region) -> usize {
        match self {
            Self::All => 0,
            Self::Prefer(named) | Self::Force(named) => named.rank(region).unwrap_or(usize::MAX),
        }
    }
}

/// Smaller is better, and what comes first weighs most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// It may be gone for long.
    is_old: bool,
    /// It, or its host, has just failed.
    is_penalised: bool,
    is_aging: bool,
    is_above_soft: bool,
    /// In the order that the request asked for.
    region: usize,
    distance: u32,
    /// Of its soft limit, in millionths.
    share: u64,
    is_elsewhere: bool,
    tie: u64,
}

impl Rank {
    /// Nobody is nearer, and it has room: no need to look at all the others.
    fn is_good(&self) -> bool {
        let Self { is_old, is_penalised, is_aging, is_above_soft, region, distance, .. } = *self;
        !(is_old || is_penalised || is_aging || is_above_soft) && region == 0 && distance == 0
    }

    /// Another one might be better, if there is one that is not seen.
    fn is_poor(&self) -> bool {
        self.is_old || self.is_penalised || self.is_aging || self.is_above_soft
    }
}

impl Ask<'_> {
    fn any(&self, preferred_unavailable: bool) -> Decision {
        // Another thread may take the last place between the look and the reservation: look again,
        // at most as often as there are machines.
        for _ in 0..=self.route.candidates.len() {
            let Some(best) = self.best() else { break };
            if best.freshness == Freshness::Old
                && let Some(decision) = self.wake(|c| c.freshness != Freshness::Old)
            {
                return decision; // it sleeps, but it is there for sure
            }
            if self.prefers_unseen(&best.region) {
                return self.wait(WaitReason::Detail);
            }
            let is_poor = self.rank(best, 0).is_poor();
            let Some(ticket) = best.load.reserve(best.service.concurrency.hard_limit) else { continue };
            self.begin_trial(best);
            let is_busy = best.load.in_flight() > best.service.concurrency.soft_limit;
            return Decision::Forward {
                target: best.clone(),
                ticket,
                preferred_unavailable,
                look_further: is_poor && !self.route.far.is_empty(),
                also_wake: is_busy.then(|| self.sleeper(|_| true)).flatten(),
            };
        }
        self.nobody_ready()
    }

    fn best(&self) -> Option<&Arc<Candidate>> {
        let all = &self.route.candidates;
        if all.len() > SCAN_ALL {
            let drawn = (0..DRAWN).map(|i| &all[(mix(self.random, i as u64) % all.len() as u64) as usize]);
            if let Some((candidate, rank)) = self.least(drawn)
                && rank.is_good()
            {
                return Some(candidate);
            }
        }
        self.least(all.iter()).map(|(candidate, _)| candidate)
    }

    fn least<'c>(&self, among: impl Iterator<Item = &'c Arc<Candidate>>) -> Option<(&'c Arc<Candidate>, Rank)> {
        among
            .enumerate()
            .filter(|(_, c)| c.availability == Availability::Ready && self.may_serve(c) && !self.was_tried(c) && has_room(c))
            .map(|(i, c)| (c, self.rank(c, i)))
            .min_by_key(|(_, rank)| *rank)
    }

    fn rank(&self, c: &Candidate, index: usize) -> Rank {
        let (in_flight, soft) = (c.load.in_flight(), c.service.concurrency.soft_limit.max(1));
        Rank {
            is_old: c.freshness == Freshness::Old,
            is_penalised: self.is_penalised(c),
            is_aging: c.freshness == Freshness::Aging,
            is_above_soft: in_flight >= soft,
            region: self.regions.rank(&c.region),
            distance: c.distance,
            share: u64::from(in_flight) * 1_000_000 / u64::from(soft),
            is_elsewhere: !c.is_here,
            tie: mix(self.random, index as u64),
        }
    }

    fn begin_trial(&self, c: &Candidate) {
        c.load.begin_trial(self.now_ms);
        c.host_load.begin_trial(self.now_ms);
    }

    fn is_penalised(&self, c: &Candidate) -> bool {
        c.load.is_penalised(self.now_ms) || c.host_load.is_penalised(self.now_ms)
    }

    /// It is where the request may go.
    fn may_serve(&self, c: &Candidate) -> bool {
        self.regions.may_serve(&c.region)
    }

    fn was_tried(&self, c: &Candidate) -> bool {
        self.tried.contains(&c.machine)
    }

    /// The one to wake: always the first, so that many requests wake one machine and not all.
    fn sleeper(&self, suits: impl Fn(&Candidate) -> bool) -> Option<Arc<Candidate>> {
        let candidates = || self.route.candidates.iter().filter(|c| self.may_serve(c));
        // One that comes on a host of which nothing is heard may never come.
        let is_coming = |c: &Arc<Candidate>| {
            c.availability == Availability::Starting && c.freshness != Freshness::Old && !self.was_tried(c)
        };
        if candidates().any(is_coming) {
            return None;
        }
        let does_not_run = |c: &&Arc<Candidate>| matches!(c.availability, Availability::Asleep | Availability::Unavailable | Availability::Unconfirmed | Availability::Unseen);
        let runs = self.route.candidates.iter().filter(|c| !does_not_run(c)).count();
        let runs = runs + self.route.far.iter().map(Far::running).sum::<usize>();
        let can_wake = |c: &&Arc<Candidate>| {
            c.service.max_machines_running.is_none_or(|max| runs < max as usize)
                && c.availability == Availability::Asleep && c.service.autostart && !self.was_tried(c) && has_room(c)
        };
        let first = |c: &&Arc<Candidate>| {
            let (is_old, is_aging) = (c.freshness == Freshness::Old, c.freshness == Freshness::Aging);
            (is_old, self.is_penalised(c), is_aging, self.regions.rank(&c.region), c.distance)
        };
        candidates().filter(|c| suits(c)).filter(can_wake).min_by_key(first).cloned()
    }

    fn wake(&self, suits: impl Fn(&Candidate) -> bool) -> Option<Decision> {
        let target = self.sleeper(suits)?;
        let ticket = target.load.reserve(target.service.concurrency.hard_limit)?;
        self.begin_trial(&target);
        Some(Decision::Wake { target, ticket })
    }

    fn nobody_ready(&self) -> Decision {
        if let Some(decision) = self.wake(|_| true) {
            return decision;
        }
        let any = |wanted: fn(Availability) -> bool| {
            self.route.candidates.iter().any(|c| wanted(c.availability) && self.may_serve(c) && !self.was_tried(c))
        };
        if any(|a| a == Availability::Ready) {
            return self.wait(WaitReason::AtLimit);
        }
        // Asleep and without room: as many requests as it may take are waking it already.
        let is_being_woken = |c: &Arc<Candidate>| {
            c.availability == Availability::Asleep && c.service.autostart && self.may_serve(c) && !self.was_tried(c)
        };
        if any(|a| matches!(a, Availability::Starting | Availability::Returning))
            || self.route.candidates.iter().any(is_being_woken)
        {
            return self.wait(WaitReason::Coming);
        }
        if any(|a| a == Availability::Unconfirmed) {
            return self.wait(WaitReason::Unconfirmed);
        }
        // A machine of which nothing was heard yet may be there: the host is starting, or the view is new.
        if any(|a| matches!(a, Availability::Unhealthy | Availability::Unknown)) {
            return self.wait(WaitReason::Unhealthy);
        }
        if any(|a| a == Availability::Unseen) {
            let elsewhere = self.route.far.iter().filter(|far| self.regions.may_serve(&far.region)).count();
            match self.detail {
                Detail::OfTheBest => return self.wait(WaitReason::Detail),
                Detail::OfMany if elsewhere > LOOK_INTO => return self.wait(WaitReason::MoreDetail),
                Detail::OfMany | Detail::OfNone => {}
            }
        }
        if !self.tried.is_empty() {
            return self.wait(WaitReason::Tried);
        }
        Decision::Reject(if any(|a| a == Availability::Unseen) { unseen(self.route) } else { nobody(self.route) })
    }

    fn wait(&self, reason: WaitReason) -> Decision {
        Decision::Wait { route: self.route.clone(), reason }
    }

    /// The request names a region that has something for it, as its reporters say, before the one that is seen.
    fn prefers_unseen(&self, best: &Region) -> bool {
        let is_better = |far: &Far| self.regions.may_serve(&far.region) && self.regions.rank(&far.region) < self.regions.rank(best);
        self.detail == Detail::OfTheBest && self.route.far.iter().any(|far| is_better(far) && far.is_promising())
    }

    fn forced(&self, id: &str) -> Decision {
        let Some(c) = self.route.candidates.iter().find(|c| c.machine.as_str() == id) else {
            return Decision::Reject(no_such_instance(self.route, id));
        };
        if self.was_tried(c) {
            return Decision::Wait { route: self.route.clone(), reason: WaitReason::Tried };
        }
        let reason = match c.availability {
            Availability::Ready => match c.load.reserve(c.service.concurrency.hard_limit) {
                Some(ticket) => return forward(c, ticket),
                None => WaitReason::AtLimit,
            },
            Availability::Asleep if c.service.autostart => match c.load.reserve(c.service.concurrency.hard_limit) {
                Some(ticket) => return Decision::Wake { target: c.clone(), ticket },
                None => WaitReason::Coming,
            },
            Availability::Starting | Availability::Returning => WaitReason::Coming,
            Availability::Unconfirmed => WaitReason::Unconfirmed,
            Availability::Unhealthy | Availability::Unknown => WaitReason::Unhealthy,
            Availability::Unseen if self.detail == Detail::OfTheBest => WaitReason::Detail,
            Availability::Unseen => return Decision::Reject(unseen(self.route)),
            Availability::Asleep | Availability::Unavailable => {
                return Decision::Reject(instance_unavailable(self.route, id));
            }
        };
        Decision::Wait { route: self.route.clone(), reason }
    }

    fn preferred(&self, id: &str) -> Option<Decision> {
        let c = self.route.candidates.iter().find(|c| c.machine.as_str() == id)?;
        if self.was_tried(c) || !self.may_serve(c) {
            return None;
        }
        if c.availability == Availability::Unseen && c.freshness != Freshness::Old && self.detail == Detail::OfTheBest {
            return Some(self.wait(WaitReason::Detail));
        }
        if c.availability != Availability::Ready {
            return None;
        }
        Some(forward(c, c.load.reserve(c.service.concurrency.hard_limit)?))
    }
}

fn forward(c: &Arc<Candidate>, ticket: crate::Ticket) -> Decision {
    Decision::Forward { target: c.clone(), ticket, preferred_unavailable: false, look_further: false, also_wake: None }
}

fn has_room(c: &Candidate) -> bool {
    c.service.concurrency.hard_limit.is_none_or(|hard| c.load.in_flight() < hard)
}

/// splitmix64: spreads one random number over many choices.
fn mix(random: u64, index: u64) -> u64 {
    let mut z = random.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn unknown_host(host: &str) -> Reject {
    Reject {
        status: 404,
        code: "PR01",
        reason: format!("no app is served as {host}"),
        hint: "check the spelling; `dunlin apps list` shows the apps, and an app is served as <app>.<domain>".into(),
    }
}

fn no_such_instance(route: &Route, id: &str) -> Reject {
    let id: String = id.chars().take(32).collect();
    Reject {
        status: 404,
        code: "PR05",
        reason: format!("app {} has no machine {id} that serves requests", route.app),
        hint: format!("`dunlin machine list -a {}` shows its machines", route.app),
    }
}

fn instance_unavailable(route: &Route, id: &str) -> Reject {
    Reject {
        status: 503,
        code: "PR06",
        reason: format!("machine {id} of app {} takes no requests now", route.app),
        hint: format!("`dunlin machine status {id}` shows its state; without fly-force-instance-id another one serves"),
    }
}

fn no_region(named: &str) -> Reject {
    let named: String = named.chars().take(80).collect();
    Reject {
        status: 400,
        code: "PR13",
        reason: format!("fly-force-region names no region: {named:?}"),
        hint: "send codes such as fra,ams, or leave the header out".into(),
    }
}

fn nobody_in_region(route: &Route, named: &str) -> Reject {
    Reject {
        status: 404,
        code: "PR14",
        reason: format!("app {} has no machine in region {named} that serves requests", route.app),
        hint: format!("`dunlin machine list -a {}` shows where its machines are", route.app),
    }
}

fn unseen(route: &Route) -> Reject {
    WaitReason::Detail.reject(route)
}

fn nobody(route: &Route) -> Reject {
    let app = &route.app;
    let (code, reason, hint) = if route.machine_count == 0 {
        ("PR02", format!("app {app} has no machines"), format!("deploy it: `dunlin deploy -a {app}`"))
    } else if route.candidates.is_empty() {
        (
            "PR03",
            format!("no machine of app {app} has a service"),
            "add [http_service] with its internal_port to dunlin.toml and deploy".to_owned(),
        )
    } else if route.candidates.iter().any(|c| c.availability == Availability::Asleep) {
        (
            "PR10",
            format!("the machines of app {app} are stopped, and requests may not start them"),
            "start one: `dunlin machine start`, or set auto_start_machines = true".to_owned(),
        )
    } else {
        (
            "PR11",
            format!("no machine of app {app} is running"),
            format!("`dunlin status -a {app}` shows their states, `dunlin logs -a {app}` the last lines"),
        )
    };
    Reject { status: 503, code, reason, hint }
}

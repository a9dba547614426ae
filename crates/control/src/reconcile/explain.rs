//! Why a machine did not become healthy, as far as it can be seen from outside: its last lines, and
//! the sockets on which it listens.

use super::finish::Failed;
use crate::{Ctx, hosts, now_ms};
use dunlin_api::{ListenSocket, LogQuery, Refusal};
use dunlin_model::{AppName, Check, EventKind, MachineId, MachineState};
use dunlin_planner::{Observed, Plan, Step, StepKind};
use dunlin_view::CheckState;
use std::time::Duration;

/// Last lines of a failed machine that are shown.
const LAST_LINES: usize = 20;
/// Explaining must not hold up the return.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// People hear of an app that listens elsewhere once it has done so for this long: most open their port a moment later.
const TELL_AFTER_MS: u64 = 4_000;
/// An app that for this long, beyond its grace period, listens on the right port for itself only was told to, and will
/// not change its mind. One that listens on another port may: it opens its metrics first and warms up its cache, and
/// `wait_timeout` is how long it may take for that.
const DEAF_AFTER_MS: u64 = 60_000;
const LOOK_EVERY_MS: u64 = 2_000;

/// What is to be made of the sockets of the machine at the gate.
#[derive(Debug)]
pub(crate) enum Heard {
    Nothing,
    /// For those who follow, once.
    Tell(String),
    /// It will not become healthy.
    Deaf(Failed),
}

/// Notices an app that listens, but not where its checks ask.
#[derive(Default)]
pub(crate) struct Deafness {
    since: Option<Since>,
    looked_at_ms: u64,
}

/// Since when a machine listens only elsewhere, in one attempt.
struct Since {
    machine: MachineId,
    attempt: u64,
    at_ms: u64,
    told: bool,
}

impl Deafness {
    /// Asks the host, every now and then, while the plan waits at a gate.
    pub async fn look(&mut self, ctx: &Ctx, plan: &Plan, step: &Step, observed: &Observed) -> Heard {
        let StepKind::Gate { group, version } = &step.kind else { return Heard::Nothing };
        let now_ms = now_ms();
        let fact = observed.machines.get(&step.machine);
        let Some(fact) = fact.filter(|fact| fact.state == MachineState::Started && fact.version == *version) else {
            self.since = None;
            return Heard::Nothing;
        };
        if now_ms < self.looked_at_ms.saturating_add(LOOK_EVERY_MS) {
            return Heard::Nothing;
        }
        self.looked_at_ms = now_ms;
        let is_failing = |name: &str| {
            !fact.checks.iter().any(|status| status.name == name && status.status == CheckState::Passing)
        };
        let checks = plan.specs.get(group).map_or(&[][..], |spec| &spec.checks);
        let Some(check) = checks.iter().find(|check| check.gates_routing && is_failing(&check.name)) else {
            return Heard::Nothing;
        };
        let sockets = tokio::time::timeout(LOOK_TIMEOUT, listen_sockets(ctx, &step.machine)).await;
        let Ok(Ok(sockets)) = sockets else { return Heard::Nothing };
        self.hear(&step.machine, fact.attempt, &sockets, check, now_ms)
    }

    fn hear(&mut self, machine: &MachineId, attempt: u64, sockets: &[ListenSocket], check: &Check, now_ms: u64) -> Heard {
        let port = check.port;
        let Some(said) = listens_elsewhere(sockets, port) else {
            self.since = None;
            return Heard::Nothing;
        };
        let known = self.since.take().filter(|since| since.machine == *machine && since.attempt == attempt);
        let mut since =
            known.unwrap_or_else(|| Since { machine: machine.clone(), attempt, at_ms: now_ms, told: false });
        let for_ms = now_ms.saturating_sub(since.at_ms);
        let is_for_itself_only = sockets.iter().any(|socket| socket.protocol.starts_with("tcp") && socket.address.port() == port);
        let heard = if is_for_itself_only && for_ms >= check.grace_period_ms.saturating_add(DEAF_AFTER_MS) {
            let reason = format!("machine {machine} does not listen where its configuration says: {said}");
            Heard::Deaf(Failed { machine: Some(machine.clone()), ..Failed::plain(reason) })
        } else if !since.told && for_ms >= TELL_AFTER_MS {
            since.told = true;
            Heard::Tell(format!("machine {machine}: {said}; it does not, yet"))
        } else {
            Heard::Nothing
        };
        self.since = Some(since);
        heard
    }
}

/// `None` when it listens on `port` for others, or not at all.
fn listens_elsewhere(sockets: &[ListenSocket], port: u16) -> Option<String> {
    let tcp: Vec<_> = sockets.iter().filter(|socket| socket.protocol.starts_with("tcp")).collect();
    let reachable = |socket: &&&ListenSocket| socket.address.port() == port && !socket.address.ip().is_loopback();
    if tcp.is_empty() || tcp.iter().any(|socket| reachable(&socket)) {
        return None;
    }
    let mut found: Vec<_> = tcp.iter().map(|socket| socket.address.to_string()).collect();
    found.sort();
    found.dedup();
    Some(format!("it listens on {}, but must listen on 0.0.0.0:{port}", found.join(" and ")))
}

/// The failure with the machine's last lines, its sockets, and what to do next.
pub(crate) async fn explain(ctx: &Ctx, plan: &Plan, mut failed: Failed) -> Failed {
    let Some(machine) = failed.machine.clone() else {
        failed.hint.get_or_insert_with(|| "make room, for example with `dunlin scale` or a smaller [[vm]], and deploy again".into());
        return failed;
    };
    let mut hint = None;
    if let Some(port) = gated_port(plan, &machine)
        && let Ok(Ok(sockets)) = tokio::time::timeout(LOOK_TIMEOUT, listen_sockets(ctx, &machine)).await
    {
        if let Some(said) = listens_elsewhere(&sockets, port) {
            if !failed.reason.contains(&said) {
                failed.details.push(said);
            }
            hint = Some(format!(
                "make the app listen on 0.0.0.0:{port}, or set internal_port to the port it listens on"
            ));
        } else if !sockets.iter().any(|socket| socket.address.port() == port) {
            failed.details.push(format!("it does not listen on port {port}"));
        }
    }
    failed.details.extend(tokio::time::timeout(LOOK_TIMEOUT, answers(ctx, &machine)).await.unwrap_or_default());
    let lines = tokio::time::timeout(LOOK_TIMEOUT, last_lines(ctx, plan, &machine)).await.unwrap_or_default();
    if !lines.is_empty() {
        failed.details.push(format!("last lines of machine {machine}:"));
        failed.details.extend(lines);
    }
    let hint = hint.unwrap_or_else(|| what_next(&failed.reason, &plan.app, &machine));
    failed.hint.get_or_insert(hint);
    failed
}

/// By the words of the host: its problem comes as text. The tests here make it of the errors that it comes from.
fn what_next(reason: &str, app: &AppName, machine: &MachineId) -> String {
    let is_full = ["the disk of the unpacked images", "the disk of the image store", "the disk is full"];
    if is_full.iter().any(|words| reason.contains(words)) {
        return "free space in the data directory of its host (`df` there shows it), then deploy again".into();
    }
    if reason.contains("image") {
        return format!("is the image still there? `dunlin deploy --app {app}` builds it again");
    }
    if reason.contains("out of memory") {
        return "give its machines more memory: `memory` under [[vm]] in dunlin.toml".to_owned();
    }
    format!("`dunlin logs --app {app} --machine {machine}` shows all it said")
}

fn gated_port(plan: &Plan, machine: &MachineId) -> Option<u16> {
    let group = plan.steps.iter().find_map(|step| match &step.kind {
        StepKind::Gate { group, .. } if step.machine == *machine => Some(group),
        _ => None,
    })?;
    plan.specs.get(group)?.checks.iter().find(|check| check.gates_routing).map(|check| check.port)
}

/// What the app itself answered to the checks that fail: no fact holds it, so its host is asked.
async fn answers(ctx: &Ctx, machine: &MachineId) -> Vec<String> {
    let view = ctx.view.current();
    let checks = view.machines.get(machine).map_or(&[][..], |fact| &fact.checks);
    let mut answers = Vec::new();
    let Ok(host) = hosts::of_machine(ctx, machine).await else { return answers };
    for check in checks.iter().filter(|check| check.gates_routing && check.status != CheckState::Passing) {
        if let Ok(answer) = host.check_answer(machine, &check.name).await
            && !answer.is_empty()
        {
            answers.push(format!("the app answered to check {}: {answer}", check.name));
        }
    }
    answers
}

async fn listen_sockets(ctx: &Ctx, machine: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
    hosts::of_machine(ctx, machine).await?.listen_sockets(machine).await
}

/// Of this plan's version only: what an earlier one said would lead astray. The host knows when it took the version up.
async fn last_lines(ctx: &Ctx, plan: &Plan, machine: &MachineId) -> Vec<String> {
    let Ok(host) = hosts::of_machine(ctx, machine).await else { return vec![] };
    let (Ok(fact), Ok(events)) = tokio::join!(host.machine(machine), host.events(machine)) else { return vec![] };
    let is_of_it = |step: &Step| match &step.kind {
        StepKind::Start { version, .. } | StepKind::Gate { version, .. } => step.machine == *machine && *version == fact.version,
        _ => false,
    };
    if !plan.steps.iter().any(is_of_it) {
        return vec![]; // it is still in the version before
    }
    // One that is new has no such event.
    let taken_up = events.iter().filter(|event| event.kind == EventKind::Update).map(|event| event.at_ms);
    let query = LogQuery { machine: Some(machine.clone()), since_ms: taken_up.max(), tail: Some(LAST_LINES), ..LogQuery::default() };
    let Ok(mut stream) = host.logs(query).await else { return vec![] };
    let mut lines = Vec::new();
    while let Some(line) = stream.lines.recv().await {
        if lines.len() == LAST_LINES {
            lines.remove(0);
        }
        lines.push(line.line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_model::CheckKind;

    fn sockets(addresses: &[&str]) -> Vec<ListenSocket> {
        let socket = |address: &&str| ListenSocket { protocol: "tcp".into(), address: address.parse().unwrap() };
        addresses.iter().map(socket).collect()
    }

    fn check(addresses: &[&str], expected: Option<&str>) {
        assert_eq!(listens_elsewhere(&sockets(addresses), 8080).as_deref(), expected);
    }

    /// (told at, failed at) in seconds, of an app that listens on the addresses for ten minutes.
    fn watched(addresses: &[&str]) -> (Option<u64>, Option<u64>) {
        let check = Check {
            name: "servicecheck-listens-8080".into(),
            port: 8080,
            kind: CheckKind::Tcp,
            interval_ms: 5_000,
            timeout_ms: 2_000,
            grace_period_ms: 10_000,
            gates_routing: true,
        };
        let machine = MachineId::from_random([1; 7]);
        let (mut deafness, mut told) = (Deafness::default(), None);
        for second in 0..600 {
            match deafness.hear(&machine, 1, &sockets(addresses), &check, second * 1000) {
                Heard::Nothing => {}
                Heard::Tell(_) => assert_eq!(told.replace(second), None, "told once"),
                Heard::Deaf(_) => return (told, Some(second)),
            }
        }
        (told, None)
    }

    #[test]
    fn an_app_that_opens_another_port_first_has_the_time_that_it_was_given() {
        assert_eq!(watched(&["0.0.0.0:9090"]), (Some(4), None));
        assert_eq!(watched(&["127.0.0.1:9090"]), (Some(4), None));
        assert_eq!(watched(&["127.0.0.1:8080"]), (Some(4), Some(70)), "what is bound to itself stays so");
        assert_eq!(watched(&["0.0.0.0:8080", "127.0.0.1:9090"]), (None, None));
        assert_eq!(watched(&[]), (None, None));
    }

    #[test]
    fn what_to_do_about_a_full_disk_is_to_free_it() {
        let next = |reason: &str| what_next(reason, &"web".parse().unwrap(), &MachineId::from_random([1; 7]));
        let unpacked = dunlin_registry::UnpackError::Full { dir: "/data/images".into() }.to_string();
        let stored = dunlin_registry::StoreError::Full { dir: "/data/images".into() }.to_string();
        for full in [unpacked, stored, Refusal::DiskFull("the journal cannot grow".into()).to_string()] {
            assert!(next(&format!("machine x could not be prepared: {full}")).starts_with("free space in the data directory"), "{full}");
        }
        assert!(next("machine x could not be prepared: the image is not there").starts_with("is the image still there?"));
    }

    #[test]
    fn an_app_that_listens_elsewhere_is_told_where() {
        check(&[], None);
        check(&["0.0.0.0:8080"], None);
        check(&["[::]:8080", "127.0.0.1:9000"], None);
        check(&["127.0.0.1:8080"], Some("it listens on 127.0.0.1:8080, but must listen on 0.0.0.0:8080"));
        check(
            &["0.0.0.0:5000", "127.0.0.1:8080"],
            Some("it listens on 0.0.0.0:5000 and 127.0.0.1:8080, but must listen on 0.0.0.0:8080"),
        );
    }
}

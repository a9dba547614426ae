//! What sharing state costs: members of one cluster in one process, over real sockets on loopback.
//!
//! `cargo run --release -p dunlin-cluster --example flock [HOSTS] [SECONDS]` prints how long a change takes until all others see
//! it, at several rates, and the processor time of a change at each host; then the same for one entry of a large desired state.

#[path = "../tests/fleet/world.rs"]
#[allow(dead_code)]
mod world;

use dunlin_model::{HostId, MachineId, MachineState};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use world::{Host, World, all_see_each_other, assignment, config, machine, machine_id, now_ms, until};

const MACHINES_A_HOST: u32 = 20;
/// Changes a second, of all hosts together.
const RATES: [u64; 4] = [20, 200, 1_000, 4_000];
const DESIRED_MACHINES: [u32; 2] = [1_000, 10_000];

#[derive(Default)]
struct Seen {
    sent: Mutex<HashMap<(MachineId, u64), Instant>>,
    took: Mutex<Vec<Duration>>,
    /// Changes that came when a newer one of the machine was there already.
    overtaken: AtomicU64,
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u64>().expect("a number"));
    let (hosts, seconds) = (args.next().unwrap_or(8), args.next().unwrap_or(5));
    let world = World::new();
    let names: Vec<String> = (1..=hosts).map(|number| format!("h{number}")).collect();
    let began = Instant::now();
    let hosts = Arc::new(world.fleet(&names.iter().map(String::as_str).collect::<Vec<_>>()).await);
    all_see_each_other(&hosts).await;
    println!("{} hosts know each other after {:?}", hosts.len(), began.elapsed());
    for (at, host) in hosts.iter().enumerate() {
        let machines: Vec<_> = (0..MACHINES_A_HOST).map(|number| machine(at as u32 * 1_000 + number, &names[at], 1)).collect();
        host.says(&machines);
    }
    let all = hosts.len() * MACHINES_A_HOST as usize;
    until("all have all", || hosts.iter().all(|host| host.view.current().machines.len() == all)).await;
    println!("{:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>14}", "changes/s", "reached/s", "p50 ms", "p99 ms", "max ms", "overtaken", "cpu us/ch/host");
    let mut sequence = 1;
    for rate in RATES {
        sequence = facts(&hosts, rate, seconds, sequence).await;
    }
    let (certificate, key) = world.authority.config_log(&"fra".parse().expect("a region"), 1);
    hosts[0].cluster.publish_config_of(certificate, key);
    let mut revision = 0;
    for machines in DESIRED_MACHINES {
        revision = desired(&hosts, machines, revision).await;
    }
    let status = hosts[0].cluster.status();
    println!("{:?}\n{:?}", status.gossip, status.transport);
    for host in hosts.iter() {
        host.cluster.shutdown().await;
    }
}

async fn facts(hosts: &Arc<Vec<Host>>, rate: u64, seconds: u64, mut sequence: u64) -> u64 {
    let seen = Arc::new(Seen::default());
    let watchers: Vec<_> = (0..hosts.len()).map(|at| tokio::spawn(watch(hosts.clone(), at, seen.clone()))).collect();
    let pause = Duration::from_secs_f64(1.0 / rate as f64);
    let (began, cpu) = (Instant::now(), cpu_time());
    let mut sent = 0;
    while sent < rate * seconds {
        let at = (sent as usize) % hosts.len();
        let number = (sent as usize / hosts.len()) as u32 % MACHINES_A_HOST;
        sequence += 1;
        // Started and stopped in turn: each change is one that decides something, and so is held back by nothing.
        let state = if sequence.is_multiple_of(2) { MachineState::Started } else { MachineState::Stopped };
        let host = &hosts[at];
        let fact = dunlin_view::MachineFact { state, attempt: sequence, ..machine(at as u32 * 1_000 + number, host.cluster.host().as_str(), sequence) };
        seen.sent.lock().unwrap().insert((fact.id.clone(), sequence), Instant::now());
        host.view.publish_machine(fact).expect("it is newer");
        sent += 1;
        let due = began + pause * u32::try_from(sent).expect("some thousands");
        tokio::time::sleep_until(due.into()).await;
    }
    let took = began.elapsed();
    let newest = |host: &Host| -> HashMap<MachineId, u64> { host.view.current().machines.iter().map(|(id, fact)| (id.clone(), fact.sequence)).collect() };
    until("all have the last", || {
        let first = newest(&hosts[0]);
        hosts.iter().all(|host| newest(host) == first)
    })
    .await;
    let settled = began.elapsed();
    let cpu = cpu_time() - cpu;
    watchers.iter().for_each(|watcher| watcher.abort());
    let mut took_each = std::mem::take(&mut *seen.took.lock().unwrap());
    took_each.sort_unstable();
    let at = |share: f64| took_each[((took_each.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{:>9.0} {:>9.0} {:>9.2} {:>9.2} {:>9.2} {:>10} {:>14.1}",
        sent as f64 / took.as_secs_f64(),
        sent as f64 / settled.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(1.0),
        seen.overtaken.load(Ordering::Relaxed),
        cpu.as_secs_f64() * 1e6 / sent as f64 / hosts.len() as f64,
    );
    sequence
}

async fn watch(hosts: Arc<Vec<Host>>, at: usize, seen: Arc<Seen>) {
    let own: HostId = hosts[at].cluster.host().clone();
    let mut changes = hosts[at].view.subscribe();
    let mut known: HashMap<MachineId, u64> = changes.current().machines.iter().map(|(id, fact)| (id.clone(), fact.sequence)).collect();
    loop {
        let snapshot = changes.changed().await;
        let now = Instant::now();
        for fact in snapshot.machines.values().filter(|fact| fact.host != own) {
            let before = known.insert(fact.id.clone(), fact.sequence).unwrap_or_default();
            if before == fact.sequence {
                continue;
            }
            let sent = seen.sent.lock().unwrap();
            let of_machine = (before + 1..fact.sequence).filter(|sequence| sent.contains_key(&(fact.id.clone(), *sequence))).count();
            seen.overtaken.fetch_add(of_machine as u64, Ordering::Relaxed);
            if let Some(at) = sent.get(&(fact.id.clone(), fact.sequence)) {
                seen.took.lock().unwrap().push(now - *at);
            }
        }
    }
}

async fn desired(hosts: &[Host], machines: u32, mut revision: u64) -> u64 {
    let mut state = config(revision);
    state.machines = (0..machines).map(|number| (machine_id(number), assignment(number, "h1"))).collect();
    let mut took = vec![];
    let cpu = cpu_time();
    for round in 0..20 {
        revision += 1;
        state.generation.revision = revision;
        let changed = state.machines.get_mut(&machine_id(round)).expect("there are more");
        changed.created_at_ms = revision;
        let began = Instant::now();
        hosts[0].view.publish_config(state.clone(), now_ms()).expect("it is newer");
        until("all have it", || hosts.iter().all(|host| host.view.current().config.generation.revision == revision)).await;
        took.push(began.elapsed());
    }
    let cpu = cpu_time() - cpu;
    println!("desired state of {machines} machines: all have the first after {:?}", took.remove(0));
    took.sort_unstable();
    println!("  one entry changes: p50 {:?}, max {:?}; cpu {:?} a change and host", took[took.len() / 2], took[took.len() - 1], cpu / 20 / hosts.len() as u32);
    revision
}

/// Of this process, user and system.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is there");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name in brackets").split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

//! Places machines on 1,000 simulated hosts in 30 regions of three zones, and prints how many a second of processor time,
//! for `cargo xtask bench placement`.

use dunlin_model::config::Strategy;
use dunlin_model::desired::{HostRow, Ipv4Prefix};
use dunlin_model::region::PLACES;
use dunlin_model::{Guest, HostId, MachineId, MachineSpec, MachineVersion, RegionExpr, VolumeId};
use dunlin_planner::{Ask, Capacity, Demand, Desired, For, GroupTarget, Observed, Pool, Purpose, StepKind, plan};
use dunlin_view::{HostFact, HostRoom};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

const HOSTS: usize = 1_000;
const REGIONS: usize = 30;
/// Each figure is measured for about so long.
const LONG: Duration = Duration::from_secs(2);
/// Plans that are made at a time: the clock is too coarse for one.
const BATCH: usize = 64;

fn main() {
    let mut hosts: Vec<HostRow> = (0..HOSTS).map(host).collect();
    hosts.sort_by(|a, b| a.id.cmp(&b.id)); // as the store lists them
    by_one(&hosts);
    let of = |count| vec![("app", count, 256)];
    by_plan(&hosts, "placements, plans of one machine", &of(1));
    by_plan(&hosts, "placements, plans of 100 machines", &of(100));
    by_plan(&hosts, "placements, plans of 3 groups with 60 machines", &[("app", 30, 256), ("db", 10, 2048), ("worker", 20, 512)]);
}

/// One capacity, machine after machine, as those that are made by hand.
fn by_one(hosts: &[HostRow]) {
    let observed = observed(hosts, &BTreeMap::new());
    let regions: RegionExpr = "fra,eu,any".parse().expect("an expression");
    let ask = Ask { demand: Demand::of_guest(&Guest::default()), regions: &regions, only: None, purpose: For::New };
    let (mut placed, began) = (0u64, cpu());
    while cpu() - began < LONG {
        let mut capacity = Capacity::new(hosts, &observed);
        let mut spread = capacity.spread([]);
        for _ in 0..10_000 {
            placed += u64::from(capacity.place(&ask, &mut spread).is_ok());
        }
    }
    print("placements, one after the other", placed, cpu() - began);
}

/// Whole plans, one an app, on what those before have left. To draw addresses and ids is not measured.
fn by_plan(hosts: &[HostRow], what: &str, groups: &[(&str, u32, u32)]) {
    let (mut used, mut placed, mut took, mut drawn) = (BTreeMap::new(), 0u64, Duration::ZERO, 0);
    while took < LONG {
        let desired = desired(hosts, groups);
        let observed = observed(hosts, &used);
        let pools: Vec<Pool> = (0..BATCH).map(|_| pool(hosts, Pool::wanted(&desired), &mut drawn)).collect();
        let began = cpu();
        let made: Vec<_> = pools.into_iter().map(|pool| plan(&desired, &observed, pool)).collect();
        took += cpu() - began;
        if made.iter().any(Result::is_err) {
            used.clear(); // the fleet is full: begin again
        }
        for step in made.iter().flatten().flat_map(|made| &made.steps) {
            if let StepKind::Reserve { host, guest } = &step.kind {
                // Those of a batch do not know of each other: one of them counts, or hosts would be over their capacity.
                *used.entry(host.clone()).or_insert(0) += guest.memory_mb / BATCH as u32;
                placed += 1;
            }
        }
    }
    print(what, placed, took);
}

/// That this thread has used.
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells a thread's time");
    Duration::from_nanos(text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds"))
}

fn print(what: &str, placed: u64, took: Duration) {
    println!("{what}\t{:.0}", placed as f64 / took.as_secs_f64());
}

fn host(number: usize) -> HostRow {
    HostRow {
        id: format!("h{number}").parse().expect("a host id"),
        region: PLACES[number % REGIONS].code.parse().expect("a region"),
        prefix: Ipv4Prefix { network: Ipv4Addr::new(10, 201, 0, 0), length: 24 },
        public_key: String::new(),
        cpus: 64,
        memory_mb: 256 << 10,
        zone: Some(format!("z{}", number / REGIONS % 3).parse().expect("a zone")),
        labels: BTreeMap::new(),
        cordoned: number % 50 == 7,
        draining: false,
        joined_at_ms: 0,
    }
}

fn observed(hosts: &[HostRow], used: &BTreeMap<HostId, u32>) -> Observed {
    let fact = |row: &HostRow| {
        let room = HostRoom { machines_max: 4096, disk_gb: 2000, disk_free_gb: 1000, ..HostRoom::default() };
        let fact = HostFact {
            id: row.id.clone(),
            region: row.region.clone(),
            cpus: row.cpus,
            memory_mb: row.memory_mb,
            memory_reserved_mb: used.get(&row.id).copied().unwrap_or(0),
            room: Some(room),
            updated_at_ms: 0,
        };
        (row.id.clone(), Arc::new(fact))
    };
    Observed { hosts: hosts.iter().map(fact).collect(), ..Observed::default() }
}

fn desired(hosts: &[HostRow], groups: &[(&str, u32, u32)]) -> Desired {
    let target = |(name, count, memory_mb): &(&str, u32, u32)| {
        let spec: MachineSpec = serde_json::from_value(serde_json::json!({
            "version": MachineVersion::new(0, [0; 10]), "org": "personal", "app": "web", "process_group": name, "release": 1,
            "image": { "repository": "web", "digest": "sha256:1" },
            "guest": { "cpu_kind": "shared", "cpus": 1, "memory_mb": memory_mb },
        }))
        .expect("a spec");
        ((*name).to_owned(), GroupTarget { count: *count, spec, mount: None })
    };
    Desired {
        app: "web".parse().expect("an app"),
        sequence: 1,
        purpose: Purpose::Deploy,
        release: 1,
        from_release: 0,
        groups: groups.iter().map(target).collect(),
        machines: vec![],
        free_volumes: vec![],
        left: BTreeMap::new(),
        hosts: hosts.to_vec(),
        regions: RegionExpr::any(),
        used_addresses: BTreeSet::new(),
        wait_timeout_ms: 60_000,
        strategy: Strategy::Rolling,
    }
}

fn pool(hosts: &[HostRow], wanted: usize, drawn: &mut u64) -> Pool {
    let mut pool = Pool::default();
    for _ in 0..wanted {
        *drawn += 1;
        let random = drawn.to_be_bytes();
        pool.ids.push(MachineId::from_random(std::array::from_fn(|at| random[at + 1])));
        pool.versions.push(MachineVersion::new(*drawn, [0; 10]));
        pool.volumes.push(VolumeId::from_random(random));
    }
    for row in hosts {
        pool.addresses.insert(row.id.clone(), (0..wanted as u32 + 8).filter_map(|n| row.prefix.nth(n)).collect());
    }
    pool
}

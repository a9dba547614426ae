//! A host: says what it is told to, and notes when it sees what others say. A change carries the time when it was made, in
//! microseconds: a machine's fact as its sequence, desired state as the age of the machine that has changed.

use crate::world::{assignment, config, host_fact, machine, machine_id, now_ms};
use anyhow::{Context, bail};
use dunlin_cluster::{Authority, Cluster, ClusterConfig, Member, View};
use dunlin_model::{HostId, MachineId, MachineState};
use dunlin_view::{ConfigState, MachineFact, Snapshot};
use imbl::ordmap::DiffItem;
use std::fmt::Write;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// Of hosts' machines, so that their numbers do not meet.
const MACHINES_A_HOST: u32 = 100_000;
/// What the first fact of a machine has; a change has a time.
const FIRST_SEQUENCE: u64 = 1;

struct Flock {
    cluster: Cluster,
    view: View,
    authority: Authority,
    number: u32,
    machines: u32,
    config: ConfigState,
    seen: Arc<Seen>,
}

/// How long changes took, in microseconds.
#[derive(Default)]
struct Seen {
    facts: Mutex<Vec<u64>>,
    configs: Mutex<Vec<u64>>,
}

#[tokio::main]
pub async fn run(dir: &Path, host: &str, (bind, advertise): (SocketAddr, SocketAddr)) -> anyhow::Result<()> {
    let authority = Authority::load_or_create(&dir.join("authority"), now_ms())?;
    let dir = dir.join(host);
    let member = Member::load(&dir)?.context("prepare makes it")?;
    let number = host.trim_start_matches('h').parse()?;
    let view = View::memory();
    let config_file = ClusterConfig { member, socket: UdpSocket::bind(bind)?, advertise, dir };
    let cluster = Cluster::start(config_file, view.clone()).await?;
    let seen = Arc::new(Seen::default());
    let watcher = tokio::spawn(watch(view.clone(), cluster.host().clone(), seen.clone()));
    let mut flock = Flock { cluster, view, authority, number, machines: 0, config: config(0), seen };
    for line in std::io::stdin().lines() {
        let answer = flock.obey(&line?).await?;
        println!("{answer}");
    }
    watcher.abort();
    flock.cluster.shutdown().await;
    Ok(())
}

impl Flock {
    async fn obey(&mut self, line: &str) -> anyhow::Result<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at).context("a number is missing")?.parse::<u64>().context("no number");
        match words[0] {
            // At a time, given in microseconds, so that all begin at once.
            "at" => {
                let wait = number(1)?.saturating_sub(now_us());
                tokio::time::sleep(Duration::from_micros(wait)).await;
                Box::pin(self.obey(&words[2..].join(" "))).await
            }
            "until" => self.until(number(1)? as usize, number(2)? as usize).await,
            "revision" => self.revision(number(1)?).await,
            "say" => {
                self.say(number(1)? as u32);
                Ok("ok".into())
            }
            "change" => self.change(words.get(1).context("a rate")?.parse()?, number(2)?).await,
            "config" => {
                let (certificate, key) = self.authority.config_log(&"fra".parse()?, 1);
                self.config.machines = (0..number(1)? as u32).map(|number| (machine_id(number), assignment(number, "h1"))).collect();
                self.cluster.publish_config_of(certificate, key);
                Ok("ok".into())
            }
            "make" => self.make(),
            "entry" => self.entry(),
            "facts" => Ok(told(&self.seen.facts)),
            "configs" => Ok(told(&self.seen.configs)),
            other => bail!("{other:?} is no command"),
        }
    }

    /// So many members, and so many facts; says when that was, in microseconds.
    async fn until(&self, members: usize, facts: usize) -> anyhow::Result<String> {
        loop {
            let up = self.cluster.members().iter().filter(|member| member.alive).count();
            if up >= members && self.view.current().machines.len() >= facts {
                return Ok(now_us().to_string());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn revision(&self, at_least: u64) -> anyhow::Result<String> {
        let mut changes = self.view.subscribe();
        let mut current = changes.current();
        while current.config.generation.revision < at_least {
            current = changes.changed().await;
        }
        Ok("ok".into())
    }

    fn fact(&self, at: u32, sequence: u64) -> MachineFact {
        machine(self.number * MACHINES_A_HOST + at, self.cluster.host().as_str(), sequence)
    }

    fn say(&mut self, machines: u32) {
        for at in self.machines..machines {
            self.view.publish_machine(self.fact(at, FIRST_SEQUENCE)).expect("it is new");
        }
        self.machines = machines;
        self.view.publish_host(host_fact(self.cluster.host(), now_ms()));
    }

    /// Each change is one that readers decide by, so that nothing holds it back.
    async fn change(&mut self, rate: f64, count: u64) -> anyhow::Result<String> {
        let pause = Duration::from_secs_f64(1.0 / rate);
        let began = Instant::now();
        for sent in 0..count {
            tokio::time::sleep_until((began + pause * sent as u32).into()).await;
            let (at, round) = (sent as u32 % self.machines, sent / u64::from(self.machines));
            let state = if round % 2 == 0 { MachineState::Stopped } else { MachineState::Started };
            self.view.publish_machine(MachineFact { state, attempt: round + 2, ..self.fact(at, now_us()) })?;
        }
        Ok(began.elapsed().as_micros().to_string())
    }

    /// The next desired state, made anew as control makes it: it shares nothing with the one before.
    fn make(&mut self) -> anyhow::Result<String> {
        let text = serde_json::to_vec(&self.config)?;
        self.config = serde_json::from_slice(&text)?;
        self.config.generation.revision += 1;
        Ok("ok".into())
    }

    /// Publishes it, with one entry changed.
    fn entry(&mut self) -> anyhow::Result<String> {
        let changed = changed_by(&self.config);
        let mut assignment = self.config.machines[&changed].clone();
        assignment.created_at_ms = now_us();
        self.config.machines.insert(changed, assignment);
        self.view.publish_config(self.config.clone(), now_ms())?;
        Ok("ok".into())
    }
}

async fn watch(view: View, own: HostId, seen: Arc<Seen>) {
    let mut changes = view.subscribe();
    let mut before: Arc<Snapshot> = changes.current();
    loop {
        let snapshot = changes.changed().await;
        let now = now_us();
        let mut facts = seen.facts.lock().expect("nobody panics with it");
        for item in before.machines.diff(&snapshot.machines) {
            let (DiffItem::Add(_, fact) | DiffItem::Update { new: (_, fact), .. }) = item else { continue };
            if fact.host != own && fact.sequence != FIRST_SEQUENCE {
                facts.push(now.saturating_sub(fact.sequence));
            }
        }
        drop(facts);
        let (old, new) = (&before.config, &snapshot.config);
        if old.generation != new.generation {
            let made = new.machines[&changed_by(new)].created_at_ms;
            seen.configs.lock().expect("nobody panics with it").push(now.saturating_sub(made));
        }
        before = snapshot;
    }
}

fn changed_by(config: &ConfigState) -> MachineId {
    machine_id(config.generation.revision as u32 % config.machines.len() as u32)
}

fn told(times: &Mutex<Vec<u64>>) -> String {
    let times = std::mem::take(&mut *times.lock().expect("nobody panics with it"));
    times.iter().fold(String::new(), |mut line, time| {
        let _ = write!(line, "{time} "); // a string takes everything
        line
    })
}

fn now_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970").as_micros() as u64
}

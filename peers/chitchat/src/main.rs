//! One host of a flock of chitchat's, with the commands of `crates/cluster/examples/flock`: `peer HOST BIND SEED`.
//!
//! Its defaults, but for the interval of gossip: 50 ms, as in its own tests, instead of a second.

use anyhow::{Context, bail};
use chitchat::transport::UdpTransport;
use chitchat::{ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, ProtocolVersion, spawn_chitchat};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

const INTERVAL: Duration = Duration::from_millis(50);
/// As long as a machine's fact.
const VALUE_BYTES: usize = 420;

struct Flock {
    chitchat: ChitchatHandle,
    keys: u64,
    seen: Arc<Mutex<Vec<u64>>>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [host, bind, seed] = args.as_slice() else { bail!("peer HOST BIND SEED") };
    let addr = bind.parse()?;
    let config = ChitchatConfig {
        chitchat_id: ChitchatId::new(host.as_str(), now_us(), addr),
        cluster_id: "bench".into(),
        gossip_interval: INTERVAL,
        listen_addr: addr,
        seed_nodes: vec![seed.clone()],
        failure_detector_config: FailureDetectorConfig::default(),
        marked_for_deletion_grace_period: Duration::from_secs(900),
        catchup_callback: None,
        extra_liveness_predicate: None,
        protocol_version: ProtocolVersion::V1,
    };
    let chitchat = spawn_chitchat(config, vec![], &UdpTransport).await?;
    let seen: Arc<Mutex<Vec<u64>>> = Arc::default();
    let (noted, own) = (seen.clone(), host.clone());
    let note = move |event: chitchat::KeyChangeEvent<'_>| {
        let made = event.value.split(' ').next().and_then(|made| made.parse::<u64>().ok()).unwrap_or_default();
        if *event.node.node_id != *own && made > 0 {
            noted.lock().expect("nobody panics with it").push(now_us().saturating_sub(made));
        }
    };
    chitchat.with_chitchat(|chitchat| chitchat.subscribe_event("", note.clone()).forever()).await;
    let mut flock = Flock { chitchat, keys: 0, seen };
    for line in std::io::stdin().lines() {
        println!("{}", flock.obey(&line?).await?);
    }
    Ok(())
}

impl Flock {
    async fn obey(&mut self, line: &str) -> anyhow::Result<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at).context("a number is missing")?.parse::<u64>().context("no number");
        match words[0] {
            "at" => {
                tokio::time::sleep(Duration::from_micros(number(1)?.saturating_sub(now_us()))).await;
                Box::pin(self.obey(&words[2..].join(" "))).await
            }
            "until" => self.until(number(1)? as usize, number(2)? as usize).await,
            "say" => {
                let keys = number(1)?;
                let from = self.keys;
                self.chitchat.with_chitchat(|chitchat| (from..keys).for_each(|key| chitchat.self_node_state().set(key, value(0)))).await;
                self.keys = keys;
                Ok("ok".into())
            }
            "change" => self.change(words.get(1).context("a rate")?.parse()?, number(2)?).await,
            "facts" => {
                let times = std::mem::take(&mut *self.seen.lock().expect("nobody panics with it"));
                Ok(times.iter().map(|time| format!("{time} ")).collect())
            }
            other => bail!("{other:?} is no command"),
        }
    }

    async fn until(&self, others: usize, keys: usize) -> anyhow::Result<String> {
        loop {
            let (live, held) = self.chitchat.with_chitchat(|chitchat| (chitchat.live_nodes().count(), chitchat.node_states().values().map(|state| state.num_key_values()).sum::<usize>())).await;
            if live > others && held >= keys {
                return Ok(now_us().to_string());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn change(&self, rate: f64, count: u64) -> anyhow::Result<String> {
        let pause = Duration::from_secs_f64(1.0 / rate);
        let began = Instant::now();
        for sent in 0..count {
            tokio::time::sleep_until((began + pause * sent as u32).into()).await;
            self.chitchat.with_chitchat(|chitchat| chitchat.self_node_state().set(sent % self.keys, value(now_us()))).await;
        }
        Ok(began.elapsed().as_micros().to_string())
    }
}

fn value(made_us: u64) -> String {
    format!("{made_us} {}", "x".repeat(VALUE_BYTES - 20))
}

fn now_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970").as_micros() as u64
}

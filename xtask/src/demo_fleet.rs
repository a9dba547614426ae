//! `cargo xtask demo --hosts 3`: a cluster on this computer, each host a network namespace, to look at and to break.

use crate::{packages, sh};
use anyhow::{Context, bail};
use dunlin_e2e::{Fleet, PYTHON};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs;

/// More are no better to look at, and memory is shared.
const MAX_HOSTS: usize = 5;
const CONFIG: &str = "app = \"web\"\n[http_service]\ninternal_port = 8080\n";

/// Until it is interrupted; then all of it is removed.
pub fn run(hosts: &str) -> anyhow::Result<()> {
    let count = hosts.parse::<usize>().ok().filter(|count| (1..=MAX_HOSTS).contains(count)).context("--hosts takes 1 to 5")?;
    packages::ensure(packages::For::Demo)?;
    sh::run(sh::cargo().args(["build", "--package", "dunlin"]))?;
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let ids: Vec<String> = (1..=count).map(|n| format!("w{n}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    println!("==> {count} hosts, each in a network namespace and a region of its own");
    let fleet = Fleet::start(&ids);
    // Whoever breaks things makes warnings; they are nobody's failure here.
    ids.iter().for_each(|id| fleet.host(id).expect_log(""));
    println!("==> an app with a machine for each");
    launch(&fleet, count)?;
    tell(&fleet, &ids);
    let _ = signals.forever().next();
    println!("\nremoving all of it");
    Ok(())
}

fn launch(fleet: &Fleet, count: usize) -> anyhow::Result<()> {
    let control = fleet.control();
    let source = control.source("web", PYTHON);
    fs::write(source.join("dunlin.toml"), CONFIG)?;
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&source, &["deploy"]);
    control.ok(&["scale", "count", &count.to_string(), "--app", "web"]);
    if control.get("web", "/").0 != 200 {
        bail!("the app does not answer; the log of control is {}", control.dir().join("server.log").display());
    }
    Ok(())
}

fn tell(fleet: &Fleet, ids: &[&str]) {
    println!("\nAsk the edge of any host, from the network between them:");
    for id in ids {
        println!("  nsenter --net=/run/netns/{} curl -H 'host: web.localhost' http://{}/machine", fleet.internet(), fleet.edge(id));
    }
    println!("\nLook around, where control runs ({}):", ids[0]);
    println!("  export DUNLIN_DATA_DIR={} PATH={}:$PATH", fleet.control().data().display(), sh::target_dir().join("debug").display());
    println!("  dunlin host list; dunlin machine list --app web; dunlin cluster status");
    println!("\nBreak it:");
    for (n, id) in ids.iter().enumerate() {
        let server = fleet.host(id);
        println!(
            "  {id}: kill -9 {} (keeper); nsenter --net=/run/netns/{} ip link set to-{} down (its line); log {}",
            server.keeper_pid(),
            fleet.internet(),
            n + 1,
            server.dir().join("server.log").display()
        );
    }
    println!("\nCtrl-C ends and removes all of it.");
}

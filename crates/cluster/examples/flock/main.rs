//! One host of a flock that does nothing but share state, for `cargo xtask bench flock`: a process each, in a network namespace.
//!
//! ```text
//! flock prepare DIR HOST=ADDR...        an authority, and for each host a folder with its identity
//! flock member DIR HOST BIND ADVERTISE  one host; a command a line at stdin, an answer a line at stdout
//! flock relay DELAY_MS HERE HOST...     holds up what hosts send each other, each way
//! ```

#[path = "../../tests/fleet/world.rs"]
#[allow(dead_code)]
mod world;

mod member;
mod relay;

use anyhow::{Context, bail};
use std::path::Path;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["prepare", dir, hosts @ ..] => prepare(Path::new(dir), hosts),
        ["member", dir, host, bind, advertise] => member::run(Path::new(dir), host, (bind.parse()?, advertise.parse()?)),
        ["relay", delay_ms, here, hosts @ ..] => {
            let hosts = hosts.iter().map(|host| host.parse()).collect::<Result<_, _>>()?;
            relay::run(delay_ms.parse()?, here.parse()?, hosts)
        }
        _ => bail!("see the first lines of this example"),
    }
}

/// The first knows nobody, the others know the first.
fn prepare(dir: &Path, hosts: &[&str]) -> anyhow::Result<()> {
    let authority = dunlin_cluster::Authority::load_or_create(&dir.join("authority"), world::now_ms())?;
    let world = world::World { dir: tempfile::tempdir()?, authority };
    let hosts: Vec<(&str, &str)> = hosts.iter().map(|host| host.split_once('=').context("HOST=ADDR")).collect::<Result<_, _>>()?;
    let (first, addr) = hosts.first().context("no host is named")?;
    for (host, _) in &hosts {
        let peers = [(*first, addr.parse()?)];
        let member = world.member(host, if host == first { &[] } else { &peers });
        member.save(&dir.join(host))?;
    }
    Ok(())
}

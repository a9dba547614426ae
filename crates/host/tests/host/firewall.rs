//! What other programs do to the machines' firewall.

use crate::setup::{World, set_resolvers};
use std::io::Write;
use std::process::{Command, Stdio};

fn nft(script: &str) -> String {
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = nft.wait_with_output().unwrap();
    assert!(output.status.success(), "{script}");
    String::from_utf8(output.stdout).unwrap()
}

fn table(world: &World) -> String {
    nft("list ruleset\n").split("table ").find(|table| table.contains(&world.instance().replace('-', "_"))).unwrap_or("").to_owned()
}

pub fn it_comes_back_when_somebody_flushes_it() {
    let mut world = World::new();
    world.started(1, "sleep 1000", |_| {});
    let pinned = |n: u8| table(&world).contains(&world.address(n).to_string()).then_some(());
    pinned(1).expect("a machine is pinned to its address");
    nft("flush ruleset\n");
    world.until("the table is back", || pinned(1));
    assert!(table(&world).contains("chain to_machine"));
    let name = world.instance().replace('-', "_");
    nft(&format!("flush table inet {name}\n"));
    world.until("its rules are back", || table(&world).contains("masquerade").then_some(()));
    // A start right after a flush finds no table to add to.
    nft("flush ruleset\n");
    world.started(2, "sleep 1000", |_| {});
    let after = table(&world);
    assert!([1, 2].iter().all(|n| after.contains(&world.address(*n).to_string())), "{after}");
}

pub fn a_docker_that_starts_later_cuts_nobody_off() {
    let world = World::new();
    nft("table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; }\n");
    let open = || nft("list chain ip filter FORWARD\n").contains("machines of").then_some(());
    world.until("machines pass its chain", open);
    nft("flush ruleset\n");
}

pub fn a_host_without_name_servers_starts_and_follows_when_it_gets_some() {
    set_resolvers("");
    let mut world = World::new();
    world.started(1, "sleep 1000", |_| {});
    for (n, server, text) in [(2, "192.0.2.7", "nameserver 192.0.2.7\n"), (3, "192.0.2.8", "nameserver 192.0.2.8\n")] {
        set_resolvers(text);
        world.until("machines may ask it", || table(&world).contains(server).then_some(()));
        let id = world.started(n, "cat /etc/resolv.conf; sleep 1000", |_| {});
        let printed = world.until("printed", || world.printed(&id).first().cloned());
        assert_eq!(printed, text.trim());
    }
    assert!(table(&world).contains("192.0.2.7"), "machines of before still ask the server of before");
    set_resolvers("nameserver 192.0.2.1\n");
}

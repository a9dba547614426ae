//! `dunlin host debug`: one bundle with what a person needs, and no secret in it.

use crate::deploys::config;
use dunlin_e2e::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const SECRET: &str = "plantedsecret7c1f";
const ENVIRONMENT: &str = "plantedenvironment93ab";

/// Name in the bundle -> text.
fn unpacked(bundle: &Path) -> BTreeMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let done = Command::new("tar").arg("-xzf").arg(bundle).arg("-C").arg(dir.path()).status().unwrap();
    assert!(done.success());
    let root = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                dirs.push(entry);
            } else {
                let name = entry.strip_prefix(&root).unwrap().display().to_string();
                found.insert(name, fs::read_to_string(&entry).unwrap());
            }
        }
    }
    found
}

#[test]
fn a_bundle_has_what_helps_and_no_secret() {
    let mut fleet = Fleet::start(&["w1", "w2"]);
    let control = fleet.control();
    let dir = control.source("web", PYTHON);
    config(&dir, "1", "");
    let at = dir.join("dunlin.toml");
    fs::write(&at, fs::read_to_string(&at).unwrap() + &format!("PLANTED = \"{ENVIRONMENT}\"\n")).unwrap();
    control.ok(&["apps", "create", "web"]);
    control.ok(&["secrets", "set", &format!("PLANT={SECRET}"), "--app", "web"]);
    control.ok_in(&dir, &["deploy"]);
    control.ok(&["scale", "count", "2", "--app", "web"]);
    fleet.until_whole("web", 2);
    let token = control.ok(&["tokens", "create", "--verb", "admin"]);
    let join = control.ok(&["host", "token"]);
    let keys = [control.data().join("control/master.key"), fleet.host("w2").data().join("host/host.key")];
    let keys: Vec<String> = keys.iter().map(|path| fs::read(path).unwrap().iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    let hidden: Vec<&str> = [SECRET, ENVIRONMENT, token.trim(), join.trim()].into_iter().chain(keys.iter().map(String::as_str)).collect();

    let collect = |id: &str| {
        let path = control.dir().join(format!("{id}.tar.gz"));
        control.ok(&["host", "debug", id, "-o", path.to_str().unwrap()]);
        let texts = unpacked(&path);
        for (name, text) in &texts {
            let leaked = hidden.iter().find(|secret| text.contains(**secret));
            assert!(leaked.is_none() && !text.contains("PRIVATE KEY"), "{name} has {leaked:?}");
        }
        texts
    };
    for id in ["w1", "w2"] {
        let texts = collect(id);
        for (name, says) in [
            ("host/about.json", "\"version\""),
            ("host/settings.txt", "machine_prefix"),
            ("host/doctor.json", "overlayfs"),
            ("host/log.txt", "server runs"),
            ("host/metrics.txt", "dunlin_proxy_requests_total"),
            ("host/view.json", "config_generation"),
            ("host/machines.json", "started"),
            ("host/cluster-status.json", "members"),
            ("host/computer.txt", "MemTotal"),
            ("host/disk.txt", "MiB free"),
            ("host/nft.txt", "table"),
            ("host/net-links.txt", "eth0"),
            ("control/host.json", id),
            ("control/machines.json", "started"),
            ("control/cluster-status.json", "members"),
        ] {
            assert!(texts.get(name).is_some_and(|text| text.contains(says)), "{id}: no {says:?} in {name}: {:?}", texts.keys());
        }
        assert!(texts.keys().any(|name| name.starts_with("machines/") && name.ends_with("-events.json")), "{:?}", texts.keys());
    }
    fleet.host("w2").expect_log("its supervisor was killed");
    fleet.control().expect_log("the host is dead");
    fleet.kill("w2");
    let control = fleet.control();
    let path = control.dir().join("lost.tar.gz");
    control.ok(&["host", "debug", "w2", "-o", path.to_str().unwrap()]);
    let texts = unpacked(&path);
    assert!(texts["missing.txt"].contains("all that the host knows") && texts["control/host.json"].contains("w2"), "{:?}", texts["missing.txt"]);
    control.fails(&["host", "debug", "nobody"], 1, &["nobody"]);
    fleet.power_on("w2");
    fleet.until_up(&["w2"]);
    fleet.until_whole("web", 2);
}

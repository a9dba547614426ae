//! What a hostile tenant tries from inside, as root of the machine: each attempt must fail, for its reason, and leave
//! nothing on the host. Most of it are tables of attempts that `attempts.py` makes, in the machine and, so that they
//! can succeed somewhere, on the host.

mod calls;
mod exhaustion;
mod images;
mod paths;
mod sessions;

use crate::setup::*;
use dunlin_runtime::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

const PYTHON: &str = "/usr/bin/python3";

/// An attempt, what becomes of it in a machine, and what on the host.
struct Attempt {
    name: String,
    kind: &'static str,
    arguments: Value,
    /// One of several, between bars.
    inside: &'static str,
    host: Host,
}

enum Host {
    /// The same attempt ends like this there.
    Says(&'static str),
    /// It gets further than in the machine, or this kernel has no such thing.
    Further,
    /// It would harm the host, or nobody who tests can have it.
    Untried,
}

fn attempt(name: impl Into<String>, kind: &'static str, arguments: Value, inside: &'static str, host: Host) -> Attempt {
    Attempt { name: name.into(), kind, arguments, inside, host }
}

/// A machine whose image has the host's Python.
fn python_spec(world: &World, id: &str) -> SupervisorSpec {
    let layer = world.dir.path().join("layer");
    for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        if fs::symlink_metadata(layer.join(link)).is_err() {
            symlink(target, layer.join(link)).unwrap();
        }
    }
    fs::write(layer.join("attempts.py"), include_str!("attempts.py")).unwrap();
    let mut spec = world.spec(id, "sleep 1000");
    spec.binds = vec![Bind { source: "/usr".into(), target: "/usr".into(), readonly: true }];
    spec.limits.memory_bytes = 256 << 20;
    spec
}

fn write_attempts(path: &Path, attempts: &[&Attempt]) {
    let list: Vec<Value> = attempts.iter().map(|a| json!([a.name, a.kind, a.arguments])).collect();
    fs::write(path, serde_json::to_vec(&list).unwrap()).unwrap();
}

fn outcomes(output: &str) -> BTreeMap<String, String> {
    output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {output}"))).collect()
}

/// Makes all attempts in the machine and on the host, and compares.
fn check(world: &World, id: &str, attempts: &[Attempt]) {
    let spec = python_spec(world, id);
    write_attempts(&world.dir.path().join("layer/attempts.json"), &attempts.iter().collect::<Vec<_>>());
    let machine = world.run(spec);
    let (output, code) = machine.exec(&format!("{PYTHON} /attempts.py /attempts.json"));
    assert_eq!(code, 0, "{output}");
    let inside = outcomes(&output);
    let on_host: Vec<&Attempt> = attempts.iter().filter(|a| !matches!(a.host, Host::Untried)).collect();
    let list = world.dir.path().join("attempts.json");
    write_attempts(&list, &on_host);
    let control = Command::new(PYTHON).arg(world.dir.path().join("layer/attempts.py")).arg(&list).output().unwrap();
    assert!(control.status.success(), "{}", String::from_utf8_lossy(&control.stderr));
    let on_host = outcomes(&String::from_utf8_lossy(&control.stdout));
    let mut wrong = Vec::new();
    for Attempt { name, inside: expected, host, .. } in attempts {
        let got = &inside[name];
        let is_expected = |got: &String| expected.split('|').any(|one| one == got);
        if !is_expected(got) {
            wrong.push(format!("{name}: {got} in the machine instead of {expected}"));
        }
        match (host, on_host.get(name)) {
            (Host::Says(expected), Some(got)) if got != expected => {
                wrong.push(format!("{name}: {got} on the host instead of {expected}"));
            }
            (Host::Further, Some(got)) if is_expected(got) && got != "ENOSYS" => {
                wrong.push(format!("{name}: {got} on the host too: the attempt shows nothing"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

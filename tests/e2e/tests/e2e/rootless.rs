//! A server that an ordinary user started: it does what root's does, besides what it says that it cannot.

use crate::deploys::two_machines;
use dunlin_e2e::{Api, Server, User, kill, text};
use serde_json::Value;
use std::fs;
use std::sync::Arc;

/// What such a server says when it starts. The last is what this computer lacks too.
const COSTS: [&str; 3] = ["cgroups", "loop devices", "id-mapped mounts"];

fn server() -> Server {
    let mut server = Server::of(Arc::new(User::make()));
    for cost in COSTS {
        server.expect_log(&format!("missing feature=\"{cost}\""));
    }
    server.boot();
    server
}

/// Builds, serves, runs commands, stops and starts, and outlives the deaths of its server.
#[test]
fn an_ordinary_users_server_runs_machines_and_says_what_it_costs() {
    let mut server = server();
    let user = server.user.clone().unwrap();
    two_machines(&server);
    assert_eq!((server.get("web", "/").0, server.get_tls("web", "/").0), (200, 200));
    let machines = server.machines("web");
    let [one, other] = &machines[..] else { panic!("{machines:?}") };

    // Its root is nobody that the computer knows, and neither is it the user.
    let exec = |machine: &str, command: &[&str]| text(&server.dunlin(&[&["machine", "exec", machine, "--"], command].concat()));
    let map = exec(one, &["cat", "/proc/self/uid_map"]);
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "1", "65536"], "{map}");
    let programs: Vec<u32> = user.processes().into_iter().filter(|(_, line)| line.ends_with("/app.py")).map(|(pid, _)| pid).collect();
    assert_eq!(programs.len(), 2);
    assert!(programs.iter().all(|pid| User::of(*pid) == Some(user.first_granted())), "{:?}", user.processes());

    the_rest_is_refused_with_its_reason(&server, one);
    commands_end_whole_and_are_counted(&server, one, other);
    closed_from_the_computer(&server, one);

    server.ok(&["machine", "stop", one]);
    assert_eq!(state(&server, one), "stopped");
    server.ok(&["machine", "start", one]);
    server.until("it serves again", || state(&server, one) == "started" && server.get("web", "/").0 == 200);

    // The server dies, then its keeper too: nobody stops, and the next ones find everybody.
    let supervisors = |server: &Server| -> Vec<_> { machines.iter().map(|id| server.supervisor_pid(id).unwrap()).collect() };
    let before = supervisors(&server);
    server.kill_server();
    server.wait_ready();
    assert_eq!((server.get("web", "/").0, supervisors(&server)), (200, before.clone()));
    server.kill_keeper();
    server.boot();
    assert_eq!((server.get("web", "/").0, supervisors(&server)), (200, before));

    // A supervisor dies: without control groups too nothing of its machine is left, before it is started again.
    server.expect_log("its supervisor was killed");
    kill(server.supervisor_pid(other).unwrap(), "KILL");
    server.until("it runs again", || server.supervisor_pid(other).is_some() && state(&server, other) == "started");
    let programs = user.processes().into_iter().filter(|(_, line)| line.ends_with("/app.py")).count();
    assert_eq!(programs, 2);

    server.stop();
    assert_eq!(supervisors(&server).len(), 2, "machines go on");
    let cleaned = server.cleanup();
    assert!(cleaned.status.success(), "{}", text(&cleaned));
    server.until("all is gone", || user.processes().is_empty());
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(server.data().to_str().unwrap()), "{mounts}");
}

fn state(server: &Server, machine: &str) -> Value {
    server.json(&["machine", "status", machine])["state"].clone()
}

fn the_rest_is_refused_with_its_reason(server: &Server, machine: &str) {
    let api = Api::of(&server.data());
    let (status, said) = api.once("POST", &format!("/v1/apps/web/machines/{machine}/suspend"), &[], "").unwrap();
    assert!(status >= 400 && said.contains("cannot suspend machines") && said.contains("Delegate=yes"), "{status} {said}");
    let volume = server.dunlin(&["volumes", "create", "data", "--app", "web", "--size", "1"]);
    let said = text(&volume);
    assert!(!volume.status.success() && said.contains("cannot have volumes") && said.contains("as root"), "{said}");

    let names = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|cost| cost["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&server.json(&["status", "--app", "web"])["costs"]), COSTS);
    assert!(server.ok(&["status", "--app", "web"]).contains("machines are not limited"));
    let doctor = server.dunlin(&["doctor", "--json"]);
    let checks: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let lacking = checks.as_array().unwrap().iter().filter(|check| check["ok"] == false);
    let lacking: Vec<String> = names(&lacking.cloned().collect());
    assert!(!doctor.status.success() && COSTS.iter().all(|cost| lacking.contains(&(*cost).to_owned())), "{lacking:?}");
}

/// What a command leaves in a session of its own ends with it, and a machine has so many processes and no more.
fn commands_end_whole_and_are_counted(server: &Server, one: &str, other: &str) {
    let user = server.user.clone().unwrap();
    let left = || user.processes().into_iter().filter(|(_, line)| line == "sleep 4321").count();
    server.ok(&["machine", "exec", one, "--", "sh", "-c", "setsid setsid sleep 4321 & sleep 4321 & exit 0"]);
    server.until("nothing of it is left", || left() == 0);
    let bomb = "import os, time\nn = 0\ntry:\n  while n < 6000:\n    if os.fork() == 0:\n      time.sleep(100)\n      os._exit(0)\n    n += 1\n\
                except OSError: print('stopped')\nprint(n)\n";
    let said = server.ok(&["machine", "exec", one, "--", "python3", "-c", bomb]);
    let count: u32 = said.lines().last().unwrap().parse().unwrap();
    assert!(said.contains("stopped") && (1_000..4_096).contains(&count), "{said}");
    server.ok(&["machine", "exec", other, "--", "true"]);
    let (status, said) = Api::of(&server.data()).once("GET", &format!("/v1/apps/web/machines/{one}/ps"), &[], "").unwrap();
    assert!(status == 200 && said.contains("/app.py"), "{status} {said}");
}

/// Neither by the address that a user-mode network has for it, nor by its own ones, nor another machine.
fn closed_from_the_computer(server: &Server, machine: &str) {
    let addresses = std::process::Command::new("hostname").arg("-I").output().unwrap();
    let own = String::from_utf8_lossy(&addresses.stdout).split_whitespace().find(|addr| addr.contains('.')).map(str::to_owned);
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    for address in ["10.0.2.2".to_owned()].into_iter().chain(own) {
        let script = format!("import socket; socket.create_connection(('{address}', {port}), 2)");
        let tried = server.dunlin(&["machine", "exec", machine, "--", "python3", "-c", &script]);
        assert!(!tried.status.success(), "{address} is reached");
    }
}

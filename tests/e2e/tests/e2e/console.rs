//! Machines that come and go by themselves: consoles, one-off runs, and what the clock starts.

use crate::deploys::{image, two_machines};
use dunlin_e2e::*;
use serde_json::{Value, json};
use std::io::Read;
use std::process::{Command, Stdio};

const CONSOLE: &str = "fly_app_console";

fn api(server: &Server, path: &str, body: Option<Value>) -> Value {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "90", "--unix-socket"]).arg(server.data().join("run/api.sock"));
    if let Some(body) = body {
        curl.args(["-H", "content-type: application/json", "--data-binary", &body.to_string()]);
    }
    let output = curl.arg(format!("http://localhost/v1/apps/web/machines{path}")).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
}

fn make(server: &Server, more: Value) -> String {
    let mut config = json!({ "image": image(server), "restart": { "policy": "no" } });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = api(server, "", Some(json!({ "config": config, "skip_launch": config["schedule"].is_string() })));
    made["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
}

#[test]
fn machines_that_come_and_go_by_themselves() {
    let mut server = Server::prepare();
    server.flags = ["--autostop-after", "1"].map(str::to_owned).to_vec();
    server.boot();
    two_machines(&server);
    let clockwork = make(&server, json!({ "schedule": "* * * * *", "init": { "exec": ["true"] } }));

    let lease = api(&server, &format!("/{clockwork}/lease?ttl=600"), Some(json!({ "description": "a look" })));
    let nonce = lease["data"]["nonce"].as_str().unwrap();
    let seen = server.ok(&["machine", "lease", "view", &clockwork]);
    assert!(seen.contains("root") && seen.contains("a look") && !seen.contains(nonce), "{seen}");
    server.fails(&["machine", "suspend", &clockwork], 1, &["is leased by root"]);
    let holder = server.dunlin(&["machine", "suspend", &clockwork, "--lease", nonce]);
    assert!(text(&holder).contains("from which it cannot be suspended"), "{}", text(&holder));
    server.fails(&["machine", "lease", "clear", &clockwork], 2, &["--lease NONCE"]);
    server.ok(&["machine", "lease", "clear", &clockwork, "--lease", nonce]);
    let nobody = server.dunlin(&["machine", "lease", "view", &clockwork]);
    assert!(text(&nobody).contains("nobody has a lease"), "{}", text(&nobody));

    let console = |more: &[&str]| server.dunlin(&[&["console", "--app", "web"], more].concat());
    let consoles = || server.machine_list("web").iter().filter(|machine| machine["process_group"] == CONSOLE).count();
    let ran = console(&["-e", "MORE=2", "-C", "sh -c 'echo $RELEASE $MORE $FLY_PROCESS_GROUP'"]);
    assert_eq!(text(&ran), format!("1 2 {CONSOLE}\n"));
    let failed = console(&["--vm-memory", "128mb", "-C", "sh -c 'echo bad >&2; exit 7'"]);
    assert_eq!((failed.status.code(), String::from_utf8_lossy(&failed.stderr).as_ref()), (Some(7), "bad\n"));
    assert_eq!(consoles(), 0, "their clients took them away");
    let id = server.machines("web").into_iter().find(|id| *id != clockwork).unwrap();
    assert_eq!(text(&console(&["--machine", &id, "-C", "printenv FLY_MACHINE_ID"])), format!("{id}\n"));

    // One whose client is killed, and one that is made for one run while the server is killed.
    let mut cut = server.cli(server.dir(), &["console", "--app", "web", "-C", "sh -c 'echo up; sleep 4444'"]);
    let mut cut = cut.stdout(Stdio::piped()).spawn().unwrap();
    cut.stdout.take().unwrap().read_exact(&mut [0; 3]).unwrap();
    assert_eq!(consoles(), 1);
    kill(cut.id(), "KILL");
    cut.wait().unwrap();
    server.until("the console is gone", || consoles() == 0);
    let once = make(&server, json!({ "auto_destroy": true, "init": { "exec": ["sleep", "3"] } }));
    server.kill_server();
    server.wait_ready();
    assert_eq!(api(&server, &format!("/{once}/wait?state=destroyed&timeout=60"), None)["state"], "destroyed");
    assert!(!server.data().join("machines").join(&once).exists());

    server.until("the clock started it", || server.json(&["machine", "status", &clockwork])["state"] == "stopped");
    let events = api(&server, &format!("/{clockwork}/events"), None);
    let by_clock = |event: &&Value| event["type"] == "start" && event["source"] == "host";
    assert!(events.as_array().unwrap().iter().any(|event| by_clock(&event)), "{events}");
}

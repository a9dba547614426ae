//! A database-like app whose records are in a volume: what it has acknowledged is there, whoever is killed.

use crate::kills::visit;
use dunlin_e2e::*;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Appends a numbered record and answers once it is on disk, as a database does.
const APP: &str = r#"
import http.server, os, threading

path, lock = "/data/records", threading.Lock()

def records():
    if not os.path.exists(path):
        return 0
    numbers = [int(line) for line in open(path).read().split()]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    return len(numbers)

def add():
    with lock:
        number = records() + 1
        with open(path, "a") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())
        return number

def fill():
    try:
        with open("/data/ballast", "wb") as file:
            while True:
                file.write(b"\1" * (1 << 20))
    except OSError as error:
        return error.strerror

class App(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        stat = os.statvfs("/data")
        acts = {
            "/add": add,
            "/records": records,
            "/fill": fill,
            "/empty": lambda: os.remove("/data/ballast"),
            "/mb": lambda: stat.f_blocks * stat.f_frsize >> 20,
            "/release": lambda: os.environ["RELEASE"],
        }
        body = str(acts.get(self.path, lambda: "up")()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("0.0.0.0", 8080), App).serve_forever()
"#;
const DOCKERFILE: &str = "FROM python:3.11-slim\nCOPY app.py /app.py\nCMD [\"python3\", \"-u\", \"/app.py\"]\n";

fn config(dir: &Path, release: u32) {
    let text = format!(
        "app = \"db\"\n[http_service]\ninternal_port = 8080\n[mounts]\nsource = \"data\"\ndestination = \"/data\"\n\
         initial_size = \"1gb\"\n[[restart]]\npolicy = \"always\"\n[env]\nRELEASE = \"{release}\"\n"
    );
    fs::write(dir.join("dunlin.toml"), text).unwrap();
}

/// A number that the app answers, once it answers.
fn number(server: &Server, path: &str) -> u64 {
    let mut answer = None;
    server.until(&format!("{path} answers a number"), || {
        let (status, body) = server.get("db", path);
        answer = body.trim().parse().ok().filter(|_| status == 200);
        answer.is_some()
    });
    answer.unwrap()
}

#[test]
fn what_was_acknowledged_outlives_every_kill() {
    let server = Server::start();
    let dir = server.source("db", &[("app.py", APP), ("Dockerfile", DOCKERFILE)]);
    config(&dir, 1);
    server.ok(&["apps", "create", "db"]);
    server.ok_in(&dir, &["deploy"]);
    let volumes = server.json(&["volume", "list", "--app", "db"]);
    let volume = volumes[0]["id"].as_str().unwrap().to_owned();
    let machine = server.machines("db")[0].clone();
    assert_eq!(volumes[0]["attached_machine_id"], machine.as_str(), "{volumes}");
    for expected in 1..=3 {
        assert_eq!(number(&server, "/add"), expected);
    }
    server.kill_server();
    server.wait_ready();
    assert_eq!(number(&server, "/add"), 4, "the machine lived on");
    server.expect_log("its supervisor was killed");
    let supervisor = server.supervisor_pid(&machine).expect("a supervisor");
    kill(supervisor, "KILL");
    server.until("another attempt runs", || server.supervisor_pid(&machine).is_some_and(|pid| pid != supervisor));
    // The record may have been added by a request whose answer was lost.
    assert!(number(&server, "/add") >= 5);

    // The next release has the same volume, in the same machine.
    config(&dir, 2);
    server.ok_in(&dir, &["deploy"]);
    assert_eq!(number(&server, "/release"), 2);
    let before = number(&server, "/records");
    assert!(before >= 5);
    assert_eq!(server.machines("db"), [machine.as_str()]);

    // Full is the tenant's problem alone, and is mended without a loss.
    assert_eq!(server.get("db", "/fill").1, "No space left on device");
    let full = server.json(&["volume", "show", &volume]);
    assert!(full["blocks_avail"].as_u64().unwrap() * 100 < full["blocks"].as_u64().unwrap(), "{full}");
    server.fails(&["volume", "destroy", &volume, "--yes"], 1, &["has volume", "scale"]);
    let extended = server.json(&["volume", "extend", &volume, "--size", "2"]);
    if extended["needs_restart"] == true {
        server.ok(&["machine", "restart", &machine]);
    }
    server.until("it has more room", || number(&server, "/mb") > 1500);
    server.get("db", "/empty");

    let snapshot = server.json(&["volume", "snapshots", "create", &volume])["id"].as_str().unwrap().to_owned();
    let after = number(&server, "/add");
    assert!(after > before);
    // A machine that is destroyed leaves its files to the one that takes its place.
    server.ok(&["machine", "destroy", &machine, "--force"]);
    server.until("another machine has it", || {
        let holder = server.json(&["volume", "show", &volume])["attached_machine_id"].clone();
        holder.as_str().is_some_and(|id| id != machine)
    });
    assert!(number(&server, "/records") >= after);

    // A second machine takes what a snapshot had.
    server.ok(&["volume", "create", "data", "--app", "db", "--snapshot-id", &snapshot]);
    server.ok(&["scale", "count", "2", "--app", "db"]);
    let volumes = server.json(&["volume", "list", "--app", "db"]);
    let holders: Vec<_> = volumes.as_array().unwrap().iter().map(|volume| volume["attached_machine_id"].as_str()).collect();
    assert!(holders.len() == 2 && holders[0] != holders[1] && !holders.contains(&None), "{volumes}");
    let restored = holders.into_iter().flatten().find(|id| holder_of(&volumes, &volume) != *id).expect("another machine");
    let kept = server.ok(&["machine", "exec", restored, "--", "sh", "-c", "wc -l < /data/records"]);
    assert!(kept.trim().parse::<u64>().unwrap() >= before, "{kept}");

    server.ok(&["apps", "destroy", "db", "--yes"]);
    server.until("their files are gone", || {
        fs::read_dir(server.data().join("volumes")).unwrap().count() == 0
    });
}

fn holder_of<'v>(volumes: &'v serde_json::Value, id: &str) -> &'v str {
    let volume = volumes.as_array().unwrap().iter().find(|volume| volume["id"] == id).unwrap();
    volume["attached_machine_id"].as_str().unwrap()
}

/// What is done to a volume while its host is killed is done in the end, once, and no record is lost.
#[test]
fn a_volume_survives_a_kill_at_every_boundary() {
    let mut server = Server::start();
    let dir = server.source("db", &[("app.py", APP), ("Dockerfile", DOCKERFILE)]);
    config(&dir, 1);
    server.ok(&["apps", "create", "db"]);
    server.ok_in(&dir, &["deploy"]);
    let volume = list(&server)[0]["id"].as_str().unwrap().to_owned();
    let machine = server.machines("db")[0].clone();
    let mut records = number(&server, "/add");
    for point in dunlin_host::VOLUME_KILL_POINTS {
        if point.ends_with("-remove") {
            server.ok(&["volume", "create", "extra", "--app", "db"]);
        }
        visit(&mut server, point, |server| act(server, point, &volume, &machine));
        server.until(&format!("{point}: all volumes are whole"), || {
            list(&server).iter().all(|volume| volume["state"] == "created" && volume["blocks"] != 0)
        });
        let now = number(&server, "/add");
        assert!(now > records, "{point}: there were {records} records, there are {now}");
        records = now;
        let snapshots = server.json(&["volume", "snapshots", "list", &volume]);
        let digest = |snapshot: &Value| snapshot["digest"].as_str().is_some_and(|digest| digest.starts_with("sha256:"));
        assert!(snapshots.as_array().unwrap().iter().all(digest), "{point}: {snapshots}");
        for extra in list(&server).iter().filter(|volume| volume["name"] == "extra") {
            server.ok(&["volume", "destroy", extra["id"].as_str().unwrap(), "--yes"]);
        }
        server.until(&format!("{point}: nothing else is left"), || {
            let there = fs::read_dir(server.data().join("volumes")).unwrap().flatten().map(|entry| entry.file_name());
            there.collect::<Vec<_>>() == [volume.as_str()]
        });
        let halves = fs::read_dir(server.data().join("volumes").join(&volume)).unwrap().flatten();
        let halves: Vec<_> = halves.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().ends_with(".new")).collect();
        assert!(halves.is_empty(), "{point}: {halves:?}");
    }
}

/// Passes the point; the kill may take the answer, and then it is asked for again, as a person would.
fn act(server: &Server, point: &str, volume: &str, machine: &str) {
    let size = || server.json(&["volume", "show", volume])["size_gb"].as_u64().unwrap();
    let args: Vec<String> = match point.rsplit('-').next().unwrap() {
        "make" => ["volume", "create", "extra", "--app", "db"].map(str::to_owned).to_vec(),
        "copy" if point.ends_with("source-copy") => ["volume", "fork", volume, "--name", "extra"].map(str::to_owned).to_vec(),
        "grow" => vec!["volume".into(), "extend".into(), volume.into(), "--size".into(), (size() + 1).to_string()],
        "mount" | "unmount" => ["machine", "restart", machine].map(str::to_owned).to_vec(),
        "snapshot" | "copy" => ["volume", "snapshots", "create", volume].map(str::to_owned).to_vec(),
        "remove" => {
            let extra = list(server).into_iter().find(|volume| volume["name"] == "extra").unwrap();
            ["volume", "destroy", extra["id"].as_str().unwrap(), "--yes"].map(str::to_owned).to_vec()
        }
        other => panic!("nothing here passes {other}"),
    };
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = server.dunlin(&args);
        let is_gone = args[1] == "destroy" && text(&output).contains("no volume");
        if output.status.success() || is_gone {
            return;
        }
        assert!(Instant::now() < deadline, "{point}: {}", text(&output));
    }
}

fn list(server: &Server) -> Vec<Value> {
    server.json(&["volume", "list", "--app", "db"]).as_array().unwrap().clone()
}

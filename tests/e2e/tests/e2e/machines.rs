//! Machines as their owner sees them: commands, logs, isolation.

use crate::deploys::{config, image, two_machines};
use dunlin_e2e::*;

#[test]
fn commands_and_logs() {
    let server = Server::start();
    two_machines(&server);
    let id = server.machines("web")[0].clone();
    assert!(server.ok(&["machine", "stop", &id]).contains("stopped"));
    assert_eq!(server.json(&["machine", "status", &id])["state"], "stopped");
    assert_eq!(server.get("web", "/").0, 200, "the other one answers");
    server.ok(&["machine", "start", &id]);
    server.ok(&["machine", "restart", &id, "--app", "web"]);
    server.fails(&["machine", "status", &id, "--app", "other"], 1, &["there is no app other"]);
    let said = server.ok(&["machine", "exec", &id, "--", "sh", "-c", "echo out; id -u; pwd"]);
    assert_eq!(said, "out\n0\n/\n");
    let failing = server.dunlin(&["machine", "exec", &id, "--", "sh", "-c", "echo bad >&2; exit 7"]);
    assert_eq!((failing.status.code(), String::from_utf8_lossy(&failing.stderr).as_ref()), (Some(7), "bad\n"));

    for _ in 0..4 {
        server.get("web", "/print"); // some of them reach each machine
    }
    let logs = server.ok(&["logs", "--app", "web"]);
    assert!(logs.contains("listens on") && logs.contains("printed"), "{logs}");
    let of_one = server.ok(&["logs", "--app", "web", "--machine", &id, "--json"]);
    assert!(of_one.lines().all(|line| line.contains(&id)), "{of_one}");
    assert_eq!(server.ok(&["logs", "--app", "web", "--since", "0s"]), "");
    // Lines from before a restart of the server are still there, and following goes on with new ones.
    server.kill_server();
    server.wait_ready();
    assert!(server.ok(&["logs", "--app", "web"]).contains("printed"));
    let mut follower = server.cli(server.dir(), &["logs", "--app", "web", "-f", "-n", "0"]);
    let mut follower = follower.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(follower.stdout.take().unwrap()));
    std::thread::scope(|scope| {
        let prints = scope.spawn(|| lines.next().unwrap().unwrap());
        while !prints.is_finished() {
            server.get("web", "/print");
        }
        assert!(prints.join().unwrap().contains("printed"));
    });
    follower.kill().unwrap();
    follower.wait().unwrap();

    server.fails(&["machine", "destroy", &id], 1, &["started", "--force"]);
    server.ok(&["machine", "destroy", &id, "--force"]);
    assert!(!server.machines("web").contains(&id));
    server.ok(&["apps", "destroy", "web", "--yes"]);
    server.until("nothing of the app is left", || server.ok(&["apps", "list", "--json"]).trim() == "[]");
    assert_eq!(server.get("web", "/").0, 404);
}

/// A request starts a machine that sleeps; with a cordon none does.
#[test]
fn a_request_wakes_a_sleeping_machine() {
    let server = Server::start();
    two_machines(&server);
    server.ok(&["scale", "count", "1", "--app", "web"]);
    let id = server.machines("web")[0].clone();
    server.ok(&["machine", "stop", &id]);
    let answers: Vec<u16> = std::thread::scope(|scope| {
        let requests: Vec<_> = (0..20).map(|_| scope.spawn(|| server.get("web", "/").0)).collect();
        requests.into_iter().map(|request| request.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|status| *status == 200), "{answers:?}");
    assert_eq!(server.json(&["machine", "status", &id])["state"], "started");
}

/// An update keeps the id; a machine that a person stopped stays stopped.
#[test]
fn an_update_keeps_the_machine_and_its_sleep() {
    let server = Server::start();
    let dir = two_machines(&server);
    let ids = server.machines("web");
    server.ok(&["machine", "stop", &ids[0]]);
    config(&dir, "2", "");
    server.ok_in(&dir, &["deploy", "--image", &image(&server)]);
    assert_eq!(server.machines("web"), ids);
    let states: Vec<_> = ids.iter().map(|id| server.json(&["machine", "status", id])["state"].clone()).collect();
    assert_eq!(states, ["stopped", "started"]);
    server.ok(&["machine", "start", &ids[0]]);
    assert_eq!(server.ok(&["machine", "exec", &ids[0], "--", "printenv", "RELEASE"]), "2\n");
}

/// Speaks to the API from inside a machine; the argument is a token.
const ASK: &str = r#"
import http.client, json, os, socket, sys

def connect():
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(60)
    peer.connect("/.fly/api")
    return peer

def ask(path, headers={}, peer=None):
    client = http.client.HTTPConnection("api")
    client.sock = peer or connect()
    client.request("GET", path, headers=headers)
    answer = client.getresponse()
    answer.read()
    return answer.status, answer.headers["fly-request-id"]

def refused(call):
    try:
        call()
        return "done"
    except OSError as error:
        return error.strerror

token = {"authorization": "Bearer " + sys.argv[1]}
crowd = [connect() for _ in range(40)]
def is_served(peer):
    try:
        return ask("/v1/openapi.json", peer=peer)[0] == 200
    except (OSError, http.client.HTTPException):
        return False
served = [is_served(peer) for peer in crowd].count(True)
[peer.close() for peer in crowd]
def after_the_crowd():
    while True:
        try:
            return ask("/v1/apps")[0]
        except (OSError, http.client.HTTPException):
            pass
print(json.dumps({
    "served": served,
    "without": after_the_crowd(),
    "with": ask("/v1/apps/web", token)[0],
    "other": ask("/v1/apps/other", token)[0],
    "metrics": ask("/metrics", token)[0],
    "readyz": ask("/readyz")[0],
    "up": ask("/v1/../metrics", token)[0],
    "own id": ask("/v1/apps/web", {**token, "dunlin-request-id": "mine"})[1] != "mine",
    "listing": os.listdir("/.fly"),
    "remove": refused(lambda: os.remove("/.fly/api")),
    "make": refused(lambda: open("/.fly/x", "w")),
}))
"#;

#[test]
fn the_api_is_in_machines_and_gives_nothing_without_a_token() {
    let server = Server::start();
    two_machines(&server);
    server.ok(&["apps", "create", "other"]);
    let token = server.ok(&["tokens", "create", "--app", "web", "--verb", "read"]);
    let id = server.machines("web")[0].clone();
    let expected = serde_json::json!({
        "served": 16, "without": 401, "with": 200, "other": 403, "metrics": 404, "readyz": 404, "up": 404, "own id": true,
        "listing": ["api"], "remove": "Read-only file system", "make": "Read-only file system",
    });
    let asked = || {
        let said = server.ok(&["machine", "exec", &id, "--", "python3", "-c", ASK, token.trim()]);
        serde_json::from_str::<serde_json::Value>(&said).unwrap()
    };
    assert_eq!(asked(), expected);
    // The machine is the same, the socket is another one.
    server.kill_server();
    server.wait_ready();
    assert_eq!(asked(), expected);
    let outside = server.dunlin(&["machine", "exec", &id, "--", "ls", server.data().join("run").to_str().unwrap()]);
    assert!(!outside.status.success(), "the host's own sockets are in sight");
}

/// What a program in a machine sees, and what it does not reach.
#[test]
fn a_machine_is_alone() {
    let server = Server::start();
    two_machines(&server);
    let ids = server.machines("web");
    let list = server.machine_list("web");
    let other = list[1]["private_ip"].as_str().unwrap();
    let run = |script: &str| {
        let output = server.dunlin(&["machine", "exec", &ids[0], "--", "python3", "-c", script]);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let connect = |host: &str, port: u16| {
        run(&format!("import socket\ntry:\n socket.create_connection(('{host}', {port}), 3).close(); print('open')\nexcept OSError as e: print('closed', e)"))
    };
    assert!(connect(other, 8080).starts_with("closed"), "another machine is reached");
    let gateway = run("print([l.split()[2] for l in open('/proc/net/route') if l.split()[1] == '00000000'][0])");
    let bytes: Vec<u8> = (0..4).map(|i| u8::from_str_radix(&gateway[2 * i..2 * i + 2], 16).unwrap()).collect();
    let gateway = format!("{}.{}.{}.{}", bytes[3], bytes[2], bytes[1], bytes[0]);
    assert!(connect(&gateway, server.http).starts_with("closed"), "the host's ports are reached");
    assert!(connect("169.254.169.254", 80).starts_with("closed"), "metadata is reached");
    assert!(connect("127.0.0.1", server.http).starts_with("closed"));
    assert_eq!(run("print(open('/proc/self/uid_map').read().split()[0])"), "0");
    assert_ne!(run("print(open('/proc/self/uid_map').read().split()[1])"), "0", "root here is nobody there");
    assert_eq!(run("print([l.split()[1] for l in open('/proc/self/status') if l.startswith('NoNewPrivs')][0])"), "1");
    assert_eq!(run("print([l.split()[1] for l in open('/proc/self/status') if l.startswith('Seccomp:')][0])"), "2");
    let refused = run(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n\
         print([libc.unshare(0x10000000), libc.mount(b'none', b'/mnt', b'tmpfs', 0, None), libc.setns(0, 0), libc.ptrace(16, 1, 0, 0)])",
    );
    assert_eq!(refused, "[-1, -1, -1, -1]");
    assert_eq!(run("try:\n print(open('/proc/kcore', 'rb').read(4))\nexcept OSError:\n print(b'')"), "b''", "the kernel's memory");
    assert_eq!(run("import os\nprint(len([p for p in os.listdir('/proc') if p.isdigit()]) < 10)"), "True", "only its own processes");
    let hosts_files = run("import os\nprint([p for p in ['/host', '/work', '/var/lib/dunlin'] if os.path.exists(p)])");
    assert_eq!(hosts_files, "[]");
}

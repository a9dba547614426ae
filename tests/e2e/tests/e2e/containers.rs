//! Machines of several programs, by the bodies that Fly's clients send.

use crate::deploys::{image, two_machines};
use crate::kills::api_post;
use dunlin_e2e::*;
use serde_json::{Value, json};

fn create(server: &Server, config: Value) -> Value {
    let answer = api_post(server, "/v1/apps/web/machines", &json!({ "config": config }).to_string());
    serde_json::from_slice(&answer.stdout).unwrap_or_else(|_| panic!("{}", text(&answer)))
}

/// `program: line` of one machine.
fn said(server: &Server, id: &str) -> Vec<String> {
    let lines = server.ok(&["logs", "--app", "web", "--machine", id, "--json"]);
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| format!("{}: {}", line["program"].as_str().unwrap_or_default(), line["line"].as_str().unwrap())).collect()
}

fn states(server: &Server, id: &str) -> Value {
    server.json(&["machine", "status", id, "--app", "web"])["containers"].clone()
}

#[test]
fn a_machine_runs_containers_and_another_runs_processes() {
    let server = Server::start();
    two_machines(&server);
    let image = image(&server);
    server.ok(&["secrets", "set", "--app", "web", "DB_PASSWORD=hidden", "OTHER=too"]);
    let script = |text: &str| json!(["sh", "-c", text]);
    let idle = "trap 'echo bye; exit 0' TERM; while :; do sleep 0.1; done";
    let made = create(&server, json!({
        "containers": [
            {
                "name": "web", "image": image, "exec": script(&format!("echo web $ME ${{OTHER-none}}; {idle}")),
                "env_from": [{ "env_var": "ME", "field_ref": "id" }], "secrets": [{ "env_var": "PASSWORD", "name": "DB_PASSWORD" }],
                "depends_on": [{ "name": "setup", "condition": "exited_successfully" }, { "name": "app", "condition": "healthy" }],
                "stop": { "signal": "SIGTERM" },
            },
            {
                "name": "app", "image": image, "exec": script(&format!("echo app $OTHER; touch /tmp/ready; {idle}")),
                "healthchecks": [{ "exec": { "command": ["test", "-e", "/tmp/ready"] } }], "stop": { "signal": "SIGTERM" },
            },
            { "name": "setup", "image": image, "exec": script("sleep 0.2; echo set up"), "restart": { "policy": "no" } },
        ],
    }));
    let id = made["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    let running = json!([
        { "name": "web", "state": "running" }, { "name": "app", "state": "healthy" }, { "name": "setup", "state": "stopped" },
    ]);
    server.until("all run", || states(&server, &id) == running);
    let exec = |container: &[&str], script: &str| {
        let args = [&["machine", "exec", &id, "--app", "web"], container, &["--", "sh", "-c", script]].concat();
        server.ok(&args)
    };
    assert_eq!(exec(&[], "ls /tmp/ready"), "/tmp/ready\n", "app is the default");
    assert_eq!(exec(&["--container", "web"], "ls /tmp; echo $PASSWORD ${OTHER-none}"), "hidden none\n");
    let body = json!({ "cmd": "echo of web", "container": "web" }).to_string();
    let answer: Value = serde_json::from_slice(&api_post(&server, &format!("/v1/apps/web/machines/{id}/exec"), &body).stdout).unwrap();
    assert_eq!(answer["stdout"], "of web\n", "{answer}");
    let stopped = ["machine", "exec", &id, "--app", "web", "--container", "setup", "--", "true"];
    server.fails(&stopped, 1, &["container setup is not running"]);
    // A killed server changes nothing.
    server.kill_server();
    server.wait_ready();
    assert_eq!(states(&server, &id), running);
    server.ok(&["machine", "suspend", &id, "--app", "web"]);
    server.ok(&["machine", "start", &id, "--app", "web"]);
    server.until("it goes on", || states(&server, &id) == running);
    server.ok(&["machine", "stop", &id, "--app", "web"]);
    assert!(states(&server, &id).as_array().unwrap().iter().all(|container| container["state"] == "stopped"));
    let lines = said(&server, &id);
    let at = |line: &str| lines.iter().position(|said| said == line).unwrap_or_else(|| panic!("{line}: {lines:?}"));
    assert!(at("setup: set up") < at(&format!("web: web {id} none")) && at("app: app too") < at(&format!("web: web {id} none")));
    assert!(at("web: bye") < at("app: bye"));

    let processes = create(&server, json!({
        "image": image, "restart": { "policy": "no" },
        "processes": [
            { "exec": script("echo shared >/tmp/x; trap 'exit 0' INT; while :; do sleep 0.1; done") },
            {
                "exec": script("while ! cat /tmp/x 2>/dev/null; do sleep 0.1; done; echo $A ${OTHER-none}; exit 3"),
                "env": { "A": "own" }, "ignore_app_secrets": true,
            },
        ],
    }));
    let id = processes["id"].as_str().unwrap_or_else(|| panic!("{processes}")).to_owned();
    server.until("it ended", || server.json(&["machine", "status", &id, "--app", "web"])["exit"]["exit_code"] == 3);
    let lines = said(&server, &id);
    assert!(lines.contains(&"processes[1]: shared".to_owned()) && lines.contains(&"processes[1]: own none".to_owned()), "{lines:?}");
    let circle = json!({ "image": image, "containers": [{ "name": "a", "depends_on": [{ "name": "a" }] }] });
    let refused = create(&server, circle);
    assert!(refused["error"].as_str().unwrap().contains("config.containers[0].depends_on"), "{refused}");
}

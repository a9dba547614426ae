//! `kill -9` at every boundary between a durable write and an act, and at random.

use crate::deploys::{config, image, two_machines};
use dunlin_e2e::*;
use serde_json::Value;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Clients of the probe; at each kill every one of them may have one request in flight.
const CLIENTS: usize = 2;

/// After whatever happened: every machine in one release, and that one answers.
fn is_whole(server: &Server, allowed: &[String]) {
    server.until("the app is in one release", || {
        let machines = server.machine_list("web");
        let releases = server.json(&["releases", "--app", "web"]);
        let settled = releases[0]["status"] != "running";
        // A machine that a release leaves as it is keeps the number of the one that last changed it.
        let content = |machine: &serde_json::Value| (machine["config"]["env"].clone(), machine["image_ref"]["digest"].clone());
        let same = machines.windows(2).all(|pair| content(&pair[0]) == content(&pair[1]));
        settled && same && machines.iter().all(|machine| machine["state"] == "started")
    });
    let bodies: Vec<String> = (0..6).map(|_| server.get("web", "/").1).collect();
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    assert!(allowed.contains(&bodies[0]), "{bodies:?}, and not {allowed:?}");
}

fn check_traffic(point: &str, seen: &Seen, kills: usize) {
    assert!(seen.refused.is_empty(), "{point}: {seen:?}");
    assert!(seen.bad.is_empty(), "{point}: {seen:?}");
    assert!(seen.cut.len() <= kills * CLIENTS, "{point}: more was cut than was in flight: {seen:?}");
    assert!(seen.good > 0, "{point}: {seen:?}");
}

/// Restarts the server with a kill point, runs `act` against it, and waits for it to have been visited.
pub fn visit(server: &mut Server, point: &str, act: impl FnOnce(&Server)) {
    server.stop();
    server.flags = vec!["--kill-at".into(), point.into()];
    for text in ["the server died; restarting it", "plan failed", "failed", "its supervisor was killed"] {
        server.expect_log(text);
    }
    let deaths = |server: &Server| server.log().matches("the server died; restarting it").count();
    let before = deaths(server);
    server.boot();
    act(server);
    server.until(&format!("{point} is visited"), || deaths(server) > before);
    server.flags.clear();
    server.wait_ready();
}

/// One deploy under traffic for each of control's points that a good deploy passes.
#[test]
fn control_is_killed_at_every_step_of_a_deploy() {
    let mut server = Server::start();
    let dir = two_machines(&server);
    let image = image(&server);
    let mut release = 1;
    let points = ["release", "plan", "update", "gate", "done", "publish"];
    for point in points.iter().flat_map(|point| [format!("{point}-before"), format!("{point}-after")]) {
        let old = format!("release {release}");
        release += 1;
        config(&dir, &release.to_string(), "");
        let mut probe = None;
        visit(&mut server, &point, |server| {
            probe = Some(Probe::start("web", server.http, CLIENTS));
            deploy_through_a_kill(server, &dir, &image);
        });
        is_whole(&server, &[format!("release {release}")]);
        let seen = probe.unwrap().stop();
        check_traffic(&point, &seen, 1);
        let known = [old, format!("release {release}")];
        assert!(seen.bodies.iter().all(|body| known.contains(body)), "{point}: {seen:?}");
    }
}

/// The kill may take the request that makes the release: then it is made again, as a person would.
fn deploy_through_a_kill(server: &Server, dir: &Path, image: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = server.dunlin_in(dir, &["deploy", "--image", image]);
        if output.status.success() {
            return;
        }
        assert!(Instant::now() < deadline, "{}", text(&output));
        assert!(matches!(output.status.code(), Some(1 | 6)), "{:?}: {}", output.status, text(&output));
    }
}

/// The points of scaling, of a failing release, of secrets and of destroying.
#[test]
fn control_is_killed_at_every_other_step() {
    let mut server = Server::start();
    let dir = two_machines(&server);
    let image = image(&server);
    let through = |server: &Server, args: &[&str]| {
        let deadline = Instant::now() + PATIENCE;
        while !server.dunlin(args).status.success() {
            assert!(Instant::now() < deadline, "dunlin {}", args.join(" "));
        }
    };
    for (step, up, down) in [("reserve", "3", "2"), ("assign", "3", "2"), ("start", "3", "2"), ("cordon", "2", "1"), ("stop", "2", "1"), ("destroy", "2", "1")] {
        for phase in ["before", "after"] {
            let grows = matches!(step, "reserve" | "assign" | "start");
            let (first, second) = if grows { (down, up) } else { (up, down) };
            through(&server, &["scale", "count", first, "--app", "web"]);
            visit(&mut server, &format!("{step}-{phase}"), |server| through(server, &["scale", "count", second, "--app", "web"]));
            let wanted: usize = second.parse().unwrap();
            server.until("the count is right", || server.machines("web").len() == wanted);
            is_whole(&server, &["release 1".into()]);
        }
    }
    through(&server, &["scale", "count", "2", "--app", "web"]);
    for phase in ["before", "after"] {
        config(&dir, "1", "");
        visit(&mut server, &format!("failed-{phase}"), |server| {
            config(&dir, "bad", "BEHAVE = \"exits\"");
            let output = server.dunlin_in(&dir, &["deploy", "--image", &image]);
            assert!(matches!(output.status.code(), Some(1 | 3 | 6)), "{}", text(&output));
        });
        is_whole(&server, &["release 1".into()]);
        visit(&mut server, &format!("secrets-{phase}"), |server| {
            through(server, &["secrets", "set", &format!("COLOUR={phase}"), "--app", "web"]);
        });
        is_whole(&server, &["release 1".into()]);
        server.until("the secret is there", || server.get("web", "/env/COLOUR").1 == phase);
        let other = format!("other-{phase}");
        server.ok(&["apps", "create", &other]);
        std::fs::write(dir.join("other.toml"), format!("app = \"{other}\"\n")).unwrap();
        server.ok_in(&dir, &["deploy", "--config", "other.toml"]);
        visit(&mut server, &format!("app-destroy-{phase}"), |server| {
            let _ = server.dunlin(&["apps", "destroy", &other, "--yes"]); // the kill may take its answer
        });
        server.until("the app is gone", || !server.ok(&["apps", "list"]).contains(&other));
        assert_eq!(server.machines("web").len(), 2, "the other app's machines are nobody else's");
    }
}

/// A scale-down that is thought better of while its machine stops: the next plan takes the cordon back.
#[test]
fn control_is_killed_while_it_takes_a_cordon_back() {
    let mut server = Server::start();
    let dir = two_machines(&server);
    config(&dir, "1", "BEHAVE = \"stubborn\"");
    let text = std::fs::read_to_string(dir.join("dunlin.toml")).unwrap();
    std::fs::write(dir.join("dunlin.toml"), text.replace("app = \"web\"\n", "app = \"web\"\nkill_timeout = \"10s\"\n")).unwrap();
    server.ok_in(&dir, &["deploy", "--image", &image(&server)]);
    for phase in ["before", "after"] {
        visit(&mut server, &format!("uncordon-{phase}"), |server| {
            server.ok(&["scale", "count", "1", "--app", "web", "--detach"]);
            server.until("one is cordoned", || server.machine_list("web").iter().any(|machine| machine["cordoned"] == true));
            let deadline = Instant::now() + PATIENCE;
            while !server.dunlin(&["scale", "count", "2", "--app", "web"]).status.success() {
                assert!(Instant::now() < deadline);
            }
        });
        is_whole(&server, &["release 1".into()]);
        assert_eq!(server.machines("web").len(), 2);
        assert!(server.machine_list("web").iter().all(|machine| machine["cordoned"] == false));
    }
}

/// Every point of control's list is visited by the tests above.
#[test]
fn no_point_of_control_is_forgotten() {
    let visited = [
        "release", "plan", "update", "start", "gate", "done", "publish", "reserve", "assign", "cordon", "stop", "destroy",
        "failed", "secrets", "app-destroy", "uncordon",
    ];
    for point in dunlin_control::kill_points() {
        let step = point.trim_end_matches("-before").trim_end_matches("-after");
        assert!(visited.contains(&step), "{point} is never visited");
    }
}

/// The host agent dies at each of its own boundaries; an act that passes the point is found for each.
#[test]
fn the_host_is_killed_at_every_boundary() {
    let mut server = Server::start();
    let dir = two_machines(&server);
    let image = image(&server);
    let mut release = 1;
    for point in dunlin_host::KILL_POINTS {
        release += 1;
        config(&dir, &release.to_string(), "");
        let mut probe = None;
        visit(&mut server, point, |server| {
            probe = Some(Probe::start("web", server.http, CLIENTS));
            deploy_through_a_kill(server, &dir, &image);
            let deadline = Instant::now() + PATIENCE;
            let mut n = 0;
            // What a deploy does not pass, one of these does.
            while !server.log().contains("the server died") || n == 0 {
                assert!(Instant::now() < deadline, "{point} was not reached");
                n += 1;
                for args in [
                    vec!["scale", "count", "3", "--app", "web"],
                    vec!["scale", "count", "2", "--app", "web"],
                ] {
                    let _ = server.dunlin(&args); // the kill may take its answer
                }
                let listed = server.dunlin(&["machine", "list", "--app", "web", "--json"]); // and this one's
                let listed: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
                if let Some(machine) = listed.first().and_then(|machine| machine["id"].as_str()) {
                    let path = format!("/v1/apps/web/machines/{machine}/signal");
                    let _ = api_post(server, &path, r#"{"signal":"SIGWINCH"}"#);
                    for verb in ["suspend", "start"] {
                        let _ = api_post(server, &format!("/v1/apps/web/machines/{machine}/{verb}"), "{}");
                    }
                    if let Some(pid) = server.supervisor_pid(machine) {
                        kill(pid, "KILL");
                    }
                }
            }
        });
        server.until("two machines", || server.machines("web").len() == 2);
        // The kill may have come between the suspend and the start.
        for machine in server.machines("web") {
            let _ = api_post(&server, &format!("/v1/apps/web/machines/{machine}/start"), "{}");
        }
        is_whole(&server, &[format!("release {release}")]);
        let seen = probe.unwrap().stop();
        assert!(seen.refused.is_empty(), "{point}: {seen:?}");
    }
}

/// Of each deploy one supervisor dies at one of its boundaries: the machine is made again, and the release is not
/// to blame.
#[test]
fn a_supervisor_is_killed_at_every_boundary() {
    let mut server = Server::start();
    let dir = two_machines(&server);
    let image = image(&server);
    let deaths = ["it could not be started", "its supervisor was killed"];
    for text in deaths {
        server.expect_log(text);
    }
    let died = |server: &Server| deaths.iter().map(|text| server.log().matches(text).count()).sum::<usize>();
    for (n, point) in dunlin_host::SUPERVISOR_KILL_POINTS.iter().enumerate() {
        let release = (n + 2).to_string();
        config(&dir, &release, "");
        server.stop();
        server.flags = vec!["--kill-at".into(), (*point).into()];
        server.boot();
        // One that is killed at its end ends by a second deploy.
        let is_at_the_end = point.ends_with("-record");
        let before = died(&server);
        let probe = Probe::start("web", server.http, CLIENTS);
        server.ok_in(&dir, &["deploy", "--image", &image]);
        if is_at_the_end {
            config(&dir, &format!("{release} again"), "");
            server.ok_in(&dir, &["deploy", "--image", &image]);
        }
        let seen = probe.stop();
        let running = if is_at_the_end { format!("release {release} again") } else { format!("release {release}") };
        is_whole(&server, &[running]);
        assert!(seen.refused.is_empty() && seen.bad.is_empty(), "{point}: {seen:?}");
        // After its record nothing shows that it was killed, and nothing must.
        let expected = usize::from(*point != "supervisor.after-record");
        assert_eq!(died(&server) - before, expected, "{point} is visited");
        server.flags.clear();
    }
}

/// Root's own socket, as curl reaches it.
pub fn api_post(server: &Server, path: &str, body: &str) -> std::process::Output {
    std::process::Command::new("curl")
        .args(["-sS", "--max-time", "10", "--unix-socket"])
        .arg(server.data().join("run/api.sock"))
        .args(["-X", "POST", "-H", "content-type: application/json", "-d", body, &format!("http://localhost{path}")])
        .output()
        .unwrap()
}

/// Machines and their processes are the same before and after the server died, and one that lost its
/// supervisor comes back.
#[test]
fn machines_outlive_the_server_and_come_back_from_a_killed_supervisor() {
    let server = Server::start();
    two_machines(&server);
    let pids = |server: &Server| -> Vec<Option<u32>> { server.machines("web").iter().map(|m| server.supervisor_pid(m)).collect() };
    let before = pids(&server);
    assert!(before.iter().all(Option::is_some), "{before:?}");
    for _ in 0..5 {
        server.kill_server();
        server.wait_ready();
    }
    assert_eq!(pids(&server), before);
    let probe = Probe::start("web", server.http, CLIENTS);
    let victim = server.machines("web")[0].clone();
    server.expect_log("supervisor");
    kill(server.supervisor_pid(&victim).unwrap(), "KILL");
    server.until("it runs again under another supervisor", || {
        server.supervisor_pid(&victim).is_some_and(|pid| Some(pid) != before[0])
            && server.machine_list("web").iter().all(|machine| machine["state"] == "started")
    });
    let seen = probe.stop();
    assert!(seen.refused.is_empty() && seen.bad.is_empty(), "{seen:?}");
    assert!(seen.cut.len() <= CLIENTS, "{seen:?}");
}

/// Deploys without a pause, and somebody who kills.
#[test]
fn random_kills_under_deploys_lose_nothing() {
    const FOR: Duration = Duration::from_secs(60);
    let server = Server::start();
    let dir = two_machines(&server);
    let image = image(&server);
    for text in ["the server died; restarting it", "supervisor", "failed", "superseded"] {
        server.expect_log(text);
    }
    let probe = Probe::start("web", server.http, CLIENTS);
    let mut random = Random::seeded();
    println!("seed {:#x}", random.0);
    let ends = Instant::now() + FOR;
    let kills = thread::scope(|scope| {
        let (server, ends) = (&server, ends);
        let killer = scope.spawn(move || {
            let mut kills = 0;
            while Instant::now() < ends {
                thread::sleep(Duration::from_millis(200 + random.below(2_500)));
                kills += 1;
                let machines = server.dunlin(&["machine", "list", "--app", "web", "--json"]);
                let machines: Vec<serde_json::Value> = serde_json::from_slice(&machines.stdout).unwrap_or_default();
                let supervisor = machines
                    .get(random.below(2) as usize)
                    .and_then(|machine| server.supervisor_pid(machine["id"].as_str()?));
                match supervisor {
                    // One of two machines at a time: what both at once would do is another promise.
                    Some(pid) if random.below(3) == 0 => {
                        kill(pid, "KILL");
                        server.until("both run", || {
                            let list = server.dunlin(&["machine", "list", "--app", "web", "--json"]);
                            let list: Vec<serde_json::Value> = serde_json::from_slice(&list.stdout).unwrap_or_default();
                            list.len() == 2 && list.iter().all(|machine| machine["state"] == "started")
                        });
                    }
                    _ => server.kill_server(),
                }
            }
            kills
        });
        let mut release = 1;
        while Instant::now() < ends {
            release += 1;
            config(&dir, &release.to_string(), "");
            deploy_or_return(server, &dir, &image);
        }
        killer.join().unwrap()
    });
    config(&dir, "last", "");
    deploy_through_a_kill(&server, &dir, &image);
    is_whole(&server, &["release last".into()]);
    let seen = probe.stop();
    println!("{kills} kills, {} answers, {} cut, slowest {:?}", seen.good, seen.cut.len(), seen.slowest);
    check_traffic("random kills", &seen, kills);
}

/// A machine that is killed while it is gated may rightly fail its release: then the last good one runs.
fn deploy_or_return(server: &Server, dir: &Path, image: &str) {
    let output = server.dunlin_in(dir, &["deploy", "--image", image]);
    assert!(matches!(output.status.code(), Some(0 | 1 | 3 | 6)), "{:?}: {}", output.status, text(&output));
}

//! Machines that start and stop without a rest, while their agent is killed again and again: none may run twice, none
//! may be lost, and in the end there must be as much in the kernel and on disk as there was in the beginning.

use crate::api::Api;
use crate::census::{Census, Place, running};
use crate::{PATIENCE, Random, Server, kill};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// From the start of a server to its end: now it is killed in the middle of its recovery, now long after it, and on
/// average every second.
const LIVES_MS: std::ops::Range<u64> = 100..1_900;
/// To so many starts of machines that stay there is one of a machine that is made for it, and destroyed.
const STARTS_TO_ONE_MADE: usize = 20;
/// Between two looks for machines that run twice.
const LOOK: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(5);
const REPORTED_EVERY: usize = 100;
const MACHINES: &str = "/v1/apps/endure/machines";

pub struct Endurance {
    /// Starts and stops, of all machines together.
    pub cycles: usize,
    /// At once.
    pub machines: usize,
}

/// What came of it.
#[derive(Debug)]
pub struct Endured {
    pub made_and_destroyed: usize,
    pub kills: usize,
    pub took: Duration,
    /// What there is while all machines are stopped, before as after.
    pub census: String,
}

/// An app of so many machines that sleep: their ids, and the command line that each runs.
pub fn sleepers(server: &Server, app: &str, machines: usize) -> (Vec<String>, String) {
    // Another one in each run, so that nobody else's processes are counted.
    let seconds = format!("1{:07}", std::process::id());
    let dockerfile = format!("FROM scratch\nCOPY busybox /bin/busybox\nCMD [\"/bin/busybox\", \"sleep\", \"{seconds}\"]\n");
    let source = server.source(app, &[("Dockerfile", &dockerfile), ("dunlin.toml", &format!("app = \"{app}\"\n"))]);
    fs::copy("/bin/busybox", source.join("busybox")).unwrap();
    server.ok(&["apps", "create", app]);
    server.ok_in(&source, &["deploy"]);
    server.ok(&["scale", "count", &machines.to_string(), "--app", app]);
    (server.machines(app), format!("/bin/busybox sleep {seconds}"))
}

/// The image of an app's machines, as the Machines API takes it.
pub fn image_of(machine: &Value) -> String {
    let part = |name: &str| machine["image_ref"][name].as_str().unwrap().to_owned();
    format!("{}/{}@{}", part("registry"), part("repository"), part("digest"))
}

/// Runs it to its end, or to the first promise that is broken.
pub fn endure(server: &Server, plan: &Endurance) -> Result<Endured, String> {
    for text in ["the server died; restarting it", "its supervisor was killed"] {
        server.expect_log(text);
    }
    let (ids, command) = sleepers(server, "endure", plan.machines);
    let image = image_of(&server.machine_list("endure")[0]);
    let course = Course { api: Api::of(&server.data()), command, image, commands: AtomicUsize::new(0) };
    let place = Place::of(server, &ids[0]);
    // What is made on first use is there before it is counted.
    ids.iter().try_for_each(|id| course.cycle(id))?;
    course.make_and_destroy("first")?;
    let before = place.count_settled(&course, &Census::default());

    let began = Instant::now();
    let tally = Tally { cycles: plan.cycles, ..Tally::default() };
    thread::scope(|scope| {
        scope.spawn(|| tally.kill(server));
        scope.spawn(|| tally.look_for_twins(&course));
        let workers: Vec<_> = ids.iter().map(|id| scope.spawn(|| tally.work(&course, id))).collect();
        for worker in workers {
            if worker.join().is_err() {
                tally.breaks("a worker panicked".into());
            }
        }
        tally.over.store(true, Ordering::Relaxed);
    });
    let took = began.elapsed();
    if let Some(broken) = tally.broken.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(broken);
    }

    server.wait_ready();
    ids.iter().try_for_each(|id| course.cycle(id))?;
    course.holds_all(&ids)?;
    let after = place.count_settled(&course, &before);
    let changes = before.changes_to(&after);
    if !changes.is_empty() {
        return Err(format!("it is not as it was before:\n  {}", changes.join("\n  ")));
    }
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    Ok(Endured { made_and_destroyed: count(&tally.made), kills: count(&tally.kills), took, census: before.summary() })
}

impl Place {
    /// Counts once nothing changes any more, or once it is as expected: clean-ups run beside what they are for.
    fn count_settled(&self, course: &Course, expected: &Census) -> Census {
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.count();
        loop {
            thread::sleep(Duration::from_millis(500));
            let now = self.count();
            let rests = now == last && running(&course.command).is_empty();
            if now == *expected || Instant::now() >= deadline || (rests && *expected == Census::default()) {
                return now;
            }
            last = now;
        }
    }
}

/// What one cycle needs to know.
struct Course {
    api: Api,
    command: String,
    image: String,
    commands: AtomicUsize,
}

impl Course {
    /// A start and a stop under a lease. What was acknowledged is so, whoever was killed.
    fn cycle(&self, id: &str) -> Result<(), String> {
        let lease = self.order(id, ("POST", "lease"), "", "{\"ttl\":600}")?;
        let nonce = lease["data"]["nonce"].as_str().unwrap_or("");
        self.order(id, ("POST", "start"), nonce, "{}")?;
        self.wait(id, "started")?;
        self.runs_once(id)?;
        self.order(id, ("POST", "stop"), nonce, "{\"timeout\":0}")?;
        self.wait(id, "stopped")?;
        self.order(id, ("DELETE", "lease"), nonce, "")?;
        self.runs_no_more(id, "stopped")
    }

    /// The id of the command is the same for every try, so that one machine is made.
    fn make_and_destroy(&self, name: &str) -> Result<(), String> {
        let body = json!({ "config": { "image": self.image } }).to_string();
        let made = self.asks("POST", MACHINES, &[("dunlin-command-id", name)], &body, &[200])?;
        let made: Value = serde_json::from_str(&made).map_err(|error| error.to_string())?;
        let id = made["id"].as_str().ok_or("a machine without an id was made")?.to_owned();
        self.wait(&id, "started")?;
        self.runs_once(&id)?;
        self.asks("DELETE", &format!("{MACHINES}/{id}?force=true"), &[], "", &[200, 404])?;
        self.asks("GET", &format!("{MACHINES}/{id}/wait?state=destroyed&timeout=60"), &[], "", &[200, 404])?;
        self.runs_no_more(&id, "destroyed")
    }

    fn holds_all(&self, ids: &[String]) -> Result<(), String> {
        let list = self.asks("GET", MACHINES, &[], "", &[200])?;
        let list: Vec<Value> = serde_json::from_str(&list).map_err(|error| error.to_string())?;
        let there: BTreeMap<&str, &str> =
            list.iter().map(|machine| (machine["id"].as_str().unwrap_or(""), machine["state"].as_str().unwrap_or(""))).collect();
        let expected: BTreeMap<&str, &str> = ids.iter().map(|id| (id.as_str(), "stopped")).collect();
        if there != expected {
            return Err(format!("there should be {expected:?}, there are {there:?}"));
        }
        // A lease that nobody can give back would be one that was lost.
        ids.iter().try_for_each(|id| self.asks("GET", &format!("{MACHINES}/{id}/lease"), &[], "", &[404]).map(drop))
    }

    /// A command with an id of its own: whatever is cut off, its repeat gets the first answer.
    fn order(&self, id: &str, (method, verb): (&str, &str), nonce: &str, body: &str) -> Result<Value, String> {
        let command = format!("{}-{}", std::process::id(), self.commands.fetch_add(1, Ordering::Relaxed));
        let headers = [("dunlin-command-id", command.as_str()), ("fly-machine-lease-nonce", nonce)];
        let said = self.asks(method, &format!("{MACHINES}/{id}/{verb}"), &headers, body, &[200, 201])?;
        serde_json::from_str(&said).map_err(|error| format!("{verb}: {error}"))
    }

    /// It may take longer than one wait.
    fn wait(&self, id: &str, state: &str) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let shown: Value = serde_json::from_str(&self.asks("GET", &format!("{MACHINES}/{id}"), &[], "", &[200])?).map_err(|error| error.to_string())?;
        let version = shown["instance_id"].as_str().unwrap_or_default();
        let path = format!("{MACHINES}/{id}/wait?state={state}&instance_id={version}&timeout=60");
        while self.asks("GET", &path, &[], "", &[200, 408, 504])?.contains("\"error\"") {
            if Instant::now() >= deadline {
                return Err(format!("machine {id} is not {state} within {PATIENCE:?}: {}", self.asks("GET", &format!("{MACHINES}/{id}"), &[], "", &[200])?));
            }
        }
        Ok(())
    }

    fn asks(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str, good: &[u16]) -> Result<String, String> {
        let (status, said) = self.api.through_kills(method, path, headers, body)?;
        if good.contains(&status) { Ok(said) } else { Err(format!("{method} {path}: {status} {said}")) }
    }

    fn of(&self, id: &str) -> Vec<u32> {
        running(&self.command).into_iter().filter(|(_, machine)| machine == id).map(|(pid, _)| pid).collect()
    }

    /// Its program is begun a moment after it was said to be.
    fn runs_once(&self, id: &str) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.of(id).as_slice() {
                [_] => return Ok(()),
                [] if Instant::now() < deadline => thread::sleep(PAUSE),
                [] => return Err(format!("machine {id} is said to run, and nothing does")),
                twins => return Err(format!("machine {id} runs twice: {twins:?}")),
            }
        }
    }

    /// At once: who says so has seen its end.
    fn runs_no_more(&self, id: &str, state: &str) -> Result<(), String> {
        match self.of(id).as_slice() {
            [] => Ok(()),
            left => Err(format!("machine {id} is said to be {state}, and {left:?} runs")),
        }
    }
}

/// What the workers, the one who kills and the one who looks share.
#[derive(Default)]
struct Tally {
    cycles: usize,
    begun: AtomicUsize,
    made: AtomicUsize,
    kills: AtomicUsize,
    over: AtomicBool,
    broken: Mutex<Option<String>>,
}

impl Tally {
    /// One machine's cycles, until there were as many as there should be.
    fn work(&self, course: &Course, id: &str) {
        loop {
            let number = self.begun.fetch_add(1, Ordering::Relaxed);
            if number >= self.cycles || self.over.load(Ordering::Relaxed) {
                return;
            }
            if number % REPORTED_EVERY == REPORTED_EVERY - 1 {
                println!("    cycle {}, {} kills", number + 1, self.kills.load(Ordering::Relaxed));
            }
            let mut done = course.cycle(id);
            if done.is_ok() && number % STARTS_TO_ONE_MADE == STARTS_TO_ONE_MADE - 1 {
                self.made.fetch_add(1, Ordering::Relaxed);
                done = course.make_and_destroy(&format!("cycle-{number}"));
            }
            if let Err(broken) = done {
                return self.breaks(format!("cycle {number}: {broken}"));
            }
        }
    }

    fn kill(&self, server: &Server) {
        let mut random = Random::seeded();
        println!("    seed {:#x}", random.0);
        while !self.over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(LIVES_MS.start + random.below(LIVES_MS.end - LIVES_MS.start)));
            let Some(pid) = server.server_pid() else { continue };
            kill(pid, "KILL");
            self.kills.fetch_add(1, Ordering::Relaxed);
            while server.server_pid().is_none_or(|now| now == pid) && !self.over.load(Ordering::Relaxed) {
                thread::sleep(PAUSE);
            }
        }
    }

    /// Two that are seen may be one that ended and the next: they are twins if both are still there.
    fn look_for_twins(&self, course: &Course) {
        while !self.over.load(Ordering::Relaxed) {
            thread::sleep(LOOK);
            let mut seen: BTreeMap<String, u32> = BTreeMap::new();
            for (pid, machine) in running(&course.command) {
                if let Some(other) = seen.insert(machine.clone(), pid) {
                    let still = running(&course.command);
                    if [pid, other].iter().all(|pid| still.iter().any(|(there, _)| there == pid)) {
                        self.breaks(format!("machine {machine} runs twice: processes {other} and {pid}"));
                    }
                }
            }
        }
    }

    /// The first one counts, and ends it.
    fn breaks(&self, why: String) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.over.store(true, Ordering::Relaxed);
    }
}

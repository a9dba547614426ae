//! Control groups against the running kernel, as root, each test beneath its own root.
#![allow(unsafe_code)] // `pre_exec` moves the child before it runs

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dunlin_runtime::cgroup::{CgroupError, Cgroups, CpuSet, Limits, MachineCgroup};

const DEADLINE: Duration = Duration::from_secs(10);

/// A root that is emptied and removed whatever happens to the test.
struct Root(Cgroups);

impl Root {
    fn new(name: &str) -> Self {
        Root(Cgroups::detect(&format!("dunlin-test-{name}-{}", std::process::id())).expect("detect"))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for name in self.0.list().expect("list") {
            let cgroup = self.0.open(&name).expect("open");
            cgroup.kill_until_empty(DEADLINE).expect("kill");
            cgroup.remove().expect("remove");
        }
        self.0.remove_root().expect("remove the root");
    }
}

/// Starts `sh -c script` within the cgroup, the way that exec does it: descriptors opened before, `0` written after.
fn start_in(cgroup: &MachineCgroup, script: &str) -> Child {
    let mut files: Vec<std::fs::File> =
        cgroup.open_procs().expect("open procs").into_iter().map(std::fs::File::from).collect();
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: only `write` on descriptors that exist already runs between fork and exec.
    unsafe {
        command.pre_exec(move || files.iter_mut().try_for_each(|file| file.write_all(b"0")));
    }
    command.spawn().expect("start")
}

fn wait_until(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < DEADLINE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn create_open_list_remove() {
    let root = Root::new("life");
    let limits = Limits { cpu_millis: 500, memory_bytes: 64 << 20, pids: 32, ..Limits::NONE };
    let cgroup = root.0.create("m1", &limits).expect("create");
    assert!(matches!(root.0.create("m1", &limits), Err(CgroupError::AlreadyExists(_))));
    assert!(matches!(root.0.open("m2"), Err(CgroupError::NotFound(_))));
    assert!(matches!(root.0.create("../m2", &limits), Err(CgroupError::BadName(_))));
    root.0.create_plain("s-m1").expect("create");
    assert_eq!(root.0.list().expect("list"), ["m1", "s-m1"]);
    // The supervisor gets the value by JSON and finds the same cgroup.
    let copy: Cgroups = serde_json::from_str(&serde_json::to_string(&root.0).expect("json")).expect("json");
    assert_eq!(copy.open("m1").expect("open").name(), "m1");
    // Detecting again leaves what is there alone.
    let again = Cgroups::detect(&format!("dunlin-test-life-{}", std::process::id())).expect("detect");
    assert_eq!(again, root.0);
    assert_eq!(again.list().expect("list"), ["m1", "s-m1"]);
    assert_eq!(cgroup.usage().expect("usage").pids, 0);
    cgroup.set_limits(&Limits { cpu_millis: 2000, memory_bytes: 256 << 20, pids: 64, ..Limits::NONE }).expect("grow");
    cgroup.set_limits(&Limits { cpu_millis: 5, memory_bytes: 16 << 20, pids: 8, ..Limits::NONE }).expect("shrink");
    cgroup.set_limits(&Limits::NONE).expect("lift");
    cgroup.remove().expect("remove");
    cgroup.remove().expect("remove again");
    assert_eq!(root.0.list().expect("list"), ["s-m1"]);
}

#[test]
fn a_process_joins_everywhere_and_its_use_is_counted() {
    let root = Root::new("use");
    let cgroup = root.0.create("m1", &Limits { cpu_millis: 250, memory_bytes: 64 << 20, pids: 16, ..Limits::NONE }).expect("create");
    let mut child = start_in(&cgroup, "while :; do :; done");
    let pid = i32::try_from(child.id()).expect("pid");
    let joined = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read");
    let places = joined.lines().filter(|line| line.ends_with("/m1")).count();
    assert_eq!(places, cgroup.open_procs().expect("open").len(), "{joined}");
    assert_eq!(cgroup.procs().expect("procs"), [pid]);
    wait_until("cpu time counts", || cgroup.usage().expect("usage").cpu_usec > 20_000);
    // A quarter of a processor is what it gets.
    let (start, used) = (Instant::now(), cgroup.usage().expect("usage").cpu_usec);
    wait_until("a second passes", || start.elapsed() > Duration::from_secs(1));
    let share = (cgroup.usage().expect("usage").cpu_usec - used) * 100 / u64::try_from(start.elapsed().as_micros()).expect("fits");
    assert!(share <= 40, "{share} % of a processor");
    assert_eq!(cgroup.usage().expect("usage").pids, 1);
    assert!(cgroup.usage().expect("usage").memory_bytes < 64 << 20);
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    child.wait().expect("wait");
}

#[test]
fn memory_beyond_the_limit_ends_the_process_and_is_counted() {
    let root = Root::new("oom");
    let cgroup = root.0.create("m1", &Limits { cpu_millis: 0, memory_bytes: 24 << 20, pids: 0, ..Limits::NONE }).expect("create");
    assert_eq!(cgroup.oom_kills().expect("count"), 0);
    let mut child = start_in(&cgroup, "exec python3 -c 'x = bytearray(200 << 20)'");
    let status = child.wait().expect("wait");
    assert!(!status.success());
    wait_until("the kill is counted", || cgroup.oom_kills().expect("count") >= 1);
}

#[test]
fn more_processes_than_allowed_are_refused() {
    let root = Root::new("pids");
    let cgroup = root.0.create("m1", &Limits { cpu_millis: 0, memory_bytes: 0, pids: 8, ..Limits::NONE }).expect("create");
    let mut child = start_in(&cgroup, "for i in $(seq 50); do sleep 300 & done; wait");
    wait_until("it stands at the limit or gave up", || {
        cgroup.usage().expect("usage").pids == 8 || child.try_wait().expect("wait").is_some()
    });
    assert!(cgroup.usage().expect("usage").pids <= 8);
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    child.wait().expect("wait");
}

/// Each of two may have more, and together they may not.
#[test]
fn all_machines_together_have_a_bound_of_processes() {
    let root = Root::new("allpids");
    assert!(root.0.bound_processes(12).expect("bound"));
    let limits = Limits { pids: 100, ..Limits::NONE };
    let machines = ["m1", "m2"].map(|name| root.0.create(name, &limits).expect("create"));
    let mut children = machines.each_ref().map(|cgroup| start_in(cgroup, "for i in $(seq 10); do sleep 300 & done; wait"));
    let taken = || machines.iter().map(|cgroup| cgroup.usage().expect("usage").pids).sum::<u64>();
    wait_until("they stand at the bound or gave up", || {
        taken() == 12 || children.iter_mut().any(|child| child.try_wait().expect("wait").is_some())
    });
    std::thread::sleep(Duration::from_millis(200));
    assert!(taken() <= 12, "{}", taken());
    for (cgroup, child) in machines.iter().zip(&mut children) {
        cgroup.kill_until_empty(DEADLINE).expect("kill");
        child.wait().expect("wait");
    }
}

#[test]
fn devices_are_closed_but_the_usual_ones() {
    let root = Root::new("dev");
    let cgroup = root.0.create("m1", &Limits::NONE).expect("create");
    let usual = start_in(&cgroup, "head -c1 /dev/zero >/dev/null && head -c1 /dev/urandom >/dev/null").wait().expect("wait");
    assert!(usual.success());
    if root.0.describe().contains("devices") {
        let raw = start_in(&cgroup, "exec 3</dev/loop-control").wait().expect("wait");
        assert!(!raw.success(), "a machine opened a device of the host");
        let free = root.0.create_plain("s1").expect("create");
        assert!(start_in(&free, "exec 3</dev/loop-control").wait().expect("wait").success());
    }
}

#[test]
fn freezing_stops_and_thawing_goes_on() {
    let root = Root::new("freeze");
    let cgroup = root.0.create("m1", &Limits::NONE).expect("create");
    let mut child = start_in(&cgroup, "while :; do :; done");
    let used = || cgroup.usage().expect("usage").cpu_usec;
    wait_until("it runs", || used() > 5_000);
    cgroup.freeze(DEADLINE).expect("freeze");
    assert!(cgroup.is_frozen().expect("state"));
    let frozen_at = used();
    let start = Instant::now();
    wait_until("time passes", || start.elapsed() > Duration::from_millis(100));
    assert!(used() - frozen_at < 2_000, "a frozen process used the processor");
    cgroup.thaw().expect("thaw");
    wait_until("it runs again", || used() > frozen_at + 10_000);
    // Killing reaches the frozen too.
    cgroup.freeze(DEADLINE).expect("freeze");
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    assert!(!cgroup.is_frozen().expect("state"));
    child.wait().expect("wait");
}

#[test]
fn a_fork_storm_is_killed_to_the_last_process() {
    let root = Root::new("storm");
    let cgroup = root.0.create("m1", &Limits { cpu_millis: 0, memory_bytes: 0, pids: 200, ..Limits::NONE }).expect("create");
    let storm = "f() { while :; do (setsid sh -c 'sleep 0.01' &) ; done; }; for i in 1 2 3 4 5 6; do f & done; wait";
    let mut child = start_in(&cgroup, storm);
    wait_until("it storms", || cgroup.procs().expect("procs").len() > 20);
    let start = Instant::now();
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    assert!(cgroup.is_empty().expect("empty"));
    assert!(start.elapsed() < DEADLINE);
    child.wait().expect("wait");
    cgroup.remove().expect("remove");
}

#[test]
fn a_session_takes_its_own_processes_and_leaves_the_rest() {
    let root = Root::new("session");
    let cgroup = root.0.create("m1", &Limits { cpu_millis: 0, memory_bytes: 64 << 20, pids: 64, ..Limits::NONE }).expect("create");
    let mut app = start_in(&cgroup, "exec sleep 300");
    let session = cgroup.session("x1").expect("session");
    assert!(matches!(cgroup.session("x1"), Err(CgroupError::AlreadyExists(_))));
    let mut shell = start_in(&session, "setsid sleep 300 & sleep 300");
    wait_until("both of the session run", || session.procs().expect("procs").len() >= 2);
    assert!(cgroup.usage().expect("usage").pids >= 3, "a session counts against its machine");
    let app_pid = i32::try_from(app.id()).expect("pid");
    session.kill_until_empty(DEADLINE).expect("kill");
    shell.wait().expect("wait");
    session.remove().expect("remove");
    assert_eq!(cgroup.procs().expect("procs"), [app_pid]);
    // The machine's end takes sessions along.
    let session = cgroup.session("x2").expect("session");
    let mut shell = start_in(&session, "exec sleep 300");
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    app.wait().expect("wait");
    shell.wait().expect("wait");
    cgroup.remove().expect("remove with sessions");
}

/// A supervisor was killed while it made or removed its directories: whatever part of them is there, it is ended and
/// removed, with the processes in it.
#[test]
fn a_part_of_the_directories_is_ended_like_the_whole() {
    let root = Root::new("part");
    let whole = serde_json::to_value(&root.0).expect("json");
    let all = whole["hierarchies"].as_array().expect("list").clone();
    let prefixes = (1..all.len()).map(|n| all[..n].to_vec());
    let singles = all.iter().map(|one| vec![one.clone()]);
    for hierarchies in prefixes.chain(singles) {
        let part = serde_json::json!({ "layout": whole["layout"], "hierarchies": hierarchies });
        let part: Cgroups = serde_json::from_value(part).expect("json");
        let place = part.describe();
        let made = part.create_plain("m1").unwrap_or_else(|e| panic!("{place}: {e}"));
        let mut child = start_in(&made, "sleep 300 & exec sleep 300");
        assert!(matches!(root.0.create_plain("m1"), Err(CgroupError::AlreadyExists(_))), "{place}");
        let found = root.0.open("m1").unwrap_or_else(|e| panic!("{place}: {e}"));
        found.kill_until_empty(DEADLINE).unwrap_or_else(|e| panic!("{place}: {e}"));
        child.wait().expect("wait");
        found.remove().unwrap_or_else(|e| panic!("{place}: {e}"));
        let anew = root.0.create_plain("m1").unwrap_or_else(|e| panic!("{place}: {e}"));
        anew.remove().expect("remove");
    }
}

/// The v2 tree alone, as on a pure v2 host, without its controllers (which the v1 hierarchies of this host may hold).
#[test]
fn the_v2_tree_alone_freezes_kills_and_removes() {
    let root = Root::new("v2");
    let whole = serde_json::to_value(&root.0).expect("json");
    let unified: Vec<_> = whole["hierarchies"].as_array().expect("list").iter().filter(|h| h["unified"] == true).cloned().collect();
    assert_eq!(unified.len(), 1, "these tests need a v2 tree: {}", root.0.describe());
    let alone: Cgroups =
        serde_json::from_value(serde_json::json!({ "layout": "v2", "hierarchies": unified })).expect("json");
    let cgroup = alone.create_plain("m1").expect("create");
    let mut app = start_in(&cgroup, "while :; do (setsid sleep 0.01 &); done");
    wait_until("it storms", || cgroup.procs().expect("procs").len() > 3);
    let session = cgroup.session("x1").expect("session");
    let mut shell = start_in(&session, "exec sleep 300");
    cgroup.freeze(DEADLINE).expect("freeze");
    // One that waits for its vfork counts as frozen, and goes on for a moment when its child is executed.
    wait_until("frozen", || cgroup.is_frozen().expect("state"));
    cgroup.thaw().expect("thaw");
    wait_until("thawed", || !cgroup.is_frozen().expect("state"));
    session.kill_until_empty(DEADLINE).expect("kill");
    shell.wait().expect("wait");
    assert!(!cgroup.is_empty().expect("empty"));
    cgroup.freeze(DEADLINE).expect("freeze");
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    app.wait().expect("wait");
    cgroup.remove().expect("remove");
}

#[test]
fn processes_run_where_they_are_told_to() {
    let root = Root::new("cpus");
    let Some(all) = root.0.cpus().expect("ask") else {
        eprintln!("not tested: no cpuset controller here");
        return;
    };
    let cgroup = root.0.create("m1", &Limits::NONE).expect("create");
    assert_eq!(cgroup.cpus().expect("ask"), Some(all.clone()));
    let mut child = start_in(&cgroup, "exec sleep 1000");
    let allowed = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("read");
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")?.trim().parse::<CpuSet>().ok())
    };
    let last = CpuSet(all.0.last().copied().into_iter().collect());
    cgroup.set_cpus(&last).expect("set");
    assert_eq!((allowed(), cgroup.cpus().expect("ask")), (Some(last.clone()), Some(last)));
    cgroup.set_cpus(&all).expect("set");
    assert_eq!(allowed(), Some(all));
    cgroup.kill_until_empty(DEADLINE).expect("kill");
    child.wait().expect("wait");
}

#[test]
fn the_server_outweighs_its_machines() {
    let root = Root::new("weight");
    let before = std::fs::read_to_string("/proc/self/cgroup").expect("read");
    // In a child: this process goes on where it is.
    let mut command = Command::new("true");
    let cgroups = root.0.clone();
    // SAFETY: between fork and exec the C library's allocator works in the child.
    unsafe {
        command.pre_exec(move || cgroups.favour_server().map_err(std::io::Error::other));
    }
    assert!(command.status().expect("run").success());
    assert_eq!(std::fs::read_to_string("/proc/self/cgroup").expect("read"), before);
    let name = format!("dunlin-test-weight-{}", std::process::id());
    let shares = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/cpu/{name}/cpu.shares")).ok();
    if let (Some(server), Some(machines)) = (shares(&format!("{name}-server")), shares(&name)) {
        let weight = |text: String| text.trim().parse::<u64>().expect("a number");
        assert!(weight(server) >= 8 * weight(machines));
    }
}

//! How machines start, print, end, and outlive who made them.

use crate::setup::*;
use dunlin_runtime::logs::{LogPosition, read_logs};
use dunlin_runtime::*;
use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

#[test]
fn a_machine_runs_prints_and_says_how_it_ended() {
    let world = World::new();
    let machine = world.run(world.spec("aa01", "echo out; echo err >&2; exit 7"));
    let exit = machine.exit();
    assert_eq!((exit.exit_code, exit.signal, exit.requested_stop), (Some(7), None, false));
    let mut log = machine.log();
    log.sort();
    assert_eq!(log, ["err", "out"]);
}

#[test]
fn a_signal_is_told_from_an_exit_code() {
    let world = World::new();
    let machine = world.run(world.spec("aa02", "kill -9 $$"));
    assert_eq!(machine.exit().signal, Some(9));
}

#[test]
fn stop_signals_first_and_kills_after_its_timeout() {
    let world = World::new();
    let polite = world.run(world.spec("aa03", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"));
    until("up", || polite.log().contains(&"up".to_owned()).then_some(()));
    polite.client().stop(15, PATIENCE).unwrap();
    let exit = polite.exit();
    assert_eq!((exit.exit_code, exit.requested_stop), (Some(3), true));
    assert!(polite.log().contains(&"bye".to_owned()));
    let deaf = world.run(world.spec("aa04", "trap '' TERM; echo up; while :; do sleep 0.05; done"));
    until("up", || deaf.log().contains(&"up".to_owned()).then_some(()));
    deaf.client().stop(15, Duration::from_millis(200)).unwrap();
    let exit = deaf.exit();
    assert_eq!((exit.signal, exit.requested_stop, exit.oom_killed), (Some(9), true, false));
}

#[test]
fn a_created_machine_starts_when_it_is_told() {
    let world = World::new();
    let spec = SupervisorSpec { start: false, ..world.spec("aa05", "echo now") };
    let machine = world.run(spec);
    assert_eq!(machine.client().status().unwrap().phase, Phase::Created);
    assert!(machine.log().is_empty());
    machine.client().start().unwrap();
    assert_eq!(machine.exit().exit_code, Some(0));
    assert_eq!(machine.log(), ["now"]);
}

#[test]
fn one_that_was_never_started_leaves_no_record() {
    let world = World::new();
    let machine = world.run(SupervisorSpec { start: false, ..world.spec("afa1", "echo now") });
    let dir = machine.spec.machine_dir.clone();
    let init = machine.client().status().unwrap().init_pid;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), nix::sys::signal::Signal::SIGKILL).unwrap();
    until("it has ended", || dunlin_runtime::lock_holder(&dir).unwrap().is_none().then_some(()));
    assert_eq!(std::fs::read_dir(dir.join("exit")).unwrap().count(), 0);
    assert!(machine.log().is_empty());
}

#[test]
fn what_cannot_run_says_why() {
    let world = World::new();
    let mut spec = world.spec("aa06", "");
    spec.process.command = vec!["no-such-program".into()];
    let machine = world.run(spec);
    let error = machine.exit().error.unwrap();
    assert!(error.contains("no-such-program") && error.contains("not found in $PATH"), "{error}");
    let mut spec = world.spec("aa07", "true");
    spec.process.user = "ghost".into();
    let error = spawn(&world.exe, &spec).unwrap_err().to_string();
    assert!(error.contains("ghost") && error.contains("/etc/passwd"), "{error}");
    let failed = Running { world: &world, spec };
    assert!(failed.exit().error.is_some());
}

#[test]
fn each_attempt_begins_with_the_image() {
    let world = World::new();
    let layer = world.dir.path().join("layer");
    fs::create_dir(layer.join("app")).unwrap();
    fs::write(layer.join("app/version"), "old").unwrap();
    let script = "echo mine > /app/version; busybox rm -r /home; busybox mkdir /home; busybox mkdir -p /tmp/a/b";
    let first = world.run(world.spec("aa23", script));
    assert_eq!(first.exit().exit_code, Some(0));
    // A newer release, and nobody cleaned up after the old one: the agent was killed, say.
    fs::write(layer.join("app/version"), "new").unwrap();
    let mut spec = world.spec("aa23", "cat /app/version; echo; ls /tmp /home; busybox rm /etc/passwd; busybox mkfifo /etc/passwd");
    spec.attempt = 2;
    let second = world.run(spec);
    assert_eq!(second.exit().exit_code, Some(0));
    assert_eq!(second.log(), ["new", "/home:", "app", "", "/tmp:"]);
    cleanup(second.dir(), "aa23", &world.cgroups, None).unwrap();
    assert!(!second.dir().join("upper").exists(), "a machine that rests holds no files");
    let mut spec = world.spec("aa23", "true");
    spec.attempt = 3;
    assert_eq!(world.run(spec).exit().exit_code, Some(0), "the pipe of before is no more");
}

#[test]
fn memory_and_processes_are_limited() {
    let world = World::new();
    let machine = world.run(world.spec("aa12", "exec dd if=/dev/zero of=/dev/null bs=200M count=1"));
    let exit = machine.exit();
    assert!(exit.oom_killed, "{exit:?}");
    // The kernel took one process, the program lives on.
    let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; echo lives; sleep 1000";
    let lives = world.run(world.spec("aa31", script));
    let said = until("the log tells of it", || {
        let (records, _) = read_logs(lives.dir(), LogPosition::default(), 100).unwrap();
        records.into_iter().find(|record| record.stream == "system")
    });
    assert!(said.line.contains("64 MiB"), "{said:?}");
    assert_eq!(lives.client().status().unwrap().phase, Phase::Started);
    let forks = world.run(world.spec("aa13", "sleep 1000"));
    let (output, _) = forks.exec("i=0; while [ $i -lt 200 ]; do sleep 5 & i=$((i+1)); done; echo end");
    assert!(!output.is_empty(), "{output}");
    let count = world.cgroups.open(&SupervisorSpec::machine_cgroup("aa13")).unwrap().usage().unwrap().pids;
    assert!(count <= 64, "{count} processes");
}

#[test]
fn a_killed_supervisor_takes_its_machine_with_it_and_nothing_is_left() {
    let world = World::new();
    let machine = world.run(world.spec("aa14", "busybox setsid sleep 1000 & sleep 1000"));
    let init = machine.client().status().unwrap().init_pid;
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    until("the lock is free", || lock_holder(machine.dir()).unwrap().is_none().then_some(()));
    assert!(matches!(Client::connect(machine.dir()), Err(RuntimeError::NotRunning)));
    cleanup(machine.dir(), "aa14", &world.cgroups, None).unwrap();
    // A process that ends leaves its control group before it is a zombie; it runs nothing any more.
    until("gone, or waiting for the host's pid 1", || {
        let state = fs::read_to_string(format!("/proc/{init}/stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    });
    assert!(read_exit(machine.dir(), 1).unwrap().is_none(), "no exit was recorded: the agent sees a crash");
}

/// Wherever it is killed: nothing of the machine stays, and the next attempt runs.
#[test]
fn a_supervisor_may_be_killed_at_every_boundary() {
    let world = World::new();
    for point in KILL_POINTS {
        let spec = SupervisorSpec { kill_at: Some((*point).to_owned()), ..world.spec("aa20", "true") };
        let spawned = spawn(&world.exe, &spec);
        let dir = &spec.machine_dir;
        until("the lock is free", || lock_holder(dir).unwrap().is_none().then_some(()));
        let is_told = matches!(*point, "supervisor.after-announce" | "supervisor.before-record" | "supervisor.after-record");
        assert_eq!(spawned.is_ok(), is_told, "{point}: {spawned:?}");
        assert_eq!(read_exit(dir, 1).unwrap().is_some(), *point == "supervisor.after-record", "{point}");
        cleanup(dir, "aa20", &world.cgroups, None).unwrap();
        assert!(world.cgroups.list().unwrap().iter().all(|name| !name.contains("aa20")), "{point}");
        let next = world.run(SupervisorSpec { attempt: 2, ..world.spec("aa20", "exit 7") });
        assert_eq!(next.exit().exit_code, Some(7), "{point}");
        drop(next);
        fs::remove_dir_all(dir.join("exit")).unwrap();
    }
}

/// A mount of the host from before the start is not kept busy by the machine's namespaces.
#[test]
fn the_hosts_mounts_are_the_hosts_to_unmount() {
    let world = World::new();
    let at = world.dir.path().join("other");
    fs::create_dir(&at).unwrap();
    let volume = volume::LoopVolume::create(&world.dir.path().join("other.ext4"), 32 << 20).unwrap();
    let mounted = volume.mount(&at).unwrap();
    let machine = world.run(world.spec("mounts", "sleep 60"));
    mounted.unmount().unwrap();
    let again = until("the volume is free", || volume.mount(&at).ok());
    again.unmount().unwrap();
    machine.client().kill().unwrap();
}

#[test]
fn a_full_disk_does_not_lose_how_a_machine_ended() {
    let world = World::new();
    let machines = world.dir.path().join("machines");
    fs::create_dir(&machines).unwrap();
    let small = volume::LoopVolume::create(&world.dir.path().join("small.ext4"), 32 << 20).unwrap();
    let mounted = small.mount(&machines).unwrap();
    let machine = world.run(world.spec("aa30", "while ! [ -e /go ]; do sleep 0.01; done; exit 7"));
    machine.client().status().unwrap();
    let free = || nix::sys::statvfs::statvfs(&machines).unwrap().blocks_available();
    let mut fillers = 0;
    until("the disk is full", || {
        let mut filler = fs::File::create(machines.join(format!("filler-{fillers}"))).unwrap();
        fillers += 1;
        for piece in [1 << 20, 4096, 1] {
            while filler.write_all(&vec![1; piece]).is_ok() {}
        }
        let _ = filler.sync_all(); // some of it may have found no room
        (free() < 32).then_some(())
    });
    machine.exec("true > /go");
    assert_eq!(machine.exit().exit_code, Some(7));
    assert!(free() < 128, "the disk was not full: {} blocks", free());
    drop(machine);
    until("nothing holds it", || volume::unmount(&machines).ok());
    drop(mounted);
}

#[test]
fn one_machine_has_one_supervisor() {
    let world = World::new();
    let machine = world.run(world.spec("aa15", "sleep 1000"));
    let again = spawn(&world.exe, &machine.spec).unwrap_err().to_string();
    assert!(again.contains("another supervisor"), "{again}");
    assert!(machine.client().status().is_ok());
}

#[test]
fn a_program_that_closes_its_output_costs_its_supervisor_nothing() {
    let world = World::new();
    let machine = world.run(world.spec("aa20", "echo last; exec sleep 1000 >&- 2>&-"));
    until("printed", || (!machine.log().is_empty()).then_some(()));
    until("closed", || (machine.exec("busybox ls /proc/2/fd").0 == "0").then_some(()));
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    // Its voluntary rounds: a supervisor that spins makes thousands of system calls in the time of these.
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{supervisor}/schedstat")).unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let (before, at) = (ticks(), Instant::now());
    until("a while", || (at.elapsed() > Duration::from_millis(300)).then_some(()));
    let busy_ms = (ticks() - before) / 1_000_000;
    assert!(busy_ms < 100, "{busy_ms} ms of 300 busy");
}

#[test]
fn a_program_that_prints_without_end_costs_a_part_of_a_processor_and_hears_its_stop() {
    let world = World::new();
    let machine = world.run(world.spec("aa32", "exec busybox yes ''"));
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    let used = || fs::read_to_string(format!("/proc/{supervisor}/schedstat")).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    let (before, at) = (used(), Instant::now());
    until("two seconds", || (at.elapsed() > Duration::from_secs(2)).then_some(()));
    let share = (used() - before) * 100 / at.elapsed().as_nanos() as u64;
    assert!(share < 40, "{share} % of a processor");
    assert_eq!(machine.client().status().unwrap().phase, Phase::Started);
    machine.client().stop(9, PATIENCE).unwrap();
    assert_eq!(machine.exit().signal, Some(9));
}

#[test]
fn a_machine_outlives_the_process_that_started_it() {
    let world = World::new();
    let spec = world.spec("aa22", "sleep 1000");
    // Another process in the part of the agent: it starts the machine and is killed.
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_runtime-probe"))
        .arg("spawn")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    agent.stdin.take().unwrap().write_all(&serde_json::to_vec(&spec).unwrap()).unwrap();
    let mut said = [0; 3];
    agent.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"up\n");
    agent.kill().unwrap();
    agent.wait().unwrap();
    let machine = Running { world: &world, spec };
    assert_eq!(machine.client().status().unwrap().phase, Phase::Started);
    assert_eq!(machine.exec("echo alive").0, "alive");
    machine.client().kill().unwrap();
    assert!(machine.exit().requested_stop);
    assert_eq!(list_exits(machine.dir()).unwrap().len(), 1);
    // An earlier attempt's was journalled, and the agent killed before it said so.
    std::fs::copy(machine.dir().join("exit/1"), machine.dir().join("exit/0")).unwrap();
    remove_exits(machine.dir(), 1).unwrap();
    assert!(list_exits(machine.dir()).unwrap().is_empty());
}

#[test]
fn a_server_with_a_strict_umask_has_machines_like_any_other() {
    let world = World::new();
    let mut spec = world.spec("aa33", "cat /etc/resolv.conf; echo x > /tmp/mine; busybox stat -c %a /tmp/mine /proc/sys; umask");
    spec.process.user = "app".into();
    fs::set_permissions(world.dir.path().join("layer/tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let mut shell = std::process::Command::new("sh");
    let script = "umask 077; exec \"$0\" \"$@\"";
    supervise(shell.args(["-c", script, env!("CARGO_BIN_EXE_runtime-probe"), PERSONALITY, &spec.machine_id]), &spec);
    let machine = Running { world: &world, spec };
    machine.exit();
    assert_eq!(machine.log(), ["nameserver 192.0.2.53", "644", "555", "0022"]);
}

/// The agent is killed between starting a supervisor and hearing of it: what it started goes on, and what it
/// could not start is recorded.
#[test]
fn a_supervisor_whose_agent_is_gone_goes_on() {
    let world = World::new();
    let alone = |spec: &SupervisorSpec| {
        let mut supervisor = std::process::Command::new(env!("CARGO_BIN_EXE_runtime-probe"));
        supervise(supervisor.args([PERSONALITY, &spec.machine_id]), spec);
    };
    let spec = world.spec("aa26", "echo once; sleep 1000");
    alone(&spec);
    let machine = Running { world: &world, spec };
    until("it listens", || Client::connect(machine.dir()).ok());
    until("printed", || (!machine.log().is_empty()).then_some(()));
    assert_eq!(machine.client().status().unwrap().phase, Phase::Started);
    machine.client().stop(9, PATIENCE).unwrap();
    assert_eq!(machine.exit().signal, Some(9));
    let mut spec = world.spec("aa27", "true");
    spec.process.command = vec!["no-such-program".into()];
    alone(&spec);
    let machine = Running { world: &world, spec };
    assert!(machine.exit().error.unwrap().contains("no-such-program"));
}

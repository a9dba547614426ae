//! Commands beside the program.

use crate::setup::*;
use dunlin_runtime::*;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn an_exec_is_inside_everything_that_the_machine_is_in() {
    let world = World::new();
    let machine = world.run(world.spec("aa08", "sleep 1000"));
    let check = |script: &str, expected: &str| assert_eq!(machine.exec(script).0, expected, "{script}");
    for ns in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let (of_init, _) = machine.exec(&format!("readlink /proc/self/ns/{ns} || busybox readlink /proc/self/ns/{ns}"));
        let pid = machine.client().status().unwrap().init_pid;
        let real = fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert!(of_init.ends_with(real.to_str().unwrap()), "{ns}: {of_init} is not {}", real.display());
    }
    check("echo $CANARY", "very-secret");
    check("id -u", "0");
    check("cat /proc/sys/kernel/hostname", "aa08");
    check("busybox grep -c . /proc/self/cgroup > /dev/null; busybox grep Seccomp: /proc/self/status", "Seccomp:\t2");
    check("busybox grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1");
    check("busybox grep CapEff /proc/self/status", "CapEff:\t00000000000004fb");
    check("busybox grep CapBnd /proc/self/status", "CapBnd:\t00000000000004fb");
    assert_eq!(machine.exec("exit 42").1, 42);
    assert_eq!(machine.exec("kill -15 $$").1, 128 + 15);
    // What a session started ends with it, in the background too.
    machine.exec("busybox setsid sleep 777 & sleep 0.1");
    until("the session's rest is gone", || {
        let left = machine.exec("busybox ps").0;
        (!left.contains("sleep 777")).then_some(())
    });
}

#[test]
fn a_terminal_is_the_machines_own() {
    let world = World::new();
    let machine = world.run(world.spec("aa17", "sleep 1000"));
    let exec = ExecSpec { command: vec!["sh".into()], ..Default::default() };
    let (session, master) = machine.client().exec_tty(exec, WindowSize { rows: 33, columns: 77 }).unwrap();
    let mut typed = fs::File::from(master.try_clone().unwrap());
    let mut output = String::new();
    let mut read_until = |wanted: &str| {
        let deadline = Instant::now() + PATIENCE;
        while !output.contains(wanted) {
            assert!(Instant::now() < deadline, "no {wanted:?} in {output:?}");
            let mut ready = [nix::poll::PollFd::new(typed.as_fd(), nix::poll::PollFlags::POLLIN)];
            if nix::poll::poll(&mut ready, 100u8).unwrap() > 0 {
                let mut bytes = [0; 4096];
                let read = (&typed).read(&mut bytes).unwrap_or(0); // EIO at the end
                output.push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        }
    };
    read_until("# ");
    (&typed).write_all(b"busybox tty; busybox stty size; echo term=$TERM\n").unwrap();
    read_until("/dev/pts/0");
    read_until("33 77");
    read_until("term=xterm");
    resize(&master, WindowSize { rows: 40, columns: 100 }).unwrap();
    (&typed).write_all(b"busybox stty size\n").unwrap();
    read_until("40 100");
    // Job control works: the terminal interrupts the command, not the shell.
    (&typed).write_all(b"sleep 500; echo code=$?\n").unwrap();
    until("it sleeps", || machine.exec("busybox ps").0.contains("sleep 500").then_some(()));
    (&typed).write_all(b"\x03").unwrap();
    (&typed).write_all(b"echo still; exit 9\n").unwrap();
    read_until("still");
    assert_eq!(session.wait(PATIENCE).unwrap(), Some(9));
    typed.flush().unwrap();
}

#[test]
fn a_dropped_session_ends_its_command() {
    let world = World::new();
    let machine = world.run(world.spec("aa18", "sleep 1000"));
    let exec = ExecSpec { command: vec!["sleep".into(), "555".into()], ..Default::default() };
    let session = machine.client().exec_tty(exec, WindowSize { rows: 24, columns: 80 }).unwrap();
    until("it runs", || machine.exec("busybox ps").0.contains("sleep 555").then_some(()));
    drop(session);
    until("it is gone", || (!machine.exec("busybox ps").0.contains("sleep 555")).then_some(()));
    let exec = ExecSpec { command: vec!["no-such-program".into()], ..Default::default() };
    let error = machine.client().exec_tty(exec, WindowSize { rows: 24, columns: 80 }).map(drop).unwrap_err().to_string();
    assert!(error.contains("not found in $PATH"), "{error}");
}

#[test]
fn a_stop_is_heard_beside_as_many_commands_as_there_may_be() {
    let world = World::new();
    let mut spec = world.spec("aa28", "sleep 1000");
    spec.limits.pids = 256;
    let machine = world.run(spec);
    let sleep = || {
        let exec = ExecSpec { command: vec!["sleep".into(), "500".into()], ..Default::default() };
        machine.client().exec_tty(exec, WindowSize { rows: 24, columns: 80 })
    };
    let mut sessions: Vec<_> = (0..32).map(|_| sleep().unwrap()).collect();
    let error = sleep().map(drop).unwrap_err().to_string();
    assert!(error.contains("32 commands"), "{error}");
    sessions.pop();
    let again = until("one has ended", || sleep().ok());
    let silent: Vec<Client> = (0..31).map(|_| machine.client()).collect();
    machine.client().stop(15, Duration::from_millis(1)).unwrap();
    machine.exit();
    drop((sessions, again, silent));
}

/// A machine without processor time to spare keeps its supervisor waiting for every command.
#[test]
fn commands_that_start_slowly_hold_up_nothing_else() {
    let world = World::new();
    let mut spec = world.spec("aa29", "i=0; while [ $i -lt 8 ]; do while :; do :; done & i=$((i+1)); done; echo up; wait");
    spec.limits.cpu_millis = 10;
    let machine = world.run(spec);
    thread::scope(|scope| {
        let (sender, ended) = std::sync::mpsc::channel();
        for _ in 0..4 {
            let (sender, client) = (sender.clone(), machine.client());
            scope.spawn(move || {
                let exec = ExecSpec { command: vec!["true".into()], ..Default::default() };
                let _ = client.exec_tty(exec, WindowSize { rows: 24, columns: 80 }); // started or not in time
                let _ = sender.send(()); // only the first is waited for
            });
        }
        let (mut asked, mut begun) = (0, 0);
        while begun == 0 || asked < 3 {
            begun += ended.try_iter().count();
            machine.client().status().expect("an answer within the agent's patience");
            asked += 1;
        }
    });
}

#[test]
fn a_suspended_machine_refuses_exec_and_hears_a_stop() {
    let world = World::new();
    let machine = world.run(world.spec("aa19", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done"));
    until("up", || (!machine.log().is_empty()).then_some(()));
    let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("aa19")).unwrap();
    cgroup.freeze(PATIENCE).unwrap();
    let exec = ExecSpec { command: vec!["true".into()], ..Default::default() };
    let error = machine.client().exec_tty(exec, WindowSize { rows: 24, columns: 80 }).map(drop).unwrap_err().to_string();
    assert!(error.contains("suspended"), "{error}");
    machine.client().stop(15, PATIENCE).unwrap();
    assert_eq!(machine.exit().exit_code, Some(5));
}

#[test]
fn a_signal_reaches_the_command_and_not_the_program() {
    let world = World::new();
    let machine = world.run(world.spec("aa30", "sleep 1000"));
    let (mut reader, writer) = std::io::pipe().unwrap();
    let null = || -> std::os::fd::OwnedFd { fs::File::open("/dev/null").unwrap().into() };
    let command = ["sh", "-c", "trap 'echo heard; exit 6' USR1; echo ready; while :; do sleep 0.05; done"];
    let exec = ExecSpec { command: command.map(str::to_owned).to_vec(), ..Default::default() };
    let session = machine.client().exec(exec, [null(), writer.into(), null()]).unwrap();
    let mut ready = [0; 6];
    reader.read_exact(&mut ready).unwrap();
    session.signal(libc::SIGUSR1).unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), session.wait(PATIENCE).unwrap()), ("heard\n", Some(6)));
    machine.client().status().unwrap();
}

//! Several programs in one machine: processes in one root file system, and containers beside one another.

use crate::setup::*;
use dunlin_model::{
    Condition, ContainerState, Dependency, Healthcheck, Probe, ProbeTls, RestartPolicy, RestartWhen,
};
use dunlin_runtime::logs::{LogPosition, LogRecord, read_logs};
use dunlin_runtime::*;
use std::fs;
use std::time::Duration;

const NO: RestartPolicy = RestartPolicy { policy: RestartWhen::No, max_retries: 0 };

fn shell(script: &str) -> ProcessSpec {
    ProcessSpec {
        command: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![],
        user: String::new(),
        working_dir: "/".into(),
    }
}

fn rules(name: &str, after: &[(&str, Condition)]) -> ContainerRules {
    let depends_on = after.iter().map(|(name, condition)| Dependency { name: (*name).into(), condition: *condition });
    ContainerRules { name: name.into(), depends_on: depends_on.collect(), ..ContainerRules::default() }
}

fn container(world: &World, rules: ContainerRules, script: &str) -> ContainerSpec {
    ContainerSpec {
        rules,
        rootfs: world.rootfs(world.dir.path().join("layer")),
        process: shell(script),
        volumes: vec![],
        temp_dirs: vec![],
        files: vec![],
    }
}

fn records(machine: &Running<'_>) -> Vec<LogRecord> {
    read_logs(machine.dir(), LogPosition::default(), 10_000).unwrap().0
}

/// `program: line`, without what the platform says.
fn said(machine: &Running<'_>) -> Vec<String> {
    let records = records(machine).into_iter().filter(|record| record.stream != "system");
    records.map(|record| format!("{}: {}", record.program, record.line)).collect()
}

fn until_said(machine: &Running<'_>, line: &str) {
    until(line, || said(machine).contains(&line.to_owned()).then_some(()));
}

fn state(machine: &Running<'_>, name: &str) -> ContainerState {
    let status = machine.client().status().unwrap();
    status.containers.into_iter().find(|container| container.name == name).unwrap().state
}

fn exec_in(machine: &Running<'_>, container: &str, script: &str) -> (String, i32) {
    machine.exec_as(ExecSpec {
        command: vec!["sh".into(), "-c".into(), script.into()],
        container: container.into(),
        ..ExecSpec::default()
    })
}

#[test]
fn processes_share_a_root_and_the_end_of_one_is_the_end_of_all() {
    let world = World::new();
    let mut spec = world.spec("ab01", "echo shared >/tmp/from-first; trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done");
    let second = ProcessSpec {
        env: vec![("MINE".into(), "second".into())],
        user: "app".into(),
        ..shell("while ! cat /tmp/from-first; do sleep 0.05; done 2>/dev/null; echo $MINE ${CANARY-none} $(id -u); exit 7")
    };
    spec.beside = vec![second];
    let machine = world.run(spec);
    let exit = machine.exit();
    assert_eq!((exit.exit_code, exit.requested_stop), (Some(7), false));
    let mut lines = said(&machine);
    lines.sort();
    assert_eq!(lines, ["processes[0]: bye", "processes[1]: second none 1000", "processes[1]: shared"]);
}

#[test]
fn a_process_that_does_not_end_with_the_others_is_killed() {
    let world = World::new();
    let mut spec = world.spec("ab02", "trap '' TERM INT; echo up; while :; do sleep 0.05; done");
    spec.beside = vec![shell("sleep 0.2; exit 3")];
    spec.stop_timeout_ms = 300;
    let machine = world.run(spec);
    assert_eq!(machine.exit().exit_code, Some(3));
    let mut spec = world.spec("ab03", "true");
    spec.beside = vec![ProcessSpec { command: vec!["no-such-program".into()], ..shell("") }];
    let error = world.run(spec).exit().error.unwrap();
    assert!(error.contains("no-such-program"), "{error}");
}

#[test]
fn containers_share_what_is_the_machines_and_nothing_else() {
    let world = World::new();
    let other = world.dir.path().join("other-layer");
    fs::create_dir_all(other.join("bin")).unwrap();
    fs::copy("/bin/busybox", other.join("bin/busybox")).unwrap();
    for name in ["sh", "sleep", "cat", "echo", "ls", "readlink", "mount", "id"] {
        std::os::unix::fs::symlink("busybox", other.join("bin").join(name)).unwrap();
    }
    fs::write(other.join("only-here"), "").unwrap();
    let mut spec = world.spec("ab04", "echo first >/tmp/mine; sleep 1000");
    spec.own = rules("web", &[]);
    let mut beside = container(&world, rules("side", &[]), "sleep 1000");
    beside.rootfs = world.rootfs(other);
    beside.process.env = vec![("SIDE".into(), "yes".into())];
    beside.files = vec![GuestFile::in_memory("/secret".into(), b"of side".to_vec())];
    spec.containers = vec![beside];
    let machine = world.run(spec);
    let both = |script: &str| (exec_in(&machine, "web", script).0, exec_in(&machine, "side", script).0);
    for shared in ["user", "net", "ipc", "uts"] {
        let (web, side) = both(&format!("busybox readlink /proc/self/ns/{shared}"));
        assert_eq!(web, side, "{shared}");
    }
    for own in ["pid", "mnt"] {
        let (web, side) = both(&format!("busybox readlink /proc/self/ns/{own}"));
        assert_ne!(web, side, "{own}");
    }
    // Confined alike.
    for same in [
        "busybox grep -E '^(Cap|NoNewPrivs|Seccomp|Uid|Gid)' /proc/1/status",
        "busybox grep -E '^(Cap|NoNewPrivs|Seccomp|Uid|Gid)' /proc/self/status",
        "cat /proc/self/uid_map /proc/self/gid_map",
        "busybox grep -vE '^(/|overlay|none)' /proc/mounts | busybox sed -E 's/(lowerdir|size|inode64|uid|gid)=[^ ,]*//g' | busybox awk '{print $2,$3,$4}' | busybox grep -v secret | busybox sort",
        "mount -t tmpfs x /tmp 2>&1; cat /proc/kcore | busybox wc -c; echo 1 2>&1 >/proc/sys/kernel/hostname; busybox ls /dev",
        "busybox ulimit -a; cat /proc/self/cgroup | busybox sed 's/x[0-9]*//'",
    ] {
        let (web, side) = both(same);
        assert_eq!(web, side, "{same}");
        assert!(!web.is_empty(), "{same}");
    }
    let (web, side) = both("busybox grep Seccomp: /proc/1/status; busybox grep NoNew /proc/1/status");
    assert!(web.contains("Seccomp:\t2") && web.contains("NoNewPrivs:\t1"), "{web} {side}");
    // Neither sees the other's processes, files and secrets.
    assert_eq!(exec_in(&machine, "side", "ls /tmp/mine 2>/dev/null; ls /only-here; cat /secret; echo $SIDE ${CANARY-none}").0, "/only-here\nof sideyes none");
    assert_eq!(exec_in(&machine, "web", "ls /only-here /secret 2>/dev/null; echo ${SIDE-none}").0, "none");
    let (_, pids) = both("ls /proc | busybox grep -cE '^[0-9]+$'");
    assert!(pids.parse::<u32>().unwrap() <= 6, "{pids}");
    assert_eq!(exec_in(&machine, "", "cat /tmp/mine").0, "first", "the first is the default");
    let error = machine.client().exec(ExecSpec { container: "x".into(), ..ExecSpec::default() }, null_streams()).err().unwrap();
    assert!(error.to_string().contains("the machine has web, side"), "{error}");
    // The machine's limits hold for all together.
    let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("ab04")).unwrap();
    assert!(cgroup.procs().unwrap().len() >= 4);
}

#[test]
fn containers_start_and_stop_in_the_order_of_their_dependencies() {
    let world = World::new();
    let polite = |name: &str| format!("trap 'echo {name} ends; exit 0' TERM; echo {name}; while :; do sleep 0.02; done");
    let mut spec = world.spec("ab05", &polite("app"));
    spec.own = rules("app", &[("migrate", Condition::ExitedSuccessfully), ("db", Condition::Started)]);
    spec.containers = vec![
        container(&world, rules("db", &[]), &polite("db")),
        container(&world, rules("migrate", &[("db", Condition::Started)]), "sleep 0.3; echo migrated"),
    ];
    let machine = world.run(spec);
    until_said(&machine, "app: app");
    let order = said(&machine);
    let at = |line: &str| order.iter().position(|said| said == line).unwrap();
    assert!(at("db: db") < at("app: app") && at("migrate: migrated") < at("app: app"), "{order:?}");
    until("states", || {
        (state(&machine, "migrate") == ContainerState::Stopped && state(&machine, "app") == ContainerState::Running).then_some(())
    });
    machine.client().stop(15, PATIENCE).unwrap();
    let exit = machine.exit();
    assert_eq!((exit.exit_code, exit.requested_stop), (Some(0), true));
    assert_eq!(said(&machine)[order.len()..], ["app: app ends", "db: db ends"]);
}

#[test]
fn a_container_has_its_own_signal_and_time_to_stop() {
    let world = World::new();
    let mut spec = world.spec("ab06", "trap 'echo usr1; exit 0' USR1; trap '' TERM; echo up; while :; do sleep 0.02; done");
    spec.own = ContainerRules { stop_signal: Some(10), ..rules("web", &[]) };
    let deaf = ContainerRules { stop_timeout_ms: Some(100), ..rules("deaf", &[("web", Condition::Started)]) };
    spec.containers = vec![container(&world, deaf, "trap '' TERM; echo up; while :; do sleep 0.02; done")];
    let machine = world.run(spec);
    until_said(&machine, "deaf: up");
    machine.client().stop(15, PATIENCE).unwrap();
    assert_eq!(machine.exit().exit_code, Some(0));
    assert!(said(&machine).contains(&"web: usr1".to_owned()));
    assert!(records(&machine).iter().any(|r| r.program == "deaf" && r.line.contains("SIGKILL")));
}

#[test]
fn a_container_that_fails_is_tried_again_with_a_fresh_root() {
    let world = World::new();
    let mut spec = world.spec("ab07", "sleep 1000");
    spec.own = rules("app", &[]);
    let restart = RestartPolicy { policy: RestartWhen::OnFailure, max_retries: 2 };
    let failing = ContainerRules { restart, ..rules("worker", &[]) };
    spec.containers = vec![container(&world, failing, "ls /tmp/was-here 2>/dev/null; echo try >/tmp/was-here; cat /tmp/was-here; sleep 0.1; exit 5")];
    let machine = world.run(spec);
    let exit = machine.exit();
    assert_eq!((exit.exit_code, exit.requested_stop), (Some(5), false), "the policy gave up");
    assert_eq!(said(&machine), ["worker: try", "worker: try", "worker: try"]);
    let told = records(&machine).iter().filter(|record| record.line.contains("it is tried again")).count();
    assert_eq!(told, 2);
}

#[test]
fn one_that_is_tried_again_finds_what_is_kept_and_an_empty_temporary_directory() {
    let world = World::new();
    let layers = world.dir.path().join("layers");
    let file = world.dir.path().join("machines/ab20/kept/worker.ext4");
    layer::ready_kept(&file, &layers, ROOTFS_BYTES).unwrap();
    let template = layer::template(&layers, 16 << 20, false).unwrap();
    let mut spec = world.spec("ab20", "ls /work 2>/dev/null || echo alone; sleep 1000");
    spec.own = rules("app", &[]);
    let restart = RestartPolicy { policy: RestartWhen::OnFailure, max_retries: 2 };
    let script = "sleep 0.1; echo x >>/tries; cat /tries | busybox wc -l; ls /work; echo >/work/mine; exit 5";
    let mut worker = container(&world, ContainerRules { restart, ..rules("worker", &[]) }, script);
    let Rootfs::Layers { writable, .. } = &mut worker.rootfs else { panic!("a root of layers") };
    *writable = layer::WritableLayer::Kept { file };
    let storage = TempStorage::Disk(layer::WritableLayer::Passing { template });
    worker.temp_dirs = vec![TempDir { target: "/work".into(), storage }];
    spec.containers = vec![worker];
    let machine = world.run(spec);
    assert_eq!(machine.exit().exit_code, Some(5));
    let mut lines = said(&machine);
    lines.sort();
    assert_eq!(lines, ["app: alone", "worker: 1", "worker: 2", "worker: 3"]);
}

#[test]
fn one_started_again_is_still_in_the_machine() {
    let world = World::new();
    let mut spec = world.spec("ab08", "sleep 1000");
    let always = RestartPolicy { policy: RestartWhen::Always, max_retries: 0 };
    // The first, too: the namespaces that it made outlive it.
    spec.own = ContainerRules { restart: always.clone(), ..rules("app", &[]) };
    spec.containers = vec![container(&world, ContainerRules { restart: always, ..rules("side", &[]) }, "sleep 1000")];
    let machine = world.run(spec);
    let shared = "for n in user net ipc uts; do busybox readlink /proc/self/ns/$n; done; busybox grep -E '^(Cap|NoNew|Seccomp)' /proc/1/status";
    until("up", || (state(&machine, "side") == ContainerState::Running).then_some(()));
    let before = exec_in(&machine, "app", shared).0;
    for name in ["app", "side"] {
        exec_in(&machine, name, "echo 1 >/tmp/old; busybox killall sleep");
        until("again", || {
            let again = records(&machine).iter().any(|r| r.program == name && r.line.contains("tried again"));
            (again && state(&machine, name) == ContainerState::Running).then_some(())
        });
        assert_eq!(exec_in(&machine, name, shared).0, before, "{name}");
        assert_eq!(exec_in(&machine, name, "ls /tmp").0, "", "{name}");
    }
    machine.client().signal(9).unwrap();
    let exit = machine.exit();
    assert_eq!((exit.signal, exit.requested_stop), (Some(9), false));
}

#[test]
fn who_waits_for_health_starts_once_the_checks_pass() {
    let world = World::new();
    let check = |name: &str, probe| Healthcheck {
        name: name.into(),
        probe,
        interval_ms: 100,
        timeout_ms: 2000,
        grace_period_ms: 60_000,
        success_threshold: 1,
        failure_threshold: 1,
        stop_unhealthy: false,
    };
    let mut spec = world.spec("ab09", "echo ready; sleep 1000");
    spec.own = rules("app", &[("web", Condition::Healthy)]);
    let script = "sleep 0.3; echo >/tmp/ready; mkdir /tmp/www; echo hi >/tmp/www/index.html; busybox httpd -f -p 127.0.0.1:8080 -h /tmp/www";
    let http = |path: &str| Probe::Http { port: 8080, method: "GET".into(), path: path.into(), headers: [].into(), tls: None };
    let checks = vec![
        check("port", Probe::Tcp { port: 8080 }),
        check("page", http("/index.html")),
        check("file", Probe::Exec { command: vec!["cat".into(), "/tmp/ready".into()] }),
    ];
    let web = ContainerRules { healthchecks: checks, ..rules("web", &[]) };
    spec.containers = vec![container(&world, web, &script.replace("mkdir", "busybox mkdir"))];
    let machine = world.run(SupervisorSpec { start: false, ..spec });
    // What a machine with an address has.
    let namespace = format!("--net=/proc/{}/ns/net", machine.client().status().unwrap().init_pid);
    let up = std::process::Command::new("nsenter").args([&namespace, "ip", "link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
    machine.client().start().unwrap();
    until_said(&machine, "app: ready");
    assert_eq!(state(&machine, "web"), ContainerState::Healthy);
    exec_in(&machine, "web", "busybox rm /tmp/www/index.html");
    until("unhealthy", || (state(&machine, "web") == ContainerState::Unhealthy).then_some(()));
    assert!(records(&machine).iter().any(|record| record.line == "container web: check page fails"));
}

/// Answers 200 to everything on 127.0.0.1:8443 of a network namespace, with a certificate of nobody's.
fn serve_https(network: std::fs::File) {
    use std::io::{Read, Write};
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["web.internal".into()]).unwrap().self_signed(&key).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key.into()).unwrap();
    let config = std::sync::Arc::new(config);
    let (tell, listens) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        nix::sched::setns(&network, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:8443").unwrap();
        tell.send(()).unwrap();
        for stream in listener.incoming() {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream.unwrap());
            // Who does not take the certificate goes away.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").and_then(|()| stream.flush());
            }
        }
    });
    listens.recv().unwrap();
}

/// Inside of all that confines the container, and with the authorities of the host.
#[test]
fn a_check_over_https_takes_a_certificate_only_from_whom_it_knows() {
    let world = World::new();
    let check = |name: &str, tls| Healthcheck {
        name: name.into(),
        probe: Probe::Http { port: 8443, method: "GET".into(), path: "/".into(), headers: [].into(), tls },
        interval_ms: 100,
        timeout_ms: 5000,
        grace_period_ms: 0,
        success_threshold: 1,
        failure_threshold: 1,
        stop_unhealthy: false,
    };
    let named = |skip_verify| Some(ProbeTls { server_name: Some("web.internal".into()), skip_verify });
    let of = |name: &str, tls| container(&world, ContainerRules { healthchecks: vec![check("up", tls)], ..rules(name, &[]) }, "exec sleep 1000");
    let mut spec = world.spec("ab12", "sleep 1000");
    spec.own = rules("app", &[]);
    spec.containers = vec![of("any", named(true)), of("known", named(false)), of("plain", None)];
    let machine = world.run(SupervisorSpec { start: false, ..spec });
    let network = format!("/proc/{}/ns/net", machine.client().status().unwrap().init_pid);
    let up = std::process::Command::new("nsenter").args([&format!("--net={network}"), "ip", "link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
    serve_https(std::fs::File::open(network).unwrap());
    machine.client().start().unwrap();
    for (name, expected) in [("any", ContainerState::Healthy), ("known", ContainerState::Unhealthy), ("plain", ContainerState::Unhealthy)] {
        until(name, || (state(&machine, name) == expected).then_some(()));
    }
}

#[test]
fn an_unhealthy_container_may_be_stopped_and_started_again() {
    let world = World::new();
    let check = Healthcheck {
        name: "file".into(),
        probe: Probe::Exec { command: vec!["cat".into(), "/tmp/fine".into()] },
        interval_ms: 100,
        timeout_ms: 2000,
        grace_period_ms: 0,
        success_threshold: 1,
        failure_threshold: 2,
        stop_unhealthy: true,
    };
    let restart = RestartPolicy { policy: RestartWhen::OnFailure, max_retries: 1 };
    let mut spec = world.spec("ab10", "sleep 1000");
    spec.own = rules("app", &[]);
    let web = ContainerRules { healthchecks: vec![check], restart, ..rules("web", &[]) };
    // It ends well: being unhealthy counts as a failure all the same.
    spec.containers = vec![container(&world, web, "trap 'exit 0' TERM; echo up; while :; do sleep 0.02; done")];
    let machine = world.run(spec);
    assert_eq!(machine.exit().exit_code, Some(0));
    assert_eq!(said(&machine), ["web: up", "web: up"]);
}

#[test]
fn the_end_of_the_supervisor_ends_all_containers() {
    let world = World::new();
    let mut spec = world.spec("ab11", "sleep 1000");
    spec.own = ContainerRules { restart: NO, ..rules("app", &[]) };
    spec.containers = vec![container(&world, rules("side", &[]), "sleep 1000")];
    let machine = world.run(spec);
    until("up", || (state(&machine, "side") == ContainerState::Running).then_some(()));
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("ab11")).unwrap();
    assert!(cgroup.procs().unwrap().len() >= 4);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    until("all are gone", || cgroup.is_empty().unwrap().then_some(()));
}

#[test]
fn what_one_container_lacks_is_said_before_any_starts() {
    let world = World::new();
    let mut spec = world.spec("ab12", "echo started");
    spec.own = rules("app", &[]);
    let mut ghost = container(&world, rules("side", &[]), "true");
    ghost.process.user = "ghost".into();
    spec.containers = vec![ghost];
    let error = spawn(&world.exe, &spec).unwrap_err().to_string();
    assert!(error.contains("ghost"), "{error}");
    let failed = Running { world: &world, spec };
    assert!(failed.exit().error.is_some());
    assert!(said(&failed).is_empty());
}

#[test]
fn a_suspended_machine_starts_nothing_again() {
    let world = World::new();
    let always = RestartPolicy { policy: RestartWhen::Always, max_retries: 0 };
    let mut spec = world.spec("ab13", "sleep 1000");
    spec.own = rules("app", &[]);
    spec.containers = vec![container(&world, ContainerRules { restart: always, ..rules("side", &[]) }, "echo up; sleep 0.1")];
    let machine = world.run(spec);
    until_said(&machine, "side: up");
    let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("ab13")).unwrap();
    cgroup.freeze(Duration::from_secs(10)).unwrap();
    std::thread::sleep(Duration::from_millis(1500)); // longer than the first pause
    machine.client().status().unwrap();
    let before = said(&machine).len();
    cgroup.thaw().unwrap();
    until("it goes on", || (said(&machine).len() > before).then_some(()));
    machine.client().stop(15, PATIENCE).unwrap();
    machine.exit();
}

use super::read::Named;
use super::{events, read, show};
use dunlin_model::{
    AutoStop, CheckKind, Condition, CpuKind, EventKind, ExitInfo, ImageRef, MachineEvent, MachineField, MachineSpec, MachineState, MachineVersion, Probe,
    RestartWhen, Source,
};
use serde_json::{Value, json};

fn spec(config: Value) -> MachineSpec {
    let asked = read(config).unwrap();
    let image = ImageRef { repository: "web".into(), digest: format!("sha256:{}", "a".repeat(64)), tag: Some("v1".into()) };
    let (org, app) = ("personal".parse().unwrap(), "web".parse().unwrap());
    let of_containers = asked.container_images().map(|name| ImageRef { repository: name.to_owned(), ..image.clone() }).collect();
    asked.spec(MachineVersion::new(1, [0; 10]), (image, of_containers), &Named { org: &org, app: &app, release: 0, secrets_version: 3 })
}

fn refused(config: Value, says: &str) {
    let failure = read(config.clone()).expect_err(&config.to_string());
    assert!(failure.message.contains(says), "{config}: {} does not say {says}", failure.message);
}

fn full() -> Value {
    json!({
        "image": "registry.localhost/web:v1",
        "env": { "A": "1" },
        "init": { "entrypoint": ["/bin/sh"], "cmd": ["-c", "true"], "swap_size_mb": 256 },
        "files": [{ "guest_path": "/etc/app.conf", "raw_value": "aGk=", "mode": 384 }],
        "guest": { "cpu_kind": "performance", "cpus": 2, "memory_mb": 512 },
        "services": [{
            "protocol": "tcp", "internal_port": 8080, "autostop": "stop", "autostart": false, "min_machines_running": 1,
            "force_instance_key": null,
            "ports": [
                { "port": 80, "handlers": ["http"], "force_https": true },
                { "port": 443, "handlers": ["tls", "http"] },
            ],
            "concurrency": { "type": "requests", "soft_limit": 10, "hard_limit": 30 },
            "checks": [{ "type": "http", "interval": 10_000_000_000u64, "timeout": "1m30s", "path": "/up",
                "headers": [{ "name": "x-a", "values": ["b"] }] }],
        }],
        "checks": { "port": { "type": "tcp", "port": 9000 } },
        "restart": { "policy": "on-failure", "max_retries": 3 },
        "stop_config": { "signal": "SIGTERM", "timeout": "10s" },
        "metadata": { "fly_process_group": "worker", "mine": "yes" },
        "auto_destroy": true, "schedule": "hourly", "processes": null, "dns": {},
    })
}

#[test]
fn what_is_known_means_what_it_says() {
    let spec = spec(full());
    assert_eq!((spec.process_group.as_str(), spec.release, spec.secrets_version), ("worker", 0, 3));
    assert_eq!(spec.entrypoint, Some(vec!["/bin/sh".to_owned()]));
    assert_eq!((spec.guest.cpu_kind, spec.guest.cpus, spec.guest.memory_mb), (CpuKind::Performance, 2, 512));
    assert_eq!((spec.swap_mb, spec.files[0].guest_path.as_str(), spec.files[0].mode), (256, "/etc/app.conf", Some(0o600)));
    let service = &spec.services[0];
    assert!(service.force_https && service.autostop == AutoStop::Stop && !service.autostart);
    assert_eq!(service.concurrency.hard_limit, Some(30));
    assert_eq!(spec.checks[0].name, "servicecheck-00-http-8080");
    assert_eq!((spec.checks[0].interval_ms, spec.checks[0].timeout_ms), (10_000, 90_000));
    assert_eq!((spec.checks[1].name.as_str(), spec.checks[1].gates_routing, &spec.checks[1].kind), ("port", false, &CheckKind::Tcp));
    assert_eq!((spec.restart.policy, spec.auto_destroy), (RestartWhen::OnFailure, true));
    assert_eq!((spec.stop.signal.as_deref(), spec.stop.timeout_ms), (Some("SIGTERM"), 10_000));
}

#[test]
fn what_is_shown_can_be_read_back() {
    for config in [full(), json!({ "image": "web" }), json!({ "image": "web", "init": { "exec": ["/app"] } })] {
        let before = spec(config);
        let mut again = spec(show(&before, "localhost"));
        // An empty list of arguments and none are the same beside an entrypoint.
        again.command = again.command.or(before.command.clone());
        again.metadata.remove("fly_process_group");
        let mut before = before;
        before.metadata.remove("fly_process_group");
        assert_eq!(again, before);
    }
}

#[test]
fn sizes_have_names() {
    let guest = spec(json!({ "image": "web", "size": "shared-cpu-2x" })).guest;
    assert_eq!((guest.cpus, guest.memory_mb), (2, 512));
    let guest = spec(json!({ "image": "web", "size": "performance-1x", "guest": { "memory_mb": 4096 } })).guest;
    assert_eq!((guest.cpu_kind, guest.memory_mb), (CpuKind::Performance, 4096));
    refused(json!({ "image": "web", "size": "huge" }), "config.size cannot be used: \"huge\" is none of shared-cpu-1x");
}

#[test]
fn nothing_is_dropped() {
    refused(json!({}), "config.image is missing");
    refused(json!([]), "config must be an object");
    refused(json!({ "image": "web", "colour": "red" }), "config.colour is not known here");
    refused(json!({ "image": "web", "guest": { "cpu": 1 } }), "config.guest.cpu is not known here");
    refused(json!({ "image": "web", "auto_destroy": 1 }), "config.auto_destroy");
    let scheduled = |schedule: &str, policy: &str| json!({ "image": "web", "schedule": schedule, "restart": { "policy": policy } });
    refused(scheduled("often", "no"), "config.schedule cannot be used: \"often\" is neither hourly");
    refused(scheduled("0 25 * * *", "no"), "config.schedule cannot be used: \"25\" is no hour");
    refused(scheduled("daily", "always"), "config.restart.policy cannot be used: a machine with a schedule");
    let of = |schedule: &str| spec(scheduled(schedule, "on-failure")).schedule.map(|schedule| schedule.to_string());
    assert_eq!((of("daily").as_deref(), of("*/5 * * * *").as_deref(), of("")), (Some("daily"), Some("*/5 * * * *"), None));
    let mount = |volume: &str, path: &str| json!({ "image": "web", "mounts": [{ "volume": volume, "path": path }] });
    refused(mount("vol_1", "/data"), "config.mounts[0].volume");
    refused(mount("vol_abababababababab", "/proc"), "config.mounts[0].path");
    assert_eq!(spec(mount("vol_abababababababab", "/data")).mounts[0].path, "/data");
    let grows = |limit: u32| {
        let mut given = mount("vol_abababababababab", "/data");
        for (name, value) in [("extend_threshold_percent", 80), ("add_size_gb", 1), ("size_gb_limit", limit)] {
            given["mounts"][0][name] = json!(value);
        }
        given
    };
    assert_eq!(spec(grows(9)).mounts[0].extend.unwrap().limit_gb, 9);
    refused(grows(0), "config.mounts[0].size_gb_limit");
    refused(json!({ "image": "web", "guest": { "gpus": 1 } }), "config.guest.gpus");
    refused(json!({ "image": "web", "init": { "exec": ["a"], "cmd": ["b"] } }), "config.init.exec");
    refused(json!({ "image": "web", "env": { "FLY_REGION": "x" } }), "config.env.FLY_REGION");
    refused(json!({ "image": "web", "env": { "A": 1 } }), "config.env.A must be a text");
    refused(json!({ "image": "web", "restart": { "policy": "often" } }), "config.restart.policy");
    refused(json!({ "image": "web", "stop_config": { "timeout": "1h" } }), "config.stop_config.timeout");
    refused(json!({ "image": "a".repeat(30_000) }), "longer than");
    let service = |fields: Value| {
        let mut service = json!({ "internal_port": 80, "ports": [{ "port": 443, "handlers": ["tls", "http"] }] });
        service.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!({ "image": "web", "services": [service] })
    };
    assert!(spec(service(json!({}))).services[0].force_https, "nothing is served over HTTP");
    refused(service(json!({ "protocol": "udp" })), "config.services[0].protocol");
    refused(service(json!({ "ports": [] })), "config.services[0].ports");
    refused(service(json!({ "ports": [{ "port": 5432 }] })), "config.services[0].ports[0].port");
    refused(service(json!({ "autostop": "sometimes" })), "config.services[0].autostop");
    assert_eq!(spec(service(json!({ "autostop": "suspend" }))).services[0].autostop, AutoStop::Suspend);
    refused(service(json!({ "checks": [{ "type": "tcp", "x": 1 }] })), "config.services[0].checks[0].x is not known");
    let http_options = json!({ "ports": [{ "port": 80, "handlers": ["http"], "http_options": { "compress": true } }] });
    refused(service(http_options), "config.services[0].ports[0].http_options");
}

#[test]
fn processes_have_commands_users_and_secrets_of_their_own() {
    let spec = spec(json!({
        "image": "web",
        "processes": [
            { "exec": ["/web"], "env": { "A": "1" }, "env_from": [{ "env_var": "ME", "field_ref": "id" }] },
            { "cmd": ["work"], "user": "app", "ignore_app_secrets": true, "secrets": [{ "env_var": "KEY", "name": "WORK_KEY" }, { "name": "B" }] },
        ],
    }));
    let [web, work] = &spec.processes[..] else { panic!("{:?}", spec.processes) };
    assert_eq!((web.entrypoint.clone(), web.command.clone()), (Some(vec!["/web".to_owned()]), Some(vec![])));
    assert_eq!((web.env["A"].as_str(), web.env_from["ME"], web.only_named_secrets), ("1", MachineField::Id, false));
    assert_eq!((work.user.as_str(), work.only_named_secrets), ("app", true));
    assert_eq!((work.secrets["KEY"].as_str(), work.secrets["B"].as_str()), ("WORK_KEY", "B"));
    refused(json!({ "image": "web", "processes": [{ "what": 1 }] }), "config.processes[0].what");
    refused(json!({ "image": "web", "processes": [{}], "init": { "cmd": ["x"] } }), "config.init");
    let field = json!([{ "env_var": "A", "field_ref": "host" }]);
    refused(json!({ "image": "web", "processes": [{ "env_from": field }] }), "config.processes[0].env_from[0].field_ref");
    refused(json!({ "image": "web", "processes": [{ "env": { "FLY_A": "1" } }] }), "config.processes[0].env.FLY_A");
    let many = vec![json!({}); 9];
    refused(json!({ "image": "web", "processes": many }), "config.processes");
}

#[test]
fn containers_are_read_with_all_that_they_say() {
    let spec = spec(json!({
        "mounts": [{ "volume": "vol_0123456789abcdef", "name": "data", "path": "/unused" }],
        "containers": [
            {
                "name": "proxy", "image": "nginx", "depends_on": [{ "name": "app", "condition": "healthy" }],
                "stop": { "signal": "SIGQUIT", "timeout": "3s" }, "restart": { "policy": "always" },
                "secrets": [{ "env_var": "CERT" }],
            },
            {
                "name": "app", "image": "web", "cmd": ["serve"], "mounts": [{ "name": "data", "path": "/data" }],
                "files": [{ "guest_path": "/etc/app", "raw_value": "aGk=" }],
                "healthchecks": [
                    { "http": { "port": 8080, "path": "/up" }, "interval": 5, "failure_threshold": 2 },
                    { "name": "db", "kind": "liveness", "unhealthy": "stop", "tcp": { "port": 5432 } },
                    { "name": "file", "exec": { "command": ["cat", "/ok"] } },
                ],
            },
        ],
    }));
    let [proxy, app] = &spec.containers[..] else { panic!("{:?}", spec.containers) };
    assert_eq!((proxy.image.repository.as_str(), app.image.repository.as_str()), ("nginx", "web"));
    assert_eq!((proxy.stop_signal.as_deref(), proxy.stop_timeout_ms), (Some("SIGQUIT"), Some(3000)));
    assert_eq!((proxy.restart.policy, app.restart.policy), (RestartWhen::Always, RestartWhen::OnFailure));
    assert_eq!(proxy.depends_on[0].condition, Condition::Healthy);
    assert!(proxy.program.only_named_secrets && !app.program.only_named_secrets);
    assert_eq!(app.mounts[0].path, "/data");
    let [up, db, file] = &app.healthchecks[..] else { panic!("{:?}", app.healthchecks) };
    assert_eq!((up.name.as_str(), up.interval_ms, up.timeout_ms, up.failure_threshold), ("check-0", 5000, 2000, 2));
    assert!(db.stop_unhealthy && db.probe == Probe::Tcp { port: 5432 });
    assert_eq!(file.probe, Probe::Exec { command: vec!["cat".into(), "/ok".into()] });
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec);
}

#[test]
fn containers_that_cannot_be_run_are_refused_by_their_path() {
    let with = |container: Value| json!({ "image": "web", "containers": [{ "name": "a" }, container] });
    let wrong = |container: Value, says: &str| refused(with(container), says);
    wrong(json!({ "name": "a" }), "config.containers[1].name is there twice");
    wrong(json!({}), "config.containers[1].name");
    wrong(json!({ "name": "b", "depends_on": [{ "name": "c" }] }), "config.containers[1].depends_on[0].name");
    wrong(json!({ "name": "b", "depends_on": [{ "name": "b" }] }), "config.containers[1].depends_on: b waits for itself");
    wrong(json!({ "name": "b", "depends_on": [{ "name": "a", "condition": "happy" }] }), "config.containers[1].depends_on[0].condition");
    wrong(json!({ "name": "b", "depends_on": [{ "name": "a", "condition": "healthy" }] }), "has no healthchecks");
    wrong(json!({ "name": "b", "mounts": [{ "name": "data", "path": "/d" }] }), "config.containers[1].mounts[0].name");
    wrong(json!({ "name": "b", "healthchecks": [{}] }), "config.containers[1].healthchecks[0].http");
    let gopher = json!([{ "http": { "port": 443, "scheme": "gopher" } }]);
    wrong(json!({ "name": "b", "healthchecks": gopher }), "config.containers[1].healthchecks[0].http.scheme");
    let nobody = json!([{ "http": { "port": 443, "scheme": "https", "tls_server_name": "a b" } }]);
    wrong(json!({ "name": "b", "healthchecks": nobody }), "config.containers[1].healthchecks[0].http.tls_server_name");
    let stopping = json!([{ "tcp": { "port": 1 }, "unhealthy": "stop" }]);
    wrong(json!({ "name": "b", "healthchecks": stopping }), "config.containers[1].healthchecks[0].unhealthy");
    wrong(json!({ "name": "b", "files": [{ "guest_path": "x", "raw_value": "" }] }), "config.containers[1].files[0].guest_path");
    wrong(json!({ "name": "b", "cpu": 1 }), "config.containers[1].cpu");
    refused(json!({ "containers": [{ "name": "a" }] }), "config.containers[0].image");
    let two = json!({ "image": "web", "containers": [{ "name": "a" }], "processes": [{ "cmd": ["x"] }] });
    refused(two, "config.processes");
    let files = json!([{ "guest_path": "/x", "raw_value": "aGk=" }]);
    refused(json!({ "image": "web", "containers": [{ "name": "a" }], "files": files }), "config.files");
    let many: Vec<Value> = (0..9).map(|n| json!({ "name": format!("c{n}") })).collect();
    refused(json!({ "image": "web", "containers": many }), "config.containers");
}

#[test]
fn root_file_systems_have_a_size_and_an_end() {
    use dunlin_model::disk::{MachineRootfs, Persist};
    let with = |rootfs: Value, guest: Value| json!({ "image": "web", "rootfs": rootfs, "guest": guest });
    let rootfs = |rootfs, guest| spec(with(rootfs, guest)).rootfs;
    assert_eq!(rootfs(Value::Null, Value::Null), MachineRootfs::default());
    assert_eq!(rootfs(json!({ "size_gb": 20, "persist": "always" }), Value::Null), MachineRootfs { size_gb: 20, persist: Persist::Always });
    assert_eq!(rootfs(Value::Null, json!({ "persist_rootfs": "restart" })).persist, Persist::Restart);
    assert_eq!(rootfs(json!({ "size_gb": 2 }), json!({ "persist_rootfs": "restart" })), MachineRootfs { size_gb: 2, persist: Persist::Restart });
    refused(with(json!({ "persist": "never" }), json!({ "persist_rootfs": "restart" })), "config.rootfs.persist");
    refused(with(json!({ "persist": "sometimes" }), Value::Null), "config.rootfs.persist");
    refused(with(json!({ "size_gb": 101 }), Value::Null), "config.rootfs.size_gb");
    refused(with(Value::Null, json!({ "persist_rootfs": "sometimes" })), "config.guest.persist_rootfs");
}

#[test]
fn temporary_directories_are_named_sized_and_mounted() {
    use dunlin_model::disk::{TempDir, TempStorage};
    let with = |volumes: Value, mounts: Value| json!({ "image": "web", "volumes": volumes, "mounts": mounts });
    let volume = |name: &str, kind: &str, size_mb: u32| json!({ "name": name, "temp_dir": { "storage_type": kind, "size_mb": size_mb } });
    let mount = |name: &str, path: &str| json!({ "name": name, "path": path });
    let given = with(
        json!([volume("cache", "memory", 64), volume("work", "disk", 100)]),
        json!([mount("work", "/work"), { "volume": "vol_abababababababab", "path": "/data" }, { "volume": "cache", "path": "/cache" }]),
    );
    let spec = spec(given);
    let dir = |name: &str, path: &str, storage, size_mb| TempDir { name: name.into(), path: path.into(), storage, size_mb };
    assert_eq!(spec.temp_dirs, [dir("work", "/work", TempStorage::Disk, 100), dir("cache", "/cache", TempStorage::Memory, 64)]);
    assert_eq!(spec.mounts.len(), 1);
    let shown = show(&spec, "localhost");
    assert_eq!(shown["mounts"][1], mount("work", "/work"));
    assert_eq!(shown["volumes"][1], volume("cache", "memory", 64));

    let one = |size_mb| json!([volume("work", "disk", size_mb)]);
    refused(with(one(15), json!([mount("work", "/work")])), "config.volumes[0].temp_dir.size_mb");
    refused(with(json!([volume("work", "tape", 64)]), json!([mount("work", "/work")])), "config.volumes[0].temp_dir.storage_type");
    refused(with(json!([volume("wo/rk", "disk", 64)]), json!([mount("wo/rk", "/work")])), "config.volumes[0].name");
    refused(with(json!([{ "name": "work", "image": "x" }]), json!([])), "config.volumes[0].image");
    refused(with(one(64), json!([])), "config.volumes");
    refused(with(one(64), json!([mount("work", "/proc/x")])), "config.mounts[0].path");
    refused(with(one(64), json!([mount("work", "/w"), mount("work", "/x")])), "config.mounts[1].name");
    refused(with(json!([volume("a", "disk", 64), volume("b", "disk", 64)]), json!([mount("a", "/w"), mount("b", "/w/x")])), "config.mounts[1].path");
    refused(with(json!([volume("a", "disk", 64), volume("a", "disk", 64)]), json!([])), "config.volumes[1].name");
    refused(with(json!([volume("a", "memory", 200), volume("b", "memory", 57)]), json!([mount("a", "/a"), mount("b", "/b")])), "257 MiB");
    let growing = json!({ "name": "work", "path": "/w", "extend_threshold_percent": 80, "add_size_gb": 1, "size_gb_limit": 5 });
    refused(with(one(64), json!([growing])), "config.mounts[0].extend_threshold_percent");
    let other = json!([mount("work", "/w"), { "volume": "vol_abababababababab", "name": "work", "path": "/data" }]);
    refused(with(one(64), other), "config.mounts[1].name");
}

#[test]
fn a_temporary_directory_is_that_of_one_container() {
    let volumes = json!([{ "name": "work", "temp_dir": { "size_mb": 64 } }]);
    let with = |a: Value, b: Value| {
        let containers = json!([{ "name": "a", "mounts": a }, { "name": "b", "mounts": b }]);
        json!({ "image": "web", "volumes": volumes, "containers": containers })
    };
    let work = |path: &str| json!([{ "name": "work", "path": path }]);
    let spec = spec(with(work("/work"), json!([])));
    assert_eq!((spec.temp_dirs[0].path.as_str(), spec.containers[0].mounts[0].path.as_str()), ("", "/work"));
    assert_eq!((show(&spec, "localhost")["mounts"].clone(), spec.containers[1].mounts.len()), (json!([]), 0));
    refused(with(json!([]), json!([])), "mounted nowhere");
    refused(with(work("/work"), work("/work")), "mounted twice");
    let twice = json!([{ "name": "work", "path": "/a" }, { "name": "work", "path": "/a/b" }]);
    refused(with(twice, json!([])), "config.containers[0].mounts[1].path");
}

/// Fly's Go client has no null: what is not said is 0, and 0 is success.
#[test]
fn an_exit_is_told_in_numbers() {
    let quiet = ExitInfo { attempt: 1, exit_code: None, signal: None, oom_killed: false, requested_stop: false, at_ms: 0, error: None };
    let told = |exit: ExitInfo, status| {
        let event = MachineEvent { id: 1, kind: EventKind::Exit, status, source: Source::Host, at_ms: 0, exit: Some(exit), restarts: 2, request_id: None };
        events(&[event])[0]["request"].clone()
    };
    let code = |exit: ExitInfo, code: i32| {
        let told = told(exit.clone(), MachineState::Failed);
        let exit_event = &told["exit_event"];
        assert_eq!((&exit_event["exit_code"], &exit_event["guest_exit_code"]), (&json!(code), &json!(code)), "{exit:?}");
        assert_eq!((&exit_event["signal"], &exit_event["oom_killed"]), (&json!(exit.signal), &json!(exit.oom_killed)));
    };
    code(ExitInfo { exit_code: Some(0), ..quiet.clone() }, 0);
    code(ExitInfo { exit_code: Some(3), ..quiet.clone() }, 3);
    code(ExitInfo { signal: Some(15), ..quiet.clone() }, 143);
    code(ExitInfo { signal: Some(9), oom_killed: true, ..quiet.clone() }, 137);
    code(ExitInfo { oom_killed: true, ..quiet.clone() }, 137);
    code(ExitInfo { error: Some("no such file".into()), ..quiet.clone() }, 126);
    for (status, restarting) in [
        (MachineState::Restarting, true), (MachineState::Starting, true), (MachineState::Stopped, false), (MachineState::Failed, false),
    ] {
        let told = told(quiet.clone(), status);
        assert_eq!((&told["exit_event"]["restarting"], &told["restart_count"]), (&json!(restarting), &json!(2)), "{status:?}");
    }
}

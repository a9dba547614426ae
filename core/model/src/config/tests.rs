use super::Strategy as DeployStrategy;
use super::*;
use crate::machine::{ConcurrencyKind, Guest};
use proptest::prelude::*;

fn good(text: &str) -> AppConfig {
    let parsed = parse(text, "dunlin.toml").unwrap();
    assert!(!parsed.problems.iter().any(ConfigProblem::stops), "{text}: {:?}", parsed.problems);
    parsed.config
}

/// What is said about a file that cannot be used.
fn refused(text: &str, expected: &str) {
    let error = parse(text, "dunlin.toml").unwrap_err();
    assert_eq!(error.to_string(), expected, "{text}");
}

/// What is said about keys without effect.
fn warned(text: &str, expected: &[&str]) -> AppConfig {
    let parsed = parse(text, "fly.toml").unwrap();
    assert_eq!(parsed.problems.iter().map(|p| p.to_string()).collect::<Vec<_>>(), expected, "{text}");
    parsed.config
}

const FULL: &str = r#"
app = "hello-web"
primary_region = "fra"
kill_signal = "SIGTERM"
kill_timeout = 10
swap_size_mb = 512
console_command = "bin/rails console"

[build]
dockerfile = "docker/Dockerfile.web"
ignorefile = "docker/ignore"
build-target = "final"
args = { VERSION = "1", DEBUG = true }

[deploy]
strategy = "immediate"
wait_timeout = "2m"
max_unavailable = 1

[env]
LOG_LEVEL = "info"
WORKERS = 4

[processes]
app = "gunicorn app:app"
worker = "python worker.py"

[http_service]
internal_port = 8000
force_https = true
auto_stop_machines = true
auto_start_machines = true
min_machines_running = 1
processes = ["app"]

[http_service.concurrency]
type = "requests"
soft_limit = 200
hard_limit = 250

[[http_service.checks]]
interval = "10s"
timeout = 2000
grace_period = "5s"
method = "get"
path = "/healthz"
headers = { X-Check = "yes" }

[checks.db]
type = "tcp"
port = 9000
interval = 30000
processes = ["worker"]

[[vm]]
size = "shared-cpu-2x"
memory = "1gb"

[[vm]]
cpus = 2
memory = 300
cpu_kind = "performance"
processes = ["worker"]

[[restart]]
policy = "always"
retries = 3

[[files]]
guest_path = "/etc/app/motd"
raw_value = "aGVsbG8="

[[files]]
guest_path = "/etc/app/key.pem"
secret_name = "KEY_PEM"
processes = ["worker"]
"#;

#[test]
fn reads_every_honoured_key() {
    let config = good(FULL);
    assert_eq!(config.validate(), Ok(()));
    assert_eq!(config.app.as_ref().unwrap().as_str(), "hello-web");
    assert_eq!(config.kill_timeout_ms, Some(10_000));
    assert_eq!(config.build.args["DEBUG"], "true");
    assert_eq!(config.deploy, Deploy { strategy: DeployStrategy::Immediate, wait_timeout_ms: 120_000 });
    assert_eq!(config.env["WORKERS"], "4");

    assert_eq!(config.process_groups(), ["app", "worker"]);
    assert_eq!(config.command_for("worker").unwrap(), ["python", "worker.py"]);
    assert_eq!(config.guest_for("app"), Guest { cpu_kind: CpuKind::Shared, cpus: 2, memory_mb: 1024 });
    assert_eq!(config.guest_for("worker"), Guest { cpu_kind: CpuKind::Performance, cpus: 2, memory_mb: 300 });
    assert_eq!(config.restart_for("worker").max_retries, 3);
    assert_eq!(config.stop().signal.as_deref(), Some("SIGTERM"));
    assert_eq!(config.swap_size_mb, Some(512));
    assert_eq!(config.console_command.as_deref(), Some("bin/rails console"));
    let paths = |group: &str| config.files_for(group).into_iter().map(|file| file.guest_path).collect::<Vec<_>>();
    assert_eq!(paths("app"), ["/etc/app/motd"]);
    assert_eq!(paths("worker"), ["/etc/app/motd", "/etc/app/key.pem"]);

    let services = config.services_for("app");
    assert_eq!(services.len(), 1);
    assert!(services[0].force_https && services[0].autostop == AutoStop::Stop && services[0].min_machines_running == 1);
    assert_eq!(services[0].concurrency.kind, ConcurrencyKind::Requests);
    assert_eq!(config.services_for("worker"), []);

    let checks = config.checks_for("app");
    assert_eq!(checks.iter().map(|c| (c.name.as_str(), c.gates_routing)).collect::<Vec<_>>(), [("servicecheck-00-http-8000", true)]);
    assert_eq!((checks[0].interval_ms, checks[0].timeout_ms, checks[0].grace_period_ms), (10_000, 2_000, 5_000));
    let checks = config.checks_for("worker");
    assert_eq!(checks.iter().map(|c| (c.name.as_str(), c.gates_routing)).collect::<Vec<_>>(), [("db", false)]);
}

#[test]
fn an_empty_file_has_defaults() {
    let config = good("");
    assert_eq!(config, AppConfig::default());
    assert_eq!(config.process_groups(), ["app"]);
    assert_eq!(config.command_for("app"), None);
    assert_eq!(config.guest_for("app"), Guest::default());
    assert_eq!(config.services_for("app"), []);
}

#[test]
fn a_service_without_checks_is_checked_for_listening() {
    let config = good("[http_service]\ninternal_port = 3000\n");
    let checks = config.checks_for("app");
    assert_eq!((checks[0].name.as_str(), checks[0].port, checks[0].gates_routing), ("servicecheck-listens-3000", 3000, true));
}

#[test]
fn old_services_on_80_and_443_are_http_services() {
    let text = r#"
[[services]]
protocol = "tcp"
internal_port = 5000
[services.concurrency]
hard_limit = 10
[[services.ports]]
port = 80
handlers = ["http"]
force_https = true
[[services.ports]]
port = "443"
handlers = ["tls", "http"]
[[services.tcp_checks]]
interval = "15s"
"#;
    refused(text, "dunlin.toml:12:8: services[0].ports[1].port must be a port from 1 to 65535, found the text \"443\"");
    let config = good(&text.replace("\"443\"", "443"));
    assert_eq!(config.services[0].internal_port, 5000);
    assert!(config.services[0].force_https);
    assert_eq!(config.services[0].concurrency.soft_limit, 10);
    assert_eq!(config.checks_for("app")[0].name, "servicecheck-00-tcp-5000");
}

#[test]
fn other_services_are_not_honoured() {
    warned(
        "[[services]]\nprotocol = \"udp\"\ninternal_port = 53\n",
        &["line 1: services[0].protocol is not honoured yet: the edge serves HTTP and HTTPS only, no udp"],
    );
    let config = warned(
        "[[services]]\ninternal_port = 53\n[[services.ports]]\nport = 5432\nhandlers = [\"pg_tls\"]\n",
        &["line 1: services[0].ports is not honoured yet: the edge serves port 80 with handlers [\"http\"] and port 443 with handlers [\"tls\", \"http\"], always both"],
    );
    assert_eq!(config.services, []);
}

#[test]
fn unknown_keys_name_the_nearest() {
    let text = "ap = \"x\"\ninternal_port = 1\nzzzzzzz = 1\n[http_service]\nintrenal_port = 1\n[bulid]\nimage = \"x\"\n";
    warned(
        text,
        &[
            "line 1: ap is not a known key; did you mean app?",
            "line 2: internal_port is not a known key; did you mean http_service.internal_port?",
            "line 3: zzzzzzz is not a known key",
            "line 5: http_service.intrenal_port is not a known key; did you mean internal_port?",
            "line 6: bulid is not a known key; did you mean build?",
        ],
    );
}

#[test]
fn known_keys_without_effect_are_named() {
    let text = "[deploy]\nstrategy = \"bluegreen\"\nrelease_command = \"migrate\"\nmax_unavailable = 0.5\n[mounts]\nsource = \"data\"\ndestination = \"/data\"\ntype = \"nfs\"\n[http_service]\nauto_start_machines = true\n[http_service.tls_options]\nalpn = []\n[metrics]\nport = 1\n";
    let parsed = parse(text, "fly.toml").unwrap();
    let named: Vec<(usize, &str)> = parsed.problems.iter().map(|p| (p.line(), p.key())).collect();
    assert_eq!(
        named,
        [
            (2, "deploy.strategy"),
            (3, "deploy.release_command"),
            (4, "deploy.max_unavailable"),
            (8, "mounts.type"),
            (11, "http_service.tls_options"),
            (13, "metrics"),
        ]
    );
    assert!(parsed.problems.iter().all(|p| matches!(p, ConfigProblem::NotHonoured { .. })));
}

#[test]
fn a_file_as_fly_launch_writes_it_is_deployed_as_it_is() {
    let text = "app = \"web\"\nprimary_region = \"fra\"\n[http_service]\ninternal_port = 3000\nforce_https = true\n\
                auto_stop_machines = \"stop\"\nauto_start_machines = true\nmin_machines_running = 0\nprocesses = [\"app\"]\n\
                [[vm]]\nmemory = \"1gb\"\ncpu_kind = \"shared\"\ncpus = 1\n";
    let config = warned(text, &[]);
    assert_eq!(config.http_service.unwrap().auto_stop_machines, AutoStop::Stop);
    let suspend = warned(&text.replace("\"stop\"", "\"suspend\""), &[]);
    assert_eq!(suspend.services_for("app")[0].autostop, AutoStop::Suspend);
    warned(&text.replace("\"stop\"", "\"off\""), &[]);
    let more = "[http_service]\nmin_machines_running = 1\n[http_service.concurrency]\ntype = \"connections\"\n";
    warned(
        more,
        &[
            "line 4: http_service.concurrency.type has no effect yet: limits count requests that are under way",
        ],
    );
    warned("[http_service.concurrency]\ntype = \"requests\"\n", &[]);
}

#[test]
fn a_primary_region_may_be_an_order_of_regions() {
    let read = |text: &str| good(&format!("primary_region = \"{text}\"\n")).primary_region.unwrap();
    assert_eq!(read("fra").as_str(), "fra");
    assert_eq!(read("fra, ams,eu").as_str(), "fra,ams,eu");
    let legal = "name regions, the preferred one first, for example fra or fra,ams,eu: codes of 1 to 16 lower-case letters, digits and \
                 dashes, or apac, eu, na, sa, us, usa and any for all that are there";
    let wrong = |value: &str, why: &str| refused(&format!("app = \"web\"\nprimary_region = {value}\n"), &format!("dunlin.toml:2:18: primary_region{why}"));
    wrong("\"fra,,ams\"", &format!(": \"fra,,ams\" has a comma with no region before or after it; {legal}"));
    wrong("\"fra ams\"", &format!(": \"fra ams\" has \"fra ams\", which cannot be a region; {legal}"));
    wrong("\"fra,ams,fra\"", &format!(": \"fra,ams,fra\" names fra twice; {legal}"));
    wrong("[\"fra\", \"ams\"]", " must be regions, the preferred one first, like \"fra\" or \"fra,ams,eu\", found a list");
}

#[test]
fn checks_speak_tls_and_run_commands() {
    let text = "[http_service]\n[[http_service.checks]]\nprotocol = \"https\"\ntls_server_name = \"web.internal\"\n\
                [checks.a]\ntype = \"http\"\nport = 9000\nprotocol = \"https\"\ntls_skip_verify = true\n\
                [checks.b]\ntype = \"script\"\ncommand = \"test -f '/tmp/a b'\"\n[checks.c]\ntype = \"script\"\ncommand = [\"true\"]\n";
    let config = good(text);
    let tls = |check: &crate::Check| match &check.kind {
        CheckKind::Http { https, tls_server_name, tls_skip_verify, .. } => Some((*https, tls_server_name.clone(), *tls_skip_verify)),
        _ => None,
    };
    let checks = config.checks_for("app");
    let names: Vec<_> = checks.iter().map(|check| (check.name.as_str(), check.port)).collect();
    assert_eq!(names, [("servicecheck-00-http-8080", 8080), ("a", 9000), ("b", 0), ("c", 0)]);
    assert_eq!(tls(&checks[0]), Some((true, Some("web.internal".into()), false)));
    assert_eq!(tls(&checks[1]), Some((true, None, true)));
    assert_eq!(checks[2].kind, CheckKind::Script { command: ["test", "-f", "/tmp/a b"].map(str::to_owned).to_vec() });
    assert_eq!(checks[3].kind, CheckKind::Script { command: vec!["true".into()] });
    assert_eq!(good(&render(&config)), config, "{}", render(&config));
    refused("[checks.a]\ntype = \"script\"\n", "dunlin.toml:1:9: checks.a.command is missing");
    refused("[checks.a]\ntype = \"script\"\ncommand = []\n", "dunlin.toml:3:11: checks.a.command must be a command, as one text or a list of its words, found a list");
    let many: String = (0..9).map(|n| format!("[checks.c{n}]\ntype = \"script\"\ncommand = \"true\"\n")).collect();
    assert!(parse(&many, "f").unwrap_err().to_string().contains("checks.c8: at most 8 checks are scripts"));
}

#[test]
fn mistakes_have_a_place_and_an_expectation() {
    refused("[http_service]\ninternal_port = \"x\"\n", "dunlin.toml:2:17: http_service.internal_port must be a port from 1 to 65535, found the text \"x\"");
    refused("[http_service]\ninternal_port = 70000\n", "dunlin.toml:2:17: http_service.internal_port must be a port from 1 to 65535, found the number 70000");
    refused("app = \"Hello\"\n", "dunlin.toml:1:7: app: app name \"Hello\" is not valid: use 1 to 63 lower-case letters, digits and dashes, not beginning or ending with a dash");
    refused("kill_signal = \"SIGFOO\"\n", "dunlin.toml:1:15: kill_signal must be one of SIGINT, SIGTERM, SIGQUIT, SIGUSR1, SIGUSR2, SIGKILL, SIGSTOP, found the text \"SIGFOO\"");
    refused("kill_timeout = 301\n", "dunlin.toml:1:16: kill_timeout must be seconds or a duration like \"30s\", at most 300 seconds, found the number 301");
    refused("env = 3\n", "dunlin.toml:1:1: env must be a table, found the number 3");
    refused("[env]\nFLY_APP = \"x\"\n", "dunlin.toml:2:1: env.FLY_APP: names that begin with FLY_ are set by the platform");
    refused("[processes]\nweb = \"a 'b\"\n", "dunlin.toml:2:1: processes.web: not a command: a quote is not closed");
    refused("[[vm]]\nsize = \"huge\"\nmemory = \"1pb\"\n", "dunlin.toml:2:8: vm[0].size must be one of shared-cpu-1x, shared-cpu-2x, shared-cpu-4x, shared-cpu-8x, performance-1x, performance-2x, performance-4x, performance-8x, performance-16x, found the text \"huge\"\ndunlin.toml:3:10: vm[0].memory must be MB or a size like \"1gb\", from 32 MB to 1048576 MB, found the text \"1pb\"");
    refused("[http_service]\nprocesses = [\"web\"]\n", "dunlin.toml:2:13: http_service.processes names the process group \"web\", which does not exist: without [processes] there is only \"app\"");
    refused("[build]\ndockerfile = \"../x\"\n", "dunlin.toml:2:14: build.dockerfile: the path must stay inside the app's directory");
    refused("[checks.a]\ntype = \"tcp\"\n", "dunlin.toml:1:9: checks.a.port is missing");
    refused("[checks.servicecheck-1]\ntype = \"tcp\"\nport = 1\n", "dunlin.toml:1:9: checks.servicecheck-1: a check's name has 1 to 63 letters, digits, - and _, and does not begin like that of a service's check");
    refused("[http_service.concurrency]\nsoft_limit = 5\nhard_limit = 2\n", "dunlin.toml:2:14: http_service.concurrency.soft_limit is 5, more than hard_limit, which is 2");
}

#[test]
fn broken_toml_has_a_place() {
    let error = parse("app = \"x\"\n[env\n", "fly.toml").unwrap_err();
    assert_eq!((error.mistakes[0].line, error.file.as_str()), (2, "fly.toml"));
    assert!(error.mistakes[0].message.starts_with("not valid TOML: "), "{error}");
}

#[test]
fn hostile_files_are_refused_or_bounded() {
    let long = "#".repeat(MAX_FILE_BYTES + 1);
    assert!(parse(&long, "f").unwrap_err().to_string().contains("at most 262144"));
    assert!(parse(&format!("a = {}{}", "[".repeat(50_000), "]".repeat(50_000)), "f").is_err());
    let many: String = (0..2000).map(|i| format!("key{i} = 1\n")).collect();
    assert_eq!(parse(&many, "f").unwrap().problems.len(), 50);
    let many: String = (0..2000).map(|i| format!("K{i} = \"1\"\n")).collect();
    assert!(parse(&format!("[env]\n{many}"), "f").unwrap_err().to_string().contains("more than 512 entries"));
}

#[test]
fn rendered_files_read_back() {
    for text in [FULL, "", "[[services]]\ninternal_port = 5\n[[services.ports]]\nport = 80\nhandlers = [\"http\"]\nforce_https = true\n[[services.ports]]\nport = 443\nhandlers = [\"tls\", \"http\"]\n[[services.http_checks]]\npath = \"/x\"\nprotocol = \"https\"\ntls_skip_verify = true\n"] {
        let config = good(text);
        assert_eq!(good(&render(&config)), config, "{}", render(&config));
    }
}

#[test]
fn the_default_file_is_readable() {
    let config = AppConfig::default_for("hello".parse().unwrap(), 8080, 256);
    let expected = "\
# How this app is built, run and reached. `dunlin config validate` checks this file.
# Keys are those of fly.toml; what is left out has Fly's default.

app = \"hello\"

# What the edge serves as HTTP and HTTPS.
[http_service]
internal_port = 8080 # the port that the app listens on, on 0.0.0.0
force_https = false # redirect plain HTTP to HTTPS
auto_stop_machines = \"off\"
auto_start_machines = true # a request starts a machine that is stopped
min_machines_running = 0

# The size of the machines.
[[vm]]
size = \"shared-cpu-1x\"
memory = \"256mb\"
";
    assert_eq!(render(&config), expected);
    assert_eq!(good(expected), config);
}

#[test]
fn machines_have_the_volume_of_their_group() {
    let text = "[processes]\napp = \"run\"\ndb = \"postgres\"\nworker = \"work\"\n\
                [[mounts]]\nsource = \"files\"\ndestination = \"/files\"\n\
                [[mounts]]\nsource = \"pg\"\ndestination = \"/var/lib/pg\"\ninitial_size = \"1536mb\"\nsnapshot_retention = 9\nscheduled_snapshots = false\nencrypted = true\nauto_extend_size_threshold = 80\nauto_extend_size_increment = \"1GB\"\nauto_extend_size_limit = 5\nprocesses = [\"db\"]\n";
    let config = good(text);
    let mount = |group| config.mount_for(group).map(|mount| mount.source.as_str());
    assert_eq!([mount("app"), mount("db"), mount("worker")], [Some("files"), Some("pg"), None]);
    assert_eq!(config.mount_for("db").unwrap().initial_size_gb, Some(2), "rounded up");
    assert_eq!(["app", "db"].map(|group| config.mount_for(group).unwrap().encrypted), [None, Some(true)]);
    assert_eq!(good(&render(&config)), config);
    assert_eq!(config.validate(), Ok(()));
    let twice = text.replace("processes = [\"db\"]", "processes = [\"app\", \"db\"]");
    let said = parse(&twice, "f").unwrap_err().to_string();
    assert!(said.contains("the machines of app can have one volume each, not files and pg"), "{said}");
    refused("[mounts]\nsource = \"data\"\ndestination = \"/\"\n", "dunlin.toml:3:15: mounts.destination: a volume cannot be the machine's root; give it a directory of its own, for example /data");
    refused("[mounts]\nsource = \"data\"\n", "dunlin.toml:1:2: mounts.source and mounts.destination are needed");
}

#[test]
fn files_that_no_machine_can_have_are_refused() {
    let file = |keys: &str| format!("[[files]]\n{keys}\n");
    refused(&file("guest_path = \"/a\""), "dunlin.toml:1:1: files[0] needs exactly one of local_path, raw_value and secret_name");
    refused(
        &file("guest_path = \"/proc/a\"\nraw_value = \"aGk=\""),
        "dunlin.toml:1:1: [[files]]: guest_path is in /proc, which the platform makes at every start",
    );
    refused(&file("guest_path = \"/a\"\nraw_value = \"?\""), "dunlin.toml:1:1: [[files]]: raw_value is not base64");
    let config = good(&file("guest_path = \"/a\"\nlocal_path = \"conf/a\""));
    assert_eq!(config.files[0].local_path.as_deref(), Some("conf/a"));
    let said = config.validate().unwrap_err().to_string();
    assert!(said.contains("read by the client"), "{said}");
}

#[test]
fn a_release_row_keeps_the_config() {
    let config = good(FULL);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<AppConfig>(&json).unwrap(), config);
    assert_eq!(serde_json::from_str::<AppConfig>("{}").unwrap(), AppConfig::default());
}

#[test]
fn text_that_broke_a_parser_before_is_refused() {
    assert!(parse("==]\n.=", "f").is_err());
}

proptest! {
    #[test]
    fn any_text_is_survived(text in "([a-z_]{1,8}|\\[|\\]|=|\"|\n|\\.|[0-9]|\\PC){0,120}") {
        let _ = parse(&text, "f");
    }

    #[test]
    fn any_value_in_any_place_is_survived(
        key in prop::sample::select(vec!["app", "primary_region", "env", "env.A", "build", "build.args", "http_service", "http_service.checks",
            "http_service.concurrency", "services", "checks", "checks.a", "vm", "restart", "files", "swap_size_mb", "console_command", "mounts", "mounts.initial_size", "processes", "processes.a", "deploy.strategy", "kill_timeout"]),
        value in prop::sample::select(vec!["1", "-1", "1.5", "nan", "true", "\"x\"", "\"x, y\"", "\"\"", "[]", "[1]", "{}", "[{}]", "{a={}}", "[[1]]", "1979-05-27", "9223372036854775807"]),
    ) {
        if let Ok(parsed) = parse(&format!("{key} = {value}\n"), "f") {
            let again = parse(&render(&parsed.config), "f").unwrap();
            prop_assert_eq!(parsed.config.validate(), Ok(()));
            prop_assert_eq!(again.config, parsed.config);
        }
    }
}

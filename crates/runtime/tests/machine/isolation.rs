//! What a machine cannot do and does not see.

use crate::setup::*;
use dunlin_runtime::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

#[test]
fn the_kernel_says_no_to_what_escapes_are_made_of() {
    let world = World::new();
    let machine = world.run(world.spec("aa09", "sleep 1000"));
    for script in [
        "mount -t tmpfs x /tmp", "unshare -m true", "unshare -U true", "busybox mknod /tmp/x c 1 3 && cat /tmp/x",
        "echo 1 > /proc/sys/kernel/panic", "echo b > /proc/sysrq-trigger", "echo x > /sys/kernel/uevent_helper",
        "busybox chroot / true", "busybox reboot -f", "busybox hostname changed", "busybox nsenter -t 1 -m true",
        "cat /proc/1/root/etc/shadow", "cat /proc/1/environ", "ls /proc/1/fd", "busybox losetup /dev/loop0 /bin/busybox", "echo 0 > /proc/1/oom_score_adj",
    ] {
        assert_ne!(machine.exec(script).1, 0, "{script}: {:?}", machine.exec(script));
    }
    // Some kernels have not all of them.
    for path in ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts"] {
        let bytes = machine.exec(&format!("cat {path} 2>/dev/null | busybox head -c 1 | busybox wc -c")).0;
        assert_eq!(bytes, "0", "{path}");
    }
    // The host's files are nowhere.
    let (listing, _) = machine.exec("busybox find / -xdev -name 'Cargo.toml'");
    assert_eq!(listing, "");
    let (processes, _) = machine.exec("busybox ps");
    let pids: Vec<&str> = processes.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(pids[0], "1", "{processes}");
    assert_eq!(pids.len(), 3, "the first process, the program and ps, none of the host's: {processes}");
}

#[test]
fn files_belong_to_the_machines_own_ids_and_the_image_stays_as_it_is() {
    use std::os::unix::fs::MetadataExt;
    let world = World::new();
    let mut spec = world.spec("aa10", "echo changed > /etc/new; echo x >> /etc/passwd; busybox stat -c %u /bin/busybox; sleep 1000");
    spec.process.user = String::new();
    let machine = world.run(spec);
    until("printed", || (!machine.log().is_empty()).then_some(()));
    assert_eq!(machine.log(), ["0"], "the image's root is the machine's root");
    let pid = machine.client().status().unwrap().init_pid;
    assert_eq!(fs::metadata(format!("/proc/{pid}/root/etc/new")).unwrap().uid(), UID_BASE);
    let image = fs::read_to_string(world.dir.path().join("layer/etc/passwd")).unwrap();
    assert!(!image.contains("\nx\n"));
    assert_eq!(fs::metadata(format!("/proc/{pid}/stat")).map(|m| m.uid()).unwrap_or(0), 0, "not dumpable");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(world.dir.path().to_str().unwrap()), "no mount is visible on the host");
}

#[test]
fn a_machine_cannot_make_itself_as_dear_as_its_supervisor() {
    // What the server and its supervisors give themselves, where the host lets them.
    if fs::write("/proc/self/oom_score_adj", "-900").is_err() {
        eprintln!("not tested: CAP_SYS_RESOURCE is missing here");
        return;
    }
    let world = World::new();
    let dear = "echo -900 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj";
    let machine = world.run(world.spec("aa25", &format!("{dear}; sleep 1000")));
    until("printed", || (machine.log().last().map(String::as_str) == Some("0")).then_some(()));
    assert!(machine.exec(dear).0.ends_with("\n0"), "{:?}", machine.exec(dear));
    fs::write("/proc/self/oom_score_adj", "0").unwrap();
}

#[test]
fn a_pipe_in_place_of_an_account_file_hangs_nobody() {
    let world = World::new();
    let passwd = world.dir.path().join("layer/etc/passwd");
    fs::remove_file(&passwd).unwrap();
    nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let machine = world.run(world.spec("aa24", "sleep 1000"));
    assert_eq!(machine.exec("echo alive"), ("alive".into(), 0));
}

#[test]
fn an_unprivileged_user_has_no_capabilities() {
    let world = World::new();
    let mut spec = world.spec("aa11", "id -u; busybox grep CapEff /proc/self/status; echo $HOME");
    spec.process.user = "app".into();
    let machine = world.run(spec);
    machine.exit();
    assert_eq!(machine.log(), ["1000", "CapEff:\t0000000000000000", "/home/app"]);
}

#[test]
fn secrets_are_neither_on_disk_nor_on_a_command_line() {
    let world = World::new();
    let machine = world.run(world.spec("aa16", "sleep 1000"));
    assert_eq!(machine.exec("echo $CANARY").0, "very-secret");
    assert_no_secret_below(world.dir.path());
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!contains(&command, b"very-secret"));
    }
}

#[test]
fn files_are_in_memory_and_links_of_the_image_lead_nowhere() {
    let world = World::new();
    let (layer, outside) = (world.dir.path().join("layer"), world.dir.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::write(world.dir.path().join("bound"), "from the host").unwrap();
    symlink(&outside, layer.join("absolute")).unwrap();
    symlink("../../../../../../../../../..".to_owned() + outside.to_str().unwrap(), layer.join("relative")).unwrap();
    let file = |path: &str| GuestFile::in_memory(path.into(), b"very-secret".to_vec());
    let bind = |target: &str, readonly| Bind { source: world.dir.path().join("bound"), target: target.into(), readonly };
    let mut spec = world.spec("aa21", "sleep 1000");
    spec.process.env.clear();
    spec.process.user = "app".into();
    spec.files = vec![file("/run/secrets/one"), file("/absolute/two"), file("/etc/passwd.extra")];
    spec.binds = vec![bind("/relative/three", true), bind("/data/deep/four", true)];
    // Inside the image the links lead nowhere yet: refused, and the host's directory is not touched.
    let error = spawn(&world.exe, &spec).unwrap_err().to_string();
    assert!(error.contains("/relative/three"), "{error}");
    drop(Running { world: &world, spec: spec.clone() });
    // Now they do: the path of the host's directory means a directory of the image.
    fs::create_dir_all(layer.join(outside.strip_prefix("/").unwrap())).unwrap();
    let machine = world.run(spec);
    assert_eq!(machine.exec("cat /run/secrets/one /absolute/two /etc/passwd.extra").0, "very-secret".repeat(3));
    assert_nothing_is_swapped(&machine);
    assert_eq!(machine.exec("cat /relative/three /data/deep/four").0, "from the host".repeat(2));
    assert_ne!(machine.exec("echo x > /data/deep/four").1, 0);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "the host's directory is untouched");
    assert_no_secret_below(world.dir.path());
}

/// Neither what the supervisor knows nor the files of secrets reach the host's swap.
fn assert_nothing_is_swapped(machine: &Running<'_>) {
    let mounts = machine.exec("cat /proc/mounts").0;
    let file = mounts.lines().find(|line| line.contains(" /run/secrets/one ")).unwrap();
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let version: Vec<u32> = release.split('.').take(2).filter_map(|part| part.parse().ok()).collect();
    assert!(file.contains("noswap") || version < vec![6, 4], "{file}");
    let supervisor = lock_holder(&machine.spec.machine_dir).unwrap().unwrap();
    let status = fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
    let number = |key: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(number("VmLck:") >= number("RssAnon:") && number("VmSwap:") == 0, "{status}");
    let group = fs::read_to_string(format!("/proc/{supervisor}/cgroup")).unwrap();
    let of = |controller: &str| group.lines().find_map(|line| line.split_once(controller)).map(|(_, path)| path.trim_start_matches(':').to_owned());
    let swap = match of(":memory") {
        Some(path) => format!("/sys/fs/cgroup/memory{path}/memory.swappiness"),
        None => format!("/sys/fs/cgroup{}/memory.swap.max", of("0:").unwrap()),
    };
    if Path::new(&swap).exists() {
        assert_eq!(fs::read_to_string(&swap).unwrap().trim(), "0", "{swap}");
    }
}

/// What an image has at a place of a directory is not put aside: it may be what its program looks for.
#[test]
fn a_file_of_the_image_where_a_directory_is_mounted_is_named() {
    let world = World::new();
    let (layer, api) = (world.dir.path().join("layer"), world.dir.path().join("api"));
    fs::create_dir(&api).unwrap();
    let mount = |target: &str| SupervisorSpec {
        binds: vec![Bind { source: api.clone(), target: target.into(), readonly: true }],
        ..world.spec("aa2f", "exec sleep 1000")
    };
    fs::write(layer.join(".fly"), "a file").unwrap();
    for target in ["/.fly", "/.fly/deep", "/etc/passwd"] {
        let spec = mount(target);
        let error = spawn(&world.exe, &spec).unwrap_err().to_string();
        let named = if target.starts_with("/.fly") { "/.fly" } else { target };
        assert!(error.contains(&format!("something else than a directory at {named}; take it out of the image")), "{error}");
        drop(Running { world: &world, spec });
    }
    fs::remove_file(layer.join(".fly")).unwrap();
    symlink("/tmp", layer.join(".fly")).unwrap();
    let machine = world.run(mount("/.fly"));
    assert_eq!(machine.exec("cat /proc/mounts").0.lines().filter(|line| line.contains(" /tmp ")).count(), 1, "links are followed inside");
}

#[test]
fn files_are_the_machines_own_and_lead_nowhere_else() {
    let world = World::new();
    let layer = world.dir.path().join("layer");
    let outside = world.dir.path().join("outside");
    fs::write(&outside, "the host's").unwrap();
    symlink(&outside, layer.join("etc/escape")).unwrap();
    symlink("../../../../../../etc/linked", layer.join("etc/link")).unwrap();
    fs::write(layer.join("etc/linked"), "").unwrap();
    fs::write(layer.join("etc/kept"), "the image's, and longer than what comes").unwrap();
    let file = |path: &str, mode| GuestFile { path: path.into(), content: b"written".to_vec(), mode, on_disk: true };
    let mut spec = world.spec("aa22", "sleep 1000");
    spec.files = vec![file("/etc/kept", 0o640), file("/a/b/c", 0o600), file("/etc/link", 0o644)];
    spec.files.push(GuestFile { on_disk: false, content: b"very-secret".to_vec(), ..file("/a/b/key", 0o400) });
    let machine = world.run(spec.clone());
    assert_eq!(machine.exec("cat /etc/kept /a/b/c /etc/linked").0, "written".repeat(3));
    let (said, _) = machine.exec("busybox stat -c '%a %u' /etc/kept /a/b/c /a/b/key");
    assert_eq!(said, "640 0\n600 0\n400 0");
    assert_eq!(machine.exec("echo more >> /etc/kept && cat /etc/kept").0, "writtenmore");
    assert_eq!(machine.exec("cat /a/b/key").0, "very-secret");
    assert_ne!(machine.exec("echo x >> /a/b/key").1, 0, "it is read-only");
    assert_no_secret_below(&world.dir.path().join("machines"));
    drop(machine);
    assert_eq!(fs::read_to_string(layer.join("etc/kept")).unwrap(), "the image's, and longer than what comes");
    // A link whose place is missing in the machine, and links to what is not the machine's own file system.
    for (path, id) in [("/etc/escape", "aa23"), ("/etc/proc", "aa24"), ("/etc/fd", "aa25"), ("/etc/pipe", "aa26")] {
        let _ = symlink("/proc/self/oom_score_adj", layer.join("etc/proc"));
        let _ = symlink("/proc/self/fd/3", layer.join("etc/fd"));
        let _ = nix::unistd::mkfifo(&layer.join("etc/pipe"), nix::sys::stat::Mode::S_IRWXU);
        for on_disk in [true, false] {
            let mut spec = world.spec(id, "sleep 1000");
            spec.files = vec![GuestFile { on_disk, ..file(path, 0o644) }];
            match spawn(&world.exe, &spec) {
                Err(error) => assert!(error.to_string().contains(path), "{error}"),
                // A secret may cover whatever the image has there.
                Ok(()) => assert!(path == "/etc/pipe" && !on_disk, "{path}"),
            }
            drop(Running { world: &world, spec });
        }
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "the host's");
}

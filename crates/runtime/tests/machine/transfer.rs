//! Files into a machine and out of it.

use crate::setup::*;
use dunlin_model::transfer::{self, Entry, Kind, LENGTH_BYTES, Next, Transfer};
use dunlin_runtime::{ExecHandle, ExecSpec};
use std::io::{PipeReader, PipeWriter, Read, Write};

/// Standard input, output and error of a copy.
fn copy(machine: &Running<'_>, transfer: Transfer) -> (ExecHandle, PipeWriter, PipeReader, PipeReader) {
    let pipe = || std::io::pipe().unwrap();
    let ((stdin, to), (from, stdout), (errors, stderr)) = (pipe(), pipe(), pipe());
    let exec = ExecSpec { transfer: Some(transfer), ..Default::default() };
    let session = machine.client().exec(exec, [stdin.into(), stdout.into(), stderr.into()]).unwrap();
    (session, to, from, errors)
}

fn put(machine: &Running<'_>, path: &str, entries: &[(Entry, &[u8])], end: &[u8]) -> (i32, String) {
    let (session, mut to, _, mut errors) = copy(machine, Transfer::Put { path: path.into() });
    for (entry, content) in entries {
        let _ = to.write_all(&transfer::encode(entry).unwrap()); // it may have given up
        let _ = to.write_all(content);
    }
    let _ = to.write_all(end);
    drop(to);
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    (session.wait(PATIENCE).unwrap().expect("ended"), said)
}

fn get(machine: &Running<'_>, path: &str) -> Result<Vec<(Entry, Vec<u8>)>, String> {
    let (session, to, mut from, mut errors) = copy(machine, Transfer::Get { path: path.into() });
    drop(to);
    let mut entries = Vec::new();
    let mut length = [0; LENGTH_BYTES];
    while from.read_exact(&mut length).is_ok()
        && let Next::Header(length) = transfer::length(length).unwrap()
    {
        let mut header = vec![0; length];
        from.read_exact(&mut header).unwrap();
        let entry = transfer::decode(&header).unwrap();
        let mut content = vec![0; entry.size as usize];
        from.read_exact(&mut content).unwrap();
        entries.push((entry, content));
    }
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    match session.wait(PATIENCE).unwrap() {
        Some(0) => Ok(entries),
        code => Err(format!("{code:?} {said}")),
    }
}

fn entry(path: &str, kind: Kind, size: usize, target: &str) -> Entry {
    Entry { path: path.into(), kind, mode: 0o750, size: size as u64, target: target.into() }
}

#[test]
fn files_come_and_go_as_the_machines_root() {
    let world = World::new();
    let everybodys = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(world.dir.path().join("layer/tmp"), everybodys).unwrap();
    let mut spec = world.spec("aa31", "sleep 1000");
    spec.process.user = "app".into();
    let machine = world.run(spec);
    let check = |script: &str, expected: &str| assert_eq!(machine.exec(script).0, expected, "{script}");
    let big = b"0123456789abcdef".repeat(100_000);
    let sent = [(entry("x", Kind::File, big.len(), ""), big.as_slice())];
    assert_eq!(put(&machine, "/home/app/new", &sent, &transfer::END), (0, String::new()));
    check("busybox stat -c '%u %a %s' /home/app/new", "0 750 1600000");
    // One that replaces another keeps its owner and mode; a link is followed, inside the machine.
    machine.exec("echo old > /tmp/old; busybox chmod 640 /tmp/old; busybox ln -s /tmp/old /tmp/link");
    let sent = [(entry("x", Kind::File, 3, ""), b"new".as_slice())];
    assert_eq!(put(&machine, "/tmp/link", &sent, &transfer::END).0, 0);
    check("cat /tmp/old; busybox stat -c ' %u %a' /tmp/old; busybox readlink /tmp/link", "new 1000 640\n/tmp/old");
    // A tree lands below a directory that is there.
    let tree = [
        (entry("tree", Kind::Directory, 0, ""), b"".as_slice()),
        (entry("tree/sub", Kind::Directory, 0, ""), b"".as_slice()),
        (entry("tree/sub/a", Kind::File, 1, ""), b"A".as_slice()),
        (entry("tree/out", Kind::Link, 0, "/etc/passwd"), b"".as_slice()),
    ];
    assert_eq!(put(&machine, "/tmp", &tree, &transfer::END).0, 0);
    let mut back = get(&machine, "/tmp/tree").unwrap();
    back.sort_by(|one, other| one.0.path.cmp(&other.0.path));
    let paths: Vec<_> = back.iter().map(|(entry, content)| (entry.path.as_str(), entry.kind, content.as_slice())).collect();
    assert_eq!(
        paths,
        [
            ("tree", Kind::Directory, b"".as_slice()),
            ("tree/out", Kind::Link, b""),
            ("tree/sub", Kind::Directory, b""),
            ("tree/sub/a", Kind::File, b"A"),
        ]
    );
    assert_eq!(get(&machine, "/home/app/new").unwrap()[0].1, big);
    assert!(get(&machine, "/proc/version").unwrap()[0].1.starts_with(b"Linux"));
    // The machine's root, not the host's.
    assert_eq!(get(&machine, "/etc/passwd").unwrap()[0].1, std::fs::read(world.dir.path().join("layer/etc/passwd")).unwrap());
    for (path, says) in [("/nowhere", "No such file"), ("/dev/null", "device"), ("/proc/1/environ", "denied")] {
        let error = get(&machine, path).unwrap_err();
        assert!(error.contains(says), "{path}: {error}");
    }
    let refused = put(&machine, "/no/such/file", &sent, &transfer::END);
    assert!(refused.0 == 1 && refused.1.contains("/no/such/file: No such file"), "{refused:?}");
}

#[test]
fn a_copy_that_is_cut_off_leaves_nothing() {
    let world = World::new();
    let machine = world.run(world.spec("aa32", "sleep 1000"));
    machine.exec("echo old > /tmp/target");
    let half = [(entry("target", Kind::File, 1000, ""), b"half".as_slice())];
    let (code, said) = put(&machine, "/tmp/target", &half, b"");
    assert!(code == 1 && said.contains("cut off"), "{code} {said}");
    // Nobody is there any more, all of a sudden.
    let (session, mut to, _from, _errors) = copy(&machine, Transfer::Put { path: "/tmp/target".into() });
    to.write_all(&transfer::encode(&half[0].0).unwrap()).unwrap();
    to.write_all(b"half").unwrap();
    let copies = || machine.exec("busybox cat /proc/*/comm").0.contains("dunlin-files");
    until("it copies", || copies().then_some(()));
    drop(session);
    until("it is gone", || (!copies()).then_some(()));
    // Where overlayfs has no files without a name (Linux 6.1), a kill leaves one that has.
    let unnamed = "ls -A /tmp | busybox grep -v '^\\.target\\.dunlin-'";
    let left = if is_older_than(6, 6) { unnamed } else { "ls -A /tmp" };
    assert_eq!(machine.exec(&format!("cat /tmp/target; {left}")).0, "old\ntarget");
}

fn is_older_than(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).take(2).map(|number| number.parse().unwrap()).collect();
    (numbers[0], numbers[1]) < (major, minor)
}

/// Memory and open files of a copy are the supervisor's: the machine's root sees neither.
#[test]
fn nobody_looks_into_a_copy() {
    let world = World::new();
    let machine = world.run(world.spec("aa33", "sleep 1000"));
    let (session, to, _from, _errors) = copy(&machine, Transfer::Put { path: "/tmp/x".into() });
    let find = "for p in /proc/[0-9]*; do busybox grep -q dunlin-files $p/comm && echo $p; done";
    let at = until("it copies", || Some(machine.exec(find).0).filter(|at| !at.is_empty()));
    for what in ["environ", "mem", "maps"] {
        let (said, code) = machine.exec(&format!("busybox head -c 1 {at}/{what}"));
        assert!(code != 0 && said.contains("denied"), "{what}: {said}");
    }
    for what in ["exe", "fd/0", "root"] {
        assert_ne!(machine.exec(&format!("busybox readlink {at}/{what}")).1, 0, "{what}");
    }
    let limits = machine.exec(&format!("busybox grep -E 'Seccomp:|NoNewPrivs|CapEff' {at}/status")).0;
    assert_eq!(limits, "CapEff:\t00000000000004fb\nNoNewPrivs:\t1\nSeccomp:\t2");
    drop((session, to));
}

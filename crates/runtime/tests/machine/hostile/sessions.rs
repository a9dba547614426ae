//! What leads out of a command beside the program: descriptors, its directory, its binary.

use super::*;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

fn run(machine: &Running<'_>, exec: ExecSpec) -> std::result::Result<(String, i32), String> {
    use std::io::Read;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let null = fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let both = writer.try_clone().unwrap();
    let session = machine.client().exec(exec, [null.into(), writer.into(), both.into()]).map_err(|e| e.to_string())?;
    let mut output = String::new();
    reader.read_to_string(&mut output).unwrap();
    Ok((output.trim().to_owned(), session.wait(PATIENCE).unwrap().expect("ended")))
}

#[test]
fn programs_have_no_descriptors_but_their_own() {
    let world = World::new();
    let mut spec = python_spec(&world, "ab10");
    let list = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))";
    spec.process.command = [PYTHON, "-c", &format!("{list}; import time; time.sleep(1000)")].map(str::to_owned).into();
    spec.process.env.push(("PYTHONUNBUFFERED".into(), "1".into()));
    let machine = world.run(spec);
    // The fourth is the list's own.
    until("printed", || (!machine.log().is_empty()).then_some(()));
    assert_eq!(machine.log(), ["[0, 1, 2, 3]"]);
    assert_eq!(machine.exec(&format!("{PYTHON} -c \"{list}\"")).0, "[0, 1, 2, 3]");
}

/// The supervisor has directories and files of the host open when it forks what becomes the command: a working
/// directory, or a program, that names them by number must find none of them.
#[test]
fn a_command_cannot_begin_at_a_descriptor_of_the_supervisor() {
    let world = World::new();
    let machine = world.run(python_spec(&world, "ab11"));
    // As open as a directory of the host can be.
    fs::set_permissions(machine.dir().join("exit"), fs::Permissions::from_mode(0o777)).unwrap();
    let inside = machine.exec("busybox stat -c %d /").0;
    let mut begun = 0;
    for number in 3..64 {
        let path = format!("/proc/self/fd/{number}");
        // By the number, and by a link that the tenant put in place of a directory of his.
        machine.exec(&format!("busybox rm -rf /at; busybox ln -s {path} /at"));
        for dir in [path.clone(), "/at".to_owned()] {
            let command = ["busybox", "stat", "-c", "%d %i", "."].map(str::to_owned).into();
            if let Ok((seen, _)) = run(&machine, ExecSpec { command, working_dir: dir.clone(), ..Default::default() }) {
                begun += 1;
                assert!(seen.starts_with(&format!("{inside} ")), "{dir} leads to {seen} of the host");
            }
        }
        let started = run(&machine, ExecSpec { command: vec![path.clone(), "x".into()], ..Default::default() });
        assert!(started.is_err(), "{path} was run: {started:?}");
    }
    assert_eq!(begun, 0, "there is nothing at these numbers");
    let command = ["busybox", "pwd"].map(str::to_owned).into();
    let here = run(&machine, ExecSpec { command, working_dir: "/home/app".into(), ..Default::default() });
    assert_eq!(here, Ok(("/home/app".into(), 0)));
}

/// Holds a running program's binary, ends the program, and writes to the binary as soon as the kernel lets it.
const OVERWRITE: &str = r#"
import errno, os, signal, sys, time
pid = next(int(n) for n in os.listdir("/proc") if n.isdigit() and sys.argv[1].encode() in open(f"/proc/{n}/cmdline", "rb").read().split(b"\0"))
patience = time.time() + 5
held = os.open(f"/proc/{pid}/exe", os.O_PATH)
os.kill(pid, signal.SIGKILL)
while True:
    try:
        os.write(os.open(f"/proc/self/fd/{held}", os.O_WRONLY), b"overwritten")
        print("done")
    except OSError as error:
        if error.errno == errno.ETXTBSY and time.time() < patience:
            time.sleep(0.01)
            continue
        print(errno.errorcode[error.errno])
    break
"#;

/// A script whose interpreter is `/proc/self/exe` runs the supervisor's own binary inside: whoever gets hold of it there
/// must not change it for the machines that start later.
#[test]
fn the_supervisors_binary_cannot_be_written_to() {
    let world = World::new();
    let spec = python_spec(&world, "ab12");
    fs::write(world.dir.path().join("layer/overwrite.py"), OVERWRITE).unwrap();
    let machine = world.run(spec);
    // The tests' supervisor waits for its standard input when it is told to spawn.
    machine.exec("echo '#!/proc/self/exe spawn' > /bin/evil; busybox chmod 755 /bin/evil; busybox cp /usr/bin/sleep /bin/mine");
    let start = |command: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        let null = || fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
        let exec = ExecSpec { command: command.iter().map(|s| (*s).to_owned()).collect(), ..Default::default() };
        (machine.client().exec(exec, [reader.into(), null(), null()]).unwrap(), writer)
    };
    let overwrite = |argument: &str| machine.exec(&format!("{PYTHON} /overwrite.py {argument}")).0;
    let mine = start(&["/bin/mine", "1001"]);
    assert_eq!(overwrite("1001"), "done", "a binary of the machine's own");
    let evil = start(&["/bin/evil"]);
    // Every supervisor runs it, and what runs is not written to. If none did, it is sealed.
    let refused = overwrite("spawn");
    assert!(["ETXTBSY", "EPERM"].contains(&refused.as_str()), "{refused}");
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    let binary = fs::File::open(format!("/proc/{supervisor}/exe")).unwrap();
    let seals = nix::fcntl::fcntl(&binary, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap();
    let wanted = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    assert_eq!(seals & wanted, wanted, "of descriptor {}", binary.as_raw_fd());
    drop((mine, evil));
    let again = world.run(world.spec("ab13", "sleep 1000"));
    assert_eq!(again.exec("echo well").0, "well");
}

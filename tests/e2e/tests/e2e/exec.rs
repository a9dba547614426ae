//! Commands in machines as people run them: terminals, pipes, copies, and hanging up in the middle.

use crate::deploys::two_machines;
use dunlin_e2e::*;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

/// Names and command lines of a machine's processes.
fn running(server: &Server, id: &str) -> String {
    let list = "import os\nfor p in os.listdir('/proc'):\n  if p.isdigit() and int(p) != os.getpid():\n    \
                print(open(f'/proc/{p}/comm').read(), open(f'/proc/{p}/cmdline').read().replace('\\0', ' '))";
    server.ok(&["machine", "exec", id, "--", "python3", "-c", list])
}

fn checksum(path: &Path) -> String {
    let output = Command::new("sha256sum").stdin(fs::File::open(path).unwrap()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// 100 MB that no pattern repeats in.
fn much(path: &Path) {
    let mut random = fs::File::open("/dev/urandom").unwrap().take(100_000_000);
    std::io::copy(&mut random, &mut fs::File::create(path).unwrap()).unwrap();
}

#[test]
fn pipes_are_binary_clean_and_leave_nothing() {
    let server = Server::start();
    two_machines(&server);
    let id = server.machines("web")[0].clone();
    let (sent, came) = (server.dir().join("sent"), server.dir().join("came"));
    much(&sent);
    // Both ways at once, through the same command.
    let both = server
        .cli(server.dir(), &["machine", "exec", &id, "--", "cat"])
        .stdin(fs::File::open(&sent).unwrap())
        .stdout(fs::File::create(&came).unwrap())
        .status();
    assert!(both.unwrap().success());
    assert_eq!(checksum(&sent), checksum(&came));
    // The command's end is the end of the input, and its code ours.
    let early = server
        .cli(server.dir(), &["machine", "exec", &id, "--", "sh", "-c", "head -c 3 > /dev/null; exit 9"])
        .stdin(fs::File::open(&sent).unwrap())
        .status();
    assert_eq!(early.unwrap().code(), Some(9));
    // From elsewhere: through the edge, with a token for just that.
    let token = server.ok(&["tokens", "create", "--verb", "exec", "--app", "web"]).trim().to_owned();
    let elsewhere = |token: &str| {
        let mut command = Command::new(binary());
        let api = format!("https://api.localhost:{}", server.https);
        command.args(["--api", &api, "--ca"]).arg(server.data().join("ca/ca.pem")).env("DUNLIN_TOKEN", token);
        command.args(["machine", "exec", &id, "--app", "web", "--", "cat"]);
        command.stdin(fs::File::open(&sent).unwrap()).stdout(fs::File::create(&came).unwrap());
        command
    };
    assert!(elsewhere(&token).status().unwrap().success());
    assert_eq!(checksum(&sent), checksum(&came));
    let reader = server.ok(&["tokens", "create", "--verb", "read,deploy", "--app", "web"]).trim().to_owned();
    let refused = elsewhere(&reader).stderr(Stdio::piped()).output().unwrap();
    assert!(text(&refused).contains("does not allow exec on app web"), "{}", text(&refused));
    // A signal to us is the command's.
    let trap = "trap 'echo heard; exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let mut told = server.cli(server.dir(), &["machine", "exec", &id, "--", "sh", "-c", trap]);
    let mut told = told.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = told.stdout.take().unwrap();
    output.read_exact(&mut [0; 6]).unwrap();
    kill(told.id(), "INT");
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), told.wait().unwrap().code()), ("heard\n", Some(5)));
    // Killed in the middle, with bytes on their way in both directions.
    let mut cut = server.cli(server.dir(), &["machine", "exec", &id, "--", "sh", "-c", "sleep 4444 & cat; sleep 5555"]);
    let mut cut = cut.stdin(fs::File::open(&sent).unwrap()).stdout(Stdio::piped()).spawn().unwrap();
    // Open until the kill: a closed pipe would end it in another way.
    let mut begun = cut.stdout.take().unwrap();
    begun.read_exact(&mut [0; 100_000]).unwrap();
    assert!(running(&server, &id).contains("sleep 4444"));
    kill(cut.id(), "KILL");
    cut.wait().unwrap();
    server.until("nothing of it runs", || {
        let left = running(&server, &id);
        !left.contains("sleep 4444") && !left.contains("cat")
    });
    for said in ["exec begins", "exec ended", "program=\"cat\"", "by=\"root\""] {
        assert!(server.log().contains(said), "{said}");
    }
}

/// A shell at a real terminal: Python makes one and types.
#[test]
fn a_terminal_behaves_as_one() {
    let server = Server::start();
    two_machines(&server);
    let id = server.machines("web")[0].clone();
    let script = server.dir().join("type.py");
    fs::write(&script, TYPE).unwrap();
    let typed = Command::new("python3")
        .arg(&script)
        .args([binary().to_str().unwrap(), "--data-dir", server.data().to_str().unwrap()])
        .args(["ssh", "console", "--app", "web", "--machine", &id])
        .output()
        .unwrap();
    assert!(typed.status.success(), "{}\n{}", text(&typed), server.log());
    server.until("the hung-up shell and its job are gone", || !running(&server, &id).contains("sleep 333"));
    // Words, not a shell.
    assert_eq!(server.ok(&["ssh", "console", "--app", "web", "--machine", &id, "-C", "printf %s-%s 'a b' c"]), "a b-c");
    let error = server.fails(&["ssh", "console", "--app", "web", "--machine", &id, "-C", "no-such-program"], 1, &["not found in $PATH"]);
    assert!(error.contains("request id"), "{error}");
    assert_eq!(server.ok(&["machine", "exec", &id, "--user", "nobody", "--", "id", "-un"]), "nobody\n");
}

const TYPE: &str = r#"
import fcntl, os, pty, re, select, signal, struct, sys, termios, time

def start():
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "vt100"
        os.execv(sys.argv[1], sys.argv[1:])
    size(fd, 31, 91)
    return pid, fd

def size(fd, rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

def until(fd, wanted, seen="", patience=100):
    deadline = time.monotonic() + patience
    while not re.search(wanted, seen):
        assert time.monotonic() < deadline, f"no {wanted!r} in {seen!r}"
        if select.select([fd], [], [], 0.2)[0]:
            try:
                seen += os.read(fd, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"over, without {wanted!r} in {seen!r}")
    return seen

def say(fd, text):
    os.write(fd, text.encode())

pid, fd = start()
until(fd, r"[#$] ")
# A fresh shell may not have its prompt's settings yet: what is typed is heard in any case.
say(fd, "echo term=$TERM; tty; echo on\"\"e\r")
until(fd, r"term=vt100\s+/dev/pts/\d+\s+one")
size(fd, 44, 122)
for _ in range(1000):
    say(fd, "stty size; echo si\"\"zed\r")
    if "44 122" in until(fd, r"sized"):
        break
else:
    raise AssertionError("it never heard of its new size")
say(fd, "echo beg\"\"ins; sleep 444; echo code=$?\r")
until(fd, r"begins")
say(fd, "\x03") # the shell may be just before the job: then the line is over, without a code
until(fd, r"code=130|\^C")
# A job that was forked in that moment may have missed it: whoever sits there would press it again.
seen = ""
for _ in range(30):
    say(fd, "echo ali\"\"ve; exit 7\r")
    try:
        seen = until(fd, r"alive", seen, patience=3)
        break
    except AssertionError as late:
        say(fd, "\x03")
else:
    raise AssertionError(f"the shell is not alive: {seen!r}")
while True:
    try:
        if not os.read(fd, 4096):
            break
    except OSError:
        break
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status

# Hung up in the middle of a job.
pid, fd = start()
until(fd, r"[#$] ")
before = termios.tcgetattr(fd)
assert not before[3] & termios.ICANON, "raw"
say(fd, "sleep 333 & echo st\"\"arted\r")
until(fd, r"started")
os.kill(pid, signal.SIGTERM)
os.kill(pid, signal.SIGTERM)
_, status = os.waitpid(pid, 0)
after = termios.tcgetattr(fd)
assert after[3] & termios.ICANON and after[3] & termios.ECHO, "given back"
"#;

#[test]
fn files_are_copied_both_ways() {
    let server = Server::start();
    two_machines(&server);
    let id = server.machines("web")[0].clone();
    let of = ["--app", "web", "--machine", &id];
    let sftp = |args: &[&str]| server.ok(&[["ssh", "sftp"].as_slice(), args, &of].concat());
    let sent = server.dir().join("sent");
    much(&sent);
    let said = sftp(&["put", sent.to_str().unwrap(), "/tmp/big"]);
    assert!(said.contains("1 file, 100000000 bytes"), "{said}");
    sftp(&["get", "/tmp/big"]);
    assert_eq!(checksum(&sent), checksum(&server.dir().join("big")));
    server.fails(&[["ssh", "sftp", "get", "/tmp/big"].as_slice(), &of].concat(), 1, &["there already", "--force"]);
    sftp(&["get", "/tmp/big", "--force"]);
    let tree = server.source("tree", &[("a/b/one", "1"), ("two", "2")]);
    sftp(&["put", tree.to_str().unwrap(), "/srv"]);
    assert_eq!(server.ok(&["machine", "exec", &id, "--", "cat", "/srv/tree/a/b/one", "/srv/tree/two"]), "12");
    sftp(&["get", "/srv/tree", "back"]);
    assert_eq!(fs::read_to_string(server.dir().join("back/a/b/one")).unwrap(), "1");
    server.fails(&[["ssh", "sftp", "get", "/no/where"].as_slice(), &of].concat(), 1, &["/no/where: No such file"]);
    // Killed in the middle: the old content stays, and nothing else is there.
    sftp(&["put", tree.join("two").to_str().unwrap(), "/tmp/big"]);
    let mut cut = server.cli(server.dir(), &[["ssh", "sftp", "put", sent.to_str().unwrap(), "/tmp/big"].as_slice(), &of].concat());
    let mut cut = cut.stdout(Stdio::null()).spawn().unwrap();
    server.until("it copies, or has copied", || running(&server, &id).contains("dunlin-files") || cut.try_wait().unwrap().is_some());
    cut.kill().unwrap();
    cut.wait().unwrap();
    server.until("its copier is gone", || !running(&server, &id).contains("dunlin-files"));
    let size = server.ok(&["machine", "exec", &id, "--", "stat", "-c", "%s", "/tmp/big"]);
    assert!(size == "1\n" || size == "100000000\n", "{size}");
    assert_eq!(server.ok(&["machine", "exec", &id, "--", "sh", "-c", "ls -A /tmp | grep -c dunlin || true"]), "0\n");
}

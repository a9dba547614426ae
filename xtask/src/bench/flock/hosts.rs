//! Hosts in network namespaces, linked by a bridge: the processes of `crates/cluster/examples/flock`.

use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::{Namespace, link};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

const PORT: u16 = 7373;
const BRIDGE: &str = "10.78.0.254";
/// The relay's, see there.
const FIRST_RELAY_PORT: usize = 9000;
/// Until all have been told.
const AHEAD: Duration = Duration::from_millis(100);

/// What the hosts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Dunlin,
    Chitchat,
}

#[derive(Clone, Copy)]
pub enum Line {
    Short,
    /// So long each way, in user space.
    Long(Duration),
}

pub struct Hosts {
    hosts: Vec<Host>,
    relay: Option<Child>,
    dir: TempDir,
    kind: Kind,
    line: Line,
    begun: Costs,
    spent: Costs,
    // Last: everything else lives in it.
    bridge: Namespace,
}

struct Host {
    number: usize,
    program: Option<Program>,
    namespace: Namespace,
}

struct Program {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// Of all hosts together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Costs {
    pub cpu: Duration,
    /// Sent by their interfaces.
    pub bytes: u64,
}

impl Costs {
    pub fn since(&self, before: &Self) -> Self {
        Self { cpu: self.cpu.saturating_sub(before.cpu), bytes: self.bytes - before.bytes }
    }
}

impl Hosts {
    pub fn start(kind: Kind, count: usize, line: Line) -> anyhow::Result<Self> {
        let bridge = Namespace::make("line");
        bridge.ip(&["link", "add", "br0", "type", "bridge"]);
        bridge.ip(&["address", "add", &format!("{BRIDGE}/24"), "dev", "br0"]);
        bridge.ip(&["link", "set", "br0", "up"]);
        let hosts = (1..=count).map(|number| Host::plug_in(number, &bridge)).collect();
        let dir = tempfile::tempdir()?;
        let mut all = Self { hosts, relay: None, dir, kind, line, begun: Costs::default(), spent: Costs::default(), bridge };
        let named: Vec<String> = all.hosts.iter().map(|host| format!("{}={}", host.name(), host.advertised(line))).collect();
        sh::run(Command::new(program(Kind::Dunlin)).arg("prepare").arg(all.dir.path()).args(named))?;
        if let Line::Long(delay) = line {
            let mut command = all.bridge.command(program(Kind::Dunlin));
            command.args(["relay", &delay.as_millis().to_string(), BRIDGE]).args(all.hosts.iter().map(Host::address));
            let mut relay = command.stdout(Stdio::piped()).spawn()?;
            let mut ready = String::new();
            BufReader::new(relay.stdout.take().context("it is piped")?).read_line(&mut ready)?;
            all.relay = Some(relay);
        }
        for host in &mut all.hosts {
            host.start(kind, all.dir.path(), line)?;
        }
        all.all(&format!("until {} 0", count - 1))?;
        Ok(all)
    }

    /// The same to each, at once; what they answer.
    pub fn all(&mut self, command: &str) -> anyhow::Result<Vec<String>> {
        for host in &mut self.hosts {
            host.tell(command)?;
        }
        self.hosts.iter_mut().map(Host::answer).collect()
    }

    pub fn first(&mut self, command: &str) -> anyhow::Result<String> {
        self.hosts[0].tell(command)?;
        self.hosts[0].answer()
    }

    pub fn until_all_have(&mut self, facts: usize) -> anyhow::Result<()> {
        self.all(&format!("until {} {facts}", self.hosts.len() - 1)).map(drop)
    }

    pub fn until_all_say(&mut self, what: &str, at_least: u64) -> anyhow::Result<()> {
        self.all(&format!("{what} {at_least}")).map(drop)
    }

    /// All begin it at one time; how long until the last has all facts.
    pub fn together(&mut self, command: &str, facts: usize) -> anyhow::Result<Duration> {
        let begins = now_us() + AHEAD.as_micros() as u64;
        self.all(&format!("at {begins} {command}"))?;
        let done = self.all(&format!("until {} {facts}", self.hosts.len() - 1))?;
        let last = done.iter().map(|at| at.parse::<u64>()).collect::<Result<Vec<_>, _>>()?.into_iter().max().context("there are hosts")?;
        Ok(Duration::from_micros(last.saturating_sub(begins)))
    }

    /// Times in microseconds that were noted since they were last asked for.
    pub fn times(&mut self, command: &str) -> anyhow::Result<Vec<u64>> {
        let answers = self.all(command)?;
        answers.iter().flat_map(|answer| answer.split_whitespace()).map(|time| time.parse().context("a time")).collect()
    }

    /// Ends the last at once, with all it knows but its identity, and starts it again: how long until it has all facts, and the
    /// most memory that it had by then, in MB.
    pub fn wipe_last(&mut self, facts: usize) -> anyhow::Result<(Duration, f64)> {
        let (kind, dir, line, others) = (self.kind, self.dir.path().to_owned(), self.line, self.hosts.len() - 1);
        let host = self.hosts.last_mut().context("there are hosts")?;
        host.kill()?;
        for file in fs::read_dir(dir.join(host.name()))? {
            let path = file?.path();
            if path.file_name().is_some_and(|name| name != "member.json") {
                fs::remove_file(path)?;
            }
        }
        let own = facts / (others + 1);
        let began = Instant::now();
        host.start(kind, &dir, line)?;
        host.tell(&format!("until 1 {}", facts - own))?;
        host.answer()?;
        let back = began.elapsed();
        println!("    {kind:?}: {:.0} MB of memory then", super::super::memory_mb(host.pid(), "VmRSS:")?);
        Ok((back, super::super::memory_mb(host.pid(), "VmHWM:")?))
    }

    pub fn costs(&self) -> anyhow::Result<Costs> {
        let mut costs = Costs::default();
        for host in &self.hosts {
            costs.cpu += cpu(host.pid())?;
            costs.bytes += sent(host.pid())?;
        }
        Ok(costs)
    }

    /// What is spent from here to [`Self::end_costs`] is added up.
    pub fn begin_costs(&mut self) -> anyhow::Result<()> {
        self.begun = self.costs()?;
        Ok(())
    }

    pub fn end_costs(&mut self) -> anyhow::Result<()> {
        let since = self.costs()?.since(&self.begun);
        (self.spent.cpu, self.spent.bytes) = (self.spent.cpu + since.cpu, self.spent.bytes + since.bytes);
        Ok(())
    }

    pub fn spent(&self) -> Costs {
        self.spent
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            let _ = host.kill(); // its namespace ends what is left
        }
        if let Some(relay) = &mut self.relay {
            let _ = relay.kill();
            let _ = relay.wait();
        }
    }
}

impl Host {
    fn plug_in(number: usize, bridge: &Namespace) -> Self {
        let namespace = Namespace::make(&format!("f{number}"));
        let host = Self { number, program: None, namespace };
        let port = format!("to-{number}");
        link(&host.namespace, "eth0", bridge, &port);
        bridge.ip(&["link", "set", &port, "master", "br0"]);
        host.namespace.ip(&["address", "add", &format!("10.78.0.{number}/24"), "dev", "eth0"]);
        host
    }

    fn name(&self) -> String {
        format!("h{}", self.number)
    }

    fn address(&self) -> String {
        address(self.number)
    }

    /// Where the others reach it.
    fn advertised(&self, line: Line) -> String {
        match line {
            Line::Short => self.address(),
            Line::Long(_) => format!("{BRIDGE}:{}", FIRST_RELAY_PORT + self.number - 1),
        }
    }

    fn start(&mut self, kind: Kind, dir: &Path, line: Line) -> anyhow::Result<()> {
        let mut command = self.namespace.command(program(kind));
        match kind {
            Kind::Dunlin => command.arg("member").arg(dir).args([self.name(), self.address(), self.advertised(line)]),
            Kind::Chitchat => command.args([self.name(), self.address(), address(1)]),
        };
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take().context("it is piped")?, child.stdout.take().context("it is piped")?);
        self.program = Some(Program { child, stdin, stdout: BufReader::new(stdout) });
        Ok(())
    }

    fn program(&mut self) -> anyhow::Result<&mut Program> {
        self.program.as_mut().context("the host is not there")
    }

    fn tell(&mut self, command: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.program()?.stdin, "{command}")?)
    }

    fn answer(&mut self) -> anyhow::Result<String> {
        let mut answer = String::new();
        if self.program()?.stdout.read_line(&mut answer)? == 0 {
            bail!("{} has ended; its errors are above", self.name());
        }
        Ok(answer.trim_end().to_owned())
    }

    fn pid(&self) -> u32 {
        self.program.as_ref().map_or(0, |program| program.child.id())
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut program) = self.program.take() {
            program.child.kill()?;
            program.child.wait()?;
        }
        Ok(())
    }
}

fn address(number: usize) -> String {
    format!("10.78.0.{number}:{PORT}")
}

fn program(kind: Kind) -> PathBuf {
    sh::target_dir().join(match kind {
        Kind::Dunlin => "release/examples/flock",
        Kind::Chitchat => "release/dunlin-peer-chitchat",
    })
}

/// Of all threads that live, to the nanosecond.
fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        sum += text.split(' ').next().context("a time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}

/// Bytes that left the namespace, with the headers of Ethernet.
fn sent(pid: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("its interface")?;
    line.split_whitespace().nth(8).context("bytes sent")?.parse().context("a number")
}

fn now_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970").as_micros() as u64
}

//! `cargo xtask demo`: from nothing to an app that answers, with the time of each step.

use crate::{packages, sh};
use anyhow::{Context, bail};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const APP: &str = "flask-hello";
const READY_WITHIN: Duration = Duration::from_secs(30);
const STOPPED_WITHIN: Duration = Duration::from_secs(40);

/// One demo: all of its state lives in one folder.
pub struct Demo {
    home: PathBuf,
}

struct Steps {
    started: Instant,
    step: Instant,
}

impl Steps {
    fn begin(&mut self, what: &str) {
        self.step = Instant::now();
        println!("==> {what}");
    }

    fn end(&self) {
        println!("    {:.1} s", self.step.elapsed().as_secs_f64());
    }
}

impl Demo {
    /// The demo that people start.
    pub fn of_this_checkout() -> Self {
        Self { home: sh::root().join(".dunlin") }
    }

    /// One beside it, for the test of the demo itself.
    pub fn for_tests() -> Self {
        Self { home: sh::target_dir().join("demo-test") }
    }

    pub fn start(&self) -> anyhow::Result<()> {
        let now = Instant::now();
        let mut steps = Steps { started: now, step: now };
        steps.begin("system packages");
        packages::ensure(packages::For::Demo)?;
        steps.end();

        steps.begin("building dunlin");
        sh::run(sh::cargo().args(["build", "--package", "dunlin"]))?;
        let dunlin = self.install_binary()?;
        steps.end();

        let data = self.data();
        fs::create_dir_all(&data)?;
        steps.begin("base image for Python, from Debian packages (cached after the first time)");
        sh::run(Command::new(&dunlin).args(["image", "bootstrap", "python", "--data-dir"]).arg(&data).stdout(Stdio::null()))?;
        steps.end();

        steps.begin("server");
        let ports = self.start_server(&dunlin)?;
        steps.end();

        steps.begin("launching samples/flask-hello from its source");
        let source = self.home.join("app");
        copy_sample(&source)?;
        let launched = Command::new(&dunlin)
            .args(["launch", "--yes", "--name", APP, "--data-dir"])
            .arg(&data)
            .arg(&source)
            .stdout(Stdio::null())
            .status()?;
        if !launched.success() {
            bail!("the sample was not launched; the server's log is {}", self.log_path().display());
        }
        steps.end();

        let url = format!("http://{APP}.localhost:{}/", ports.0);
        let answer = sh::output(Command::new("curl").args(["-sS", "--fail", "--max-time", "20", &url]))?;
        self.print_end(&dunlin, ports, &answer);
        println!("\ndone in {:.1} s", steps.started.elapsed().as_secs_f64());
        Ok(())
    }

    fn print_end(&self, dunlin: &Path, (http, https): (u16, u16), answer: &str) {
        let data = self.data();
        println!("\n{APP} answers: {}", answer.trim());
        println!("\n  http://{APP}.localhost:{http}/");
        println!("  https://{APP}.localhost:{https}/   (trust {} or use curl --cacert)", data.join("ca/ca.pem").display());
        println!("\nLook around:");
        println!("  export DUNLIN_DATA_DIR={}", data.display());
        println!("  export PATH={}:$PATH", dunlin.parent().unwrap_or(Path::new(".")).display());
        println!("  dunlin status --app {APP}");
        println!("  dunlin logs --app {APP} --follow");
        println!("  cd YOUR-APP && dunlin launch");
        println!("\nServer's log: {}", self.log_path().display());
        println!("Stop:         cargo xtask demo --stop");
    }

    pub fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    fn log_path(&self) -> PathBuf {
        self.home.join("server.log")
    }

    /// A copy, so that a later build does not change the binary under the running server.
    fn install_binary(&self) -> anyhow::Result<PathBuf> {
        let bin = self.home.join("bin");
        fs::create_dir_all(&bin)?;
        let (new, dunlin) = (bin.join("dunlin.new"), bin.join("dunlin"));
        fs::copy(sh::target_dir().join("debug/dunlin"), &new).context("the built binary is not where cargo puts it")?;
        fs::rename(&new, &dunlin)?;
        Ok(dunlin)
    }

    /// Starts a server, or finds the one of an earlier demo.
    fn start_server(&self, dunlin: &Path) -> anyhow::Result<(u16, u16)> {
        let ports_file = self.home.join("ports");
        if let Some(pid) = self.running() {
            println!("    already running (process {pid})");
            let text = fs::read_to_string(&ports_file).context("the running demo's ports are not known; stop it first")?;
            let mut ports = text.split_whitespace().filter_map(|port| port.parse().ok());
            return ports.next().zip(ports.next()).context("the running demo's ports are not known; stop it first");
        }
        let ports = (free_port(8080)?, free_port(8443)?);
        fs::write(&ports_file, format!("{} {}", ports.0, ports.1))?;
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut child = Command::new(dunlin)
            .args(["server", "--base-images", "bootstrapped", "--data-dir"])
            .arg(self.data())
            .args(["--http", &format!("127.0.0.1:{}", ports.0), "--https", &format!("127.0.0.1:{}", ports.1), "--cluster", "off"])
            .args(["--machine-prefix", &self.prefix()?])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        let deadline = Instant::now() + READY_WITHIN;
        while !self.ready(dunlin) {
            if let Some(status) = child.try_wait()? {
                bail!("the server ended with {status}; its log is {}", self.log_path().display());
            }
            if Instant::now() > deadline {
                bail!("the server was not ready within 30 s; its log is {}", self.log_path().display());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(ports)
    }

    /// Chosen once: the machines of an earlier start have addresses in it.
    fn prefix(&self) -> anyhow::Result<String> {
        let file = self.home.join("prefix");
        if let Ok(prefix) = fs::read_to_string(&file) {
            return Ok(prefix);
        }
        let prefix = free_prefix()?;
        fs::write(file, &prefix)?;
        Ok(prefix)
    }

    fn ready(&self, dunlin: &Path) -> bool {
        let list = Command::new(dunlin).args(["apps", "list", "--json", "--data-dir"]).arg(self.data()).output();
        list.is_ok_and(|output| output.status.success())
    }

    /// The keeper's process id, if it lives.
    fn running(&self) -> Option<u32> {
        let pid: u32 = fs::read_to_string(self.data().join("dunlin.lock")).ok()?.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&command).contains("dunlin").then_some(pid)
    }

    pub fn stop(&self) -> anyhow::Result<()> {
        if let Some(pid) = self.running() {
            println!("stopping the server (process {pid})");
            sh::run(Command::new("kill").arg(pid.to_string()))?;
            let deadline = Instant::now() + STOPPED_WITHIN;
            while self.running().is_some() {
                if Instant::now() > deadline {
                    bail!("process {pid} did not stop within {} s", STOPPED_WITHIN.as_secs());
                }
                thread::sleep(Duration::from_millis(50));
            }
        }
        let dunlin = self.home.join("bin/dunlin");
        if dunlin.exists() && self.data().exists() {
            sh::run(Command::new(dunlin).args(["cleanup", "--data-dir"]).arg(self.data()))?;
        }
        println!("stopped; {} keeps the images and the app's state (delete it to start afresh)", self.home.display());
        Ok(())
    }
}

fn copy_sample(to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for file in ["app.py", "requirements.txt"] {
        fs::copy(sh::root().join("samples/flask-hello").join(file), to.join(file))?;
    }
    Ok(())
}

fn free_port(first: u16) -> anyhow::Result<u16> {
    let port = (first..first + 100).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let port = port.with_context(|| format!("no free port from {first} to {}", first + 99))?;
    if port != first {
        println!("    port {first} is taken, using {port}");
    }
    Ok(port)
}

/// A block of addresses that no other server of this computer uses: each has routes into its own.
fn free_prefix() -> anyhow::Result<String> {
    let routes = fs::read_to_string("/proc/net/route").context("the kernel's routes cannot be read")?;
    let used: Vec<u32> = routes.lines().skip(1).filter_map(|line| u32::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()).collect();
    let is_free = |second: &u8| {
        // The kernel writes addresses in the order of its bytes.
        !used.iter().any(|route| route.to_le_bytes()[..2] == [10, *second])
    };
    let second = (201..=231).find(is_free).context("no free block of addresses from 10.201.0.0/16 to 10.231.0.0/16")?;
    Ok(format!("10.{second}.0.0/16"))
}

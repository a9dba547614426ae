//! The keeper: a small parent without an async runtime that owns the listening sockets and restarts
//! the server, so that a `kill -9` of the server may break requests in flight but never refuses a
//! connection: while no server runs, connections wait in the sockets' backlog.
//!
//! The server is this binary again, as a hidden personality; it gets the sockets over its standard
//! input, a socket pair whose end also tells it that the keeper is gone, and says there that it is ready. A reload
//! takes up the binary that an upgrade put in the old one's place; one that does not get ready is taken back
//! ([`Program`]). An upgrade of the fleet asks for more: the new binary stays on trial until its server passes control's word on,
//! and is taken back if none comes ([`wire`]). What is said over the socket pair is frozen: a keeper drives the servers of
//! later versions.

pub mod wire;

use crate::program::Program;
use crate::settings::Settings;
use anyhow::{Context, anyhow, bail};
use dunlin_runtime::enclave::{self, Enclave};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, SendAncillaryBuffer, SendAncillaryMessage};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use wire::Said;

/// First argument of the server's personality.
pub const SERVE: &str = "__serve";
/// A server that lived this long was well: its next restart is immediate.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// Of a server that did all that it is there for: the sooner it is back, the shorter is what its death costs.
const LONGEST_AFTER_READY: Duration = Duration::from_secs(1);
/// A predecessor's server may need this long to end after its keeper was killed.
const TAKEOVER: Duration = Duration::from_secs(15);
const BACKLOG: i32 = 4096;
/// How long machines may be without a way out after what carries their connections died.
const LOOK_AT_EGRESS: Duration = Duration::from_secs(5);
/// A server that is to make room for the one before may finish what is under way.
const LEAVES_WITHIN: Duration = Duration::from_secs(20);
/// A new binary's server must be ready by then: machines adopted, edge and control up.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// And must live this long after it.
const PROVEN_AFTER: Duration = Duration::from_secs(10);

/// The sockets, as the server receives them.
pub struct Sockets {
    pub http: TcpListener,
    pub https: TcpListener,
    pub api: UnixListener,
    /// Where members of the cluster meet, in this order: UDP and TCP.
    pub cluster: Option<(UdpSocket, TcpListener)>,
    /// Held as long as the server lives: a new keeper waits for it.
    pub lock: OwnedFd,
    /// End of file means that the keeper is gone.
    pub keeper: UnixStream,
    /// Of an ordinary user's server: the namespaces in which it is root.
    pub enclave: Option<[OwnedFd; 3]>,
}

enum Input {
    Signal(i32),
    /// The server with this process id says something.
    Said(u32, Said),
    Exited(std::io::Result<std::process::ExitStatus>),
}

/// Binds, starts the server, restarts it when it dies; returns when it was asked to stop.
pub fn keep(settings: &Settings, server_args: &[String]) -> anyhow::Result<()> {
    prepare(settings)?;
    raise_descriptor_limit();
    let lock = lock(settings)?;
    let http = bind(settings.http, "http")?;
    let https = bind(settings.https, "https")?;
    let api = bind_api(settings)?;
    let cluster = settings.cluster.map(bind_cluster).transpose()?;
    let enclave = match rustix::process::geteuid().is_root() {
        true if Enclave::find(&settings.run_dir())?.is_some() => bail!(
            "machines of another user's server live in {}; run it as that user, or end them with `dunlin cleanup --data-dir {}`",
            settings.data_dir.display(),
            settings.data_dir.display()
        ),
        true => None,
        false => Some(own_enclave(settings)?),
    };
    let (inputs, input) = mpsc::channel();
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let from_signals = inputs.clone();
    thread::spawn(move || signals.forever().all(|signal| from_signals.send(Input::Signal(signal)).is_ok()));

    let mut program = Program::of_this_process(&settings.data_dir)?;
    let mut backoff = FIRST_BACKOFF;
    let mut args = server_args.to_vec();
    // Of the binary on trial: how long it waits for control's word, if it does.
    let mut word_within = None;
    loop {
        let started = Instant::now();
        let mut sockets = vec![http.as_fd(), https.as_fd(), api.as_fd(), lock.as_fd()];
        if let Some((udp, tcp)) = &cluster {
            sockets.extend([udp.as_fd(), tcp.as_fd()]);
        }
        if let Some(enclave) = &enclave {
            sockets.extend(enclave.descriptors());
        }
        let (child, _link) = match spawn(&program, &args, &sockets, &inputs) {
            Ok(spawned) => spawned,
            Err(error) if program.is_on_trial() => {
                program.go_back(&format!("{error:#}"));
                continue;
            }
            // Giving up would close the sockets; memory or processes may come back.
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the server could not be started; trying again");
                if stopped_meanwhile(&input, LONGEST_BACKOFF) {
                    return Ok(());
                }
                continue;
            }
        };
        let id = child.id();
        watch(child, inputs.clone());
        // A kill point is for one life: the next is the one that a test looks at.
        take_kill_point(&mut args);
        let (status, asked, was_ready) = live(&input, id, &mut program, word_within.take())?;
        match asked {
            Some(Asked::Reload { word_within: within }) => {
                tracing::info!("restarting the server");
                program.take_up();
                word_within = within;
            }
            Some(Asked::GoBack(why)) => program.go_back(&why),
            Some(Asked::Stop) => return Ok(()),
            None if program.is_on_trial() => program.go_back(&format!("its server ended: {status}")),
            None if status.code() == Some(EXIT_DO_NOT_RESTART) => bail!("the server cannot run; its reason is above"),
            None => {
                backoff = if started.elapsed() > HEALTHY_AFTER { FIRST_BACKOFF } else { backoff };
                backoff = if was_ready { backoff.min(LONGEST_AFTER_READY) } else { backoff };
                tracing::error!(%status, backoff_ms = backoff.as_millis() as u64, "the server died; restarting it");
                if stopped_meanwhile(&input, backoff) {
                    return Ok(());
                }
                backoff = (backoff * 2).min(LONGEST_BACKOFF);
            }
        }
    }
}

/// Why the server is to end.
enum Asked {
    Stop,
    Reload { word_within: Option<Duration> },
    GoBack(String),
}

/// Until the server ends: how it did, what it was asked for, and whether it was ever ready.
fn live(
    input: &mpsc::Receiver<Input>,
    id: u32,
    program: &mut Program,
    word_within: Option<Duration>,
) -> anyhow::Result<(std::process::ExitStatus, Option<Asked>, bool)> {
    let pid = rustix::process::Pid::from_raw(id as i32).context("a process has an id")?;
    let tell = |signal| {
        let _ = rustix::process::kill_process(pid, signal); // gone already: its exit is the next input
    };
    let (mut asked, mut was_ready) = (None, false);
    let mut trial = program.is_on_trial().then(|| Trial::new(word_within));
    loop {
        let heard = match &trial {
            Some(trial) => input.recv_timeout(trial.until.saturating_duration_since(Instant::now())),
            None => input.recv().map_err(mpsc::RecvTimeoutError::from),
        };
        match heard {
            Ok(Input::Exited(status)) => return Ok((status?, asked, was_ready)),
            Ok(Input::Said(which, _)) if which != id => {}
            Ok(Input::Said(_, Said::Ready)) => {
                was_ready = true;
                trial.iter_mut().for_each(Trial::ready);
            }
            Ok(Input::Said(_, Said::Keep)) => {
                if trial.take_if(|trial| !matches!(trial.stage, Stage::Leaves)).is_some() {
                    program.prove();
                }
            }
            Ok(Input::Said(_, Said::GoBack(why))) => match &mut trial {
                Some(Trial { stage: Stage::Leaves, .. }) => {}
                Some(trial) => {
                    (trial.stage, trial.until) = (Stage::Leaves, Instant::now() + LEAVES_WITHIN);
                    asked = Some(Asked::GoBack(why));
                    tell(rustix::process::Signal::HUP);
                }
                None => tracing::info!("no binary is on trial: there is nothing to go back from"),
            },
            Ok(Input::Signal(SIGHUP) | Input::Said(_, Said::TakeUp { .. })) if trial.is_some() => {
                tracing::info!("a new binary is on trial; reload again when it is over");
            }
            Ok(Input::Said(_, Said::TakeUp { word_within })) => {
                asked = Some(Asked::Reload { word_within: Some(word_within) });
                tell(rustix::process::Signal::HUP);
            }
            Ok(Input::Signal(signal)) => {
                trial = None;
                let is_reload = signal == SIGHUP;
                asked = Some(if is_reload { Asked::Reload { word_within: None } } else { Asked::Stop });
                tell(if is_reload { rustix::process::Signal::HUP } else { rustix::process::Signal::TERM });
            }
            Err(mpsc::RecvTimeoutError::Timeout) => match trial.take().map(|trial| trial.stage) {
                Some(Stage::Proving) => program.prove(),
                Some(Stage::Waits { within }) => {
                    // What does not pass the word on may not hear a signal either: its way back is the one of a failed start.
                    let why = format!("nobody said within {} s that this host does well with it", within.as_secs());
                    asked = Some(Asked::GoBack(why));
                    tell(rustix::process::Signal::KILL);
                }
                Some(Stage::Leaves) | None => tell(rustix::process::Signal::KILL),
                Some(Stage::Starts) => {
                    tracing::error!("the new binary's server is not ready after {} s", READY_WITHIN.as_secs());
                    tell(rustix::process::Signal::KILL);
                }
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("nothing watches the server any more"),
        }
    }
}

/// Of a new binary.
struct Trial {
    stage: Stage,
    until: Instant,
    word_within: Option<Duration>,
}

enum Stage {
    Starts,
    /// Ready, and to live on.
    Proving,
    /// Ready, and to hear that it may stay.
    Waits { within: Duration },
    /// It was told to end.
    Leaves,
}

impl Trial {
    fn new(word_within: Option<Duration>) -> Self {
        Self { stage: Stage::Starts, until: Instant::now() + READY_WITHIN, word_within }
    }

    fn ready(&mut self) {
        if !matches!(self.stage, Stage::Starts) {
            return;
        }
        let (stage, within) = match self.word_within {
            Some(within) => (Stage::Waits { within }, within),
            None => (Stage::Proving, PROVEN_AFTER),
        };
        (self.stage, self.until) = (stage, Instant::now() + within);
    }
}

/// With this code the server says that a restart would not help.
pub const EXIT_DO_NOT_RESTART: i32 = 78;

fn take_kill_point(args: &mut Vec<String>) {
    if let Some(at) = args.iter().position(|arg| arg == "--kill-at") {
        args.drain(at..(at + 2).min(args.len()));
    }
}

fn stopped_meanwhile(input: &mpsc::Receiver<Input>, backoff: Duration) -> bool {
    matches!(input.recv_timeout(backoff), Ok(Input::Signal(SIGTERM | SIGINT)))
}

fn watch(mut child: Child, inputs: mpsc::Sender<Input>) {
    thread::spawn(move || inputs.send(Input::Exited(child.wait())));
}

fn prepare(settings: &Settings) -> anyhow::Result<()> {
    let run = settings.run_dir();
    fs::create_dir_all(&run).with_context(|| {
        format!("the data directory {} cannot be made; choose another with --data-dir", settings.data_dir.display())
    })?;
    for dir in [&settings.data_dir, &run] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Shells start programs with 1,024 descriptors; an edge needs two for each request. Children inherit it.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files stays at {:?}", limit.current);
    }
}

/// One server a data directory. The server inherits the lock, so the kernel drops it only when keeper
/// and server are both gone, however they end.
fn lock(settings: &Settings) -> anyhow::Result<File> {
    let path = settings.data_dir.join("dunlin.lock");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
    let deadline = Instant::now() + TAKEOVER;
    while rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        let holder = fs::read_to_string(&path).unwrap_or_default();
        let holder_lives = holder.trim().parse::<u32>().is_ok_and(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(true));
        if holder_lives || Instant::now() > deadline {
            bail!(
                "another server (process {}) uses {}; stop it, or choose another --data-dir",
                holder.trim(),
                settings.data_dir.display()
            );
        }
        thread::sleep(Duration::from_millis(50));
    }
    file.set_len(0)?;
    write!(file, "{}", std::process::id())?;
    Ok(file)
}

/// The keeper or server that uses a data directory, if one does.
pub fn holder(data_dir: &Path) -> anyhow::Result<Option<String>> {
    let path = data_dir.join("dunlin.lock");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("{} cannot be read", path.display())),
    };
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(_) => Ok(Some(fs::read_to_string(&path).unwrap_or_default().trim().to_owned())),
    }
}

/// The namespaces in which an ordinary user's server is root, and a way out of their network for as long as this process lives.
fn own_enclave(settings: &Settings) -> anyhow::Result<Arc<Enclave>> {
    let run = settings.run_dir();
    let enclave = Enclave::find_or_make(&run)
        .context("namespaces of its own cannot be made for the server; `dunlin doctor` says more")?;
    let enclave = Arc::new(enclave);
    // A server looks once what it can do, so the way is there first.
    let mut connected = enclave::connect(&enclave, &run);
    let kept = enclave.clone();
    thread::spawn(move || {
        loop {
            match connected {
                Ok(None) => return, // there is no program for it
                Ok(Some(egress)) => {
                    if let Some(mut started) = egress.started {
                        let _ = started.wait();
                        tracing::warn!("what carries connections of machines to the outside has ended; it is started again");
                    }
                }
                Err(error) => {
                    let next = "mend it and start the server again";
                    tracing::warn!(%error, next, "nothing carries connections of machines to the outside");
                    return;
                }
            }
            thread::sleep(LOOK_AT_EGRESS);
            connected = enclave::connect(&kept, &run);
        }
    });
    Ok(enclave)
}

fn bind(addr: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};
    let bound = || -> rustix::io::Result<TcpListener> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        net::bind(&socket, &addr)?;
        net::listen(&socket, BACKLOG)?;
        Ok(TcpListener::from(socket))
    };
    match bound() {
        Ok(listener) => Ok(listener),
        Err(rustix::io::Errno::ADDRINUSE) => {
            let owner = dunlin_runtime::net::ports::port_owner(addr.port())
                .map_or("another process".to_owned(), |owner| format!("{} (process {})", owner.comm, owner.pid));
            bail!(
                "port {} for {what} is already taken by {owner}; stop it, or choose another with --{what} {}:PORT",
                addr.port(),
                addr.ip()
            )
        }
        Err(rustix::io::Errno::ACCESS) => {
            bail!(
                "binding {addr} for {what} needs root; run as root, choose a port above 1023 with --{what}, or allow it to \
                 everybody with sysctl -w net.ipv4.ip_unprivileged_port_start={}", addr.port()
            )
        }
        Err(e) => Err(std::io::Error::from(e)).with_context(|| format!("{what} cannot listen on {addr}")),
    }
}

/// UDP for what members say to each other, TCP for what edges pass on.
fn bind_cluster(addr: SocketAddr) -> anyhow::Result<(UdpSocket, TcpListener)> {
    let alone = "or start this server with `--cluster off` if it is to take no others";
    let tcp = bind(addr, "cluster").context(alone)?;
    let udp = UdpSocket::bind(tcp.local_addr()?).with_context(|| format!("cluster cannot listen on {addr}, UDP; {alone}"))?;
    Ok((udp, tcp))
}

fn bind_api(settings: &Settings) -> anyhow::Result<UnixListener> {
    let path = settings.api_socket();
    match fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context("the old API socket is in the way"),
        _ => {}
    }
    let listener =
        UnixListener::bind(&path).with_context(|| format!("the API cannot listen on {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn spawn(
    program: &Program,
    args: &[String],
    sockets: &[std::os::fd::BorrowedFd<'_>],
    inputs: &mpsc::Sender<Input>,
) -> anyhow::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(sockets));
    rustix::net::sendmsg(&ours, &[IoSlice::new(b"s")], &mut ancillary, rustix::net::SendFlags::empty())?;
    let said = ours.try_clone()?;
    let child = program
        .command()
        .arg(SERVE)
        .args(args)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .context("the server could not be started")?;
    let (id, inputs) = (child.id(), inputs.clone());
    // It ends without a word, or the keeper does.
    thread::spawn(move || wire::hear(&said, |word| inputs.send(Input::Said(id, word)).is_ok()));
    Ok((child, ours))
}

/// The server's side: all that it is there for works.
pub fn say_ready(keeper: &UnixStream) {
    if let Err(error) = wire::say(keeper, &Said::Ready) {
        tracing::warn!(%error, "the keeper could not be told that the server is ready");
    }
}

/// The server's side: takes the sockets off standard input.
pub fn receive_sockets() -> anyhow::Result<Sockets> {
    let keeper = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    rustix::net::recvmsg(
        &keeper,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )
    .context("this personality is started by `dunlin server` only")?;
    let mut sockets = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let mut fds = sockets.next().context("the keeper sent no sockets")?;
    let (Some(http), Some(https), Some(api), Some(lock)) = (fds.next(), fds.next(), fds.next(), fds.next()) else {
        bail!("the keeper sent too few sockets");
    };
    let mut rest: Vec<OwnedFd> = fds.collect();
    // Two of the cluster, three namespaces: their number tells which are there.
    let cluster = match rest.len() {
        2 | 5 => {
            let namespaces = rest.split_off(2);
            let both = std::mem::replace(&mut rest, namespaces);
            let [udp, tcp] = <[OwnedFd; 2]>::try_from(both).map_err(|_| anyhow!("two are two"))?;
            Some((udp.into(), tcp.into()))
        }
        _ => None,
    };
    let enclave = match rest.len() {
        0 => None,
        _ => Some(rest.try_into().map_err(|_| anyhow!("the keeper sent too few namespaces"))?),
    };
    Ok(Sockets { http: http.into(), https: https.into(), api: api.into(), cluster, lock, keeper, enclave })
}

//! Health checks of a container: commands beside its program, inside all of its namespaces and limits.

use crate::exec::Session;
use crate::tls;
use crate::wire::ExecSpec;
use dunlin_model::{Healthcheck, Probe};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Until the first pass, so that who waits for it waits for the program and not for a timer.
const EAGER_PAUSE: Duration = Duration::from_millis(500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// `HTTP/1.1 200`.
const STATUS_BYTES: usize = 12;

pub(crate) struct Health<'a>(Vec<Watched<'a>>);

struct Watched<'a> {
    check: &'a Healthcheck,
    next_at: Instant,
    running: Option<Running>,
    passes: u32,
    failures: u32,
    has_passed: bool,
    /// `None` until enough passes or failures have followed one another.
    is_healthy: Option<bool>,
}

struct Running {
    session: Session,
    until: Instant,
}

impl<'a> Health<'a> {
    pub fn of(checks: &'a [Healthcheck]) -> Self {
        Self(checks.iter().map(|check| Watched::new(check, Instant::now())).collect())
    }

    /// Its program has started, or has ended: nothing is known of it.
    pub fn forget(&mut self) {
        for watched in &mut self.0 {
            if let Some(running) = watched.running.take() {
                running.session.clear();
            }
            *watched = Watched::new(watched.check, Instant::now());
        }
    }

    /// One check that is to be made now, and how.
    pub fn due(&self) -> Option<(usize, ExecSpec)> {
        let now = Instant::now();
        let nth = self.0.iter().position(|watched| watched.running.is_none() && now >= watched.next_at)?;
        let exec = match &self.0[nth].check.probe {
            Probe::Exec { command } => ExecSpec { command: command.clone(), ..ExecSpec::default() },
            probe @ Probe::Http { tls: Some(of), .. } => {
                // Here, where the authorities of the host can be read, and once for all checks: whoever asks has a copy.
                tls::client(of.skip_verify);
                ExecSpec { probe: Some(probe.clone()), ..ExecSpec::default() }
            }
            probe => ExecSpec { probe: Some(probe.clone()), ..ExecSpec::default() },
        };
        Some((nth, exec))
    }

    pub fn has_begun(&mut self, nth: usize, session: Session) {
        let watched = &mut self.0[nth];
        let until = Instant::now() + Duration::from_millis(watched.check.timeout_ms);
        watched.running = Some(Running { session, until });
    }

    /// The check whose command this was.
    pub fn of_process(&self, pid: libc::pid_t) -> Option<usize> {
        self.0.iter().position(|watched| watched.running.as_ref().is_some_and(|running| running.session.pid == pid))
    }

    /// One that takes longer than it may.
    pub fn late(&self) -> Option<usize> {
        let now = Instant::now();
        self.0.iter().position(|watched| watched.running.as_ref().is_some_and(|running| now >= running.until))
    }

    /// Returns what is to be told, if that changes something.
    pub fn result(&mut self, nth: usize, passed: bool, runs_for: Duration) -> Option<String> {
        let watched = &mut self.0[nth];
        if let Some(running) = watched.running.take() {
            running.session.clear();
        }
        watched.take(passed, runs_for)
    }

    /// While the machine stands still no check is made, and none is late.
    pub fn put_off(&mut self, by: Duration) {
        let at = Instant::now() + by;
        for watched in &mut self.0 {
            watched.next_at = watched.next_at.max(at);
            if let Some(running) = &mut watched.running {
                running.until = running.until.max(at);
            }
        }
    }

    pub fn wakes_at(&self) -> Option<Instant> {
        let wakes = |watched: &Watched<'_>| watched.running.as_ref().map_or(watched.next_at, |running| running.until);
        self.0.iter().map(wakes).min()
    }

    /// `None` while not all are known; a container without checks never is.
    pub fn is_healthy(&self) -> Option<bool> {
        if self.0.iter().any(|watched| watched.is_healthy == Some(false)) {
            return Some(false);
        }
        (!self.0.is_empty() && self.0.iter().all(|watched| watched.is_healthy == Some(true))).then_some(true)
    }

    pub fn asks_for_stop(&self) -> bool {
        self.0.iter().any(|watched| watched.check.stop_unhealthy && watched.is_healthy == Some(false))
    }
}

impl<'a> Watched<'a> {
    fn new(check: &'a Healthcheck, now: Instant) -> Self {
        Self { check, next_at: now, running: None, passes: 0, failures: 0, has_passed: false, is_healthy: None }
    }

    fn take(&mut self, passed: bool, runs_for: Duration) -> Option<String> {
        self.has_passed |= passed;
        let interval = Duration::from_millis(self.check.interval_ms).max(SHORTEST_PAUSE);
        self.next_at = Instant::now() + if self.has_passed { interval } else { interval.min(EAGER_PAUSE) };
        let in_grace = !self.has_passed && runs_for < Duration::from_millis(self.check.grace_period_ms);
        if !passed && in_grace {
            return None;
        }
        (self.passes, self.failures) = if passed { (self.passes + 1, 0) } else { (0, self.failures + 1) };
        let before = self.is_healthy;
        if self.passes >= self.check.success_threshold {
            self.is_healthy = Some(true);
        } else if self.failures >= self.check.failure_threshold {
            self.is_healthy = Some(false);
        }
        let name = &self.check.name;
        match (before, self.is_healthy) {
            (before, now) if before == now => None,
            (_, Some(true)) => Some(format!("check {name} passes")),
            _ => Some(format!("check {name} fails")),
        }
    }
}

/// Inside the container: the exit code is the answer. Whoever asked ends it when it takes too long.
pub(crate) fn ask(probe: &Probe, address: Option<Ipv4Addr>) -> i32 {
    let passes = match probe {
        Probe::Tcp { port } => connect(*port, address).map(|_| true),
        Probe::Http { port, method, path, headers, tls } => connect(*port, address).and_then(|stream| {
            let server_name = tls.as_ref().and_then(|tls| tls.server_name.as_deref());
            let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
            if !headers.keys().any(|name| name.eq_ignore_ascii_case("host")) {
                request.push_str(&format!("Host: {}\r\n", server_name.unwrap_or("localhost")));
            }
            headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
            match tls {
                None => answers(stream, &request),
                Some(tls) => answers(encrypted(stream, server_name, tls::client(tls.skip_verify))?, &request),
            }
        }),
        Probe::Exec { .. } => Ok(false), // a command of its own
    };
    i32::from(!passes.unwrap_or(false))
}

fn answers(mut stream: impl Read + Write, request: &str) -> io::Result<bool> {
    stream.write_all(format!("{request}\r\n").as_bytes())?;
    let mut status = [0; STATUS_BYTES];
    stream.read_exact(&mut status)?;
    Ok(is_success(&status))
}

/// The handshake comes with the first byte.
fn encrypted(
    stream: TcpStream,
    server_name: Option<&str>,
    config: Arc<ClientConfig>,
) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let name = tls::server_name(server_name, stream.peer_addr()?.ip()).map_err(io::Error::other)?;
    Ok(StreamOwned::new(ClientConnection::new(config, name).map_err(io::Error::other)?, stream))
}

fn is_success(status: &[u8; STATUS_BYTES]) -> bool {
    status.starts_with(b"HTTP/1.") && status[8] == b' ' && status[9] == b'2'
}

/// Wherever in the machine it listens.
fn connect(port: u16, address: Option<Ipv4Addr>) -> io::Result<TcpStream> {
    let local = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut last = Err(io::ErrorKind::NotFound.into());
    for address in local.into_iter().chain(address.map(IpAddr::V4)) {
        last = TcpStream::connect((address, port));
        if last.is_ok() {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(success_threshold: u32, failure_threshold: u32, grace_period_ms: u64) -> Healthcheck {
        Healthcheck {
            name: "up".into(),
            probe: Probe::Tcp { port: 80 },
            interval_ms: 1000,
            timeout_ms: 1000,
            grace_period_ms,
            success_threshold,
            failure_threshold,
            stop_unhealthy: true,
        }
    }

    #[test]
    fn health_takes_as_many_results_in_a_row_as_it_says() {
        let checks = [check(2, 3, 0)];
        let mut health = Health::of(&checks);
        let mut take = |passed| {
            health.result(0, passed, Duration::from_secs(9));
            (health.is_healthy(), health.asks_for_stop())
        };
        assert_eq!(take(true), (None, false));
        assert_eq!(take(true), (Some(true), false));
        assert_eq!(take(false), (Some(true), false));
        assert_eq!(take(false), (Some(true), false));
        assert_eq!(take(true), (Some(true), false));
        let last = [take(false), take(false), take(false)];
        assert_eq!(last, [(Some(true), false), (Some(true), false), (Some(false), true)]);
    }

    #[test]
    fn failures_soon_after_a_start_do_not_count() {
        let checks = [check(1, 1, 5000)];
        let mut health = Health::of(&checks);
        assert_eq!(health.result(0, false, Duration::from_secs(4)), None);
        assert_eq!(health.is_healthy(), None);
        assert_eq!(health.result(0, false, Duration::from_secs(6)).as_deref(), Some("check up fails"));
        health.forget();
        assert_eq!(health.is_healthy(), None);
        assert_eq!(health.result(0, true, Duration::ZERO).as_deref(), Some("check up passes"));
        assert_eq!(health.result(0, false, Duration::from_secs(4)).as_deref(), Some("check up fails"), "it was up before");
        assert_eq!(Health::of(&[]).is_healthy(), None);
    }

    /// The name in the certificate counts, and the authority.
    #[test]
    fn a_certificate_is_compared_with_the_name() {
        use rcgen::{CertificateParams, KeyPair};
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["web.internal".into()]).unwrap().self_signed(&key).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let known = Arc::new(tls::verified(roots));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
        let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key.into()).unwrap();
        let config = Arc::new(config);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                let mut stream = StreamOwned::new(connection, stream.unwrap());
                if stream.read(&mut [0; 4096]).is_ok() {
                    let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").and_then(|()| stream.flush());
                }
            }
        });
        for (config, name, expected) in [
            (known.clone(), Some("web.internal"), true),
            (known.clone(), Some("other.internal"), false),
            (known, None, false),
            (Arc::new(tls::verified(rustls::RootCertStore::empty())), Some("web.internal"), false),
            (Arc::new(tls::any()), Some("other.internal"), true),
            (Arc::new(tls::any()), None, true),
        ] {
            let stream = TcpStream::connect(address).unwrap();
            let passes = encrypted(stream, name, config).and_then(|stream| answers(stream, "GET / HTTP/1.1\r\n"));
            assert_eq!(passes.unwrap_or(false), expected, "{name:?}");
        }
    }

    #[test]
    fn only_answers_of_2xx_pass() {
        for (status, expected) in [("HTTP/1.1 200", true), ("HTTP/1.0 204", true), ("HTTP/1.1 302", false), ("SSH-2.0-xx 2", false)] {
            assert_eq!(is_success(status.as_bytes().try_into().unwrap()), expected, "{status}");
        }
    }
}

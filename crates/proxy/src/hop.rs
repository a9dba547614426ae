//! From an edge to the last hop on a machine's host, where that is another host.
//!
//! HTTP/1.1 over mutual TLS. The edge has made the head that the machine gets; in front of its end it puts one line, which
//! no client can send and no machine sees:
//!
//! ```text
//! dunlin-hop: v1 <machine> <version> <placement> <port> <wait ms> <what>
//! ```
//! `what` is `go`, `hold` (the body waits for `100 Continue`, which says that the machine has taken the head), each with
//! `,once` where the machine's connections count, or `wake`; `,or-another`: the edge has not heard of that host for a while, so if
//! the machine is not as it believes, the host's own edge chooses one. What the last hop answers itself has `dunlin-hop-refused`
//! (nothing reached the machine) or `dunlin-hop-failed` (something may have), and it takes such fields from machines' answers.
//!
//! Times are durations, as the clocks of two hosts differ. Either side ends an idle connection with TLS's farewell and only
//! then: whoever reads that instead of an answer knows that its request was not looked at.

use dunlin_api::{AdmitRefusal, AdmitRequest};
use dunlin_model::{Generation, HostId};
use httparse::Header;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const FIELD: &str = "dunlin-hop";
const REFUSED: &str = "dunlin-hop-refused";
const FAILED: &str = "dunlin-hop-failed";
const OR_ANOTHER: &str = ",or-another";
/// For people.
const WHY: &str = "dunlin-hop-why";
const MAX_WHY: usize = 512;
/// Nobody waits longer, whatever is asked for.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// Where a host listens for others.
pub type AddressOf = Box<dyn Fn(&HostId) -> Option<SocketAddr> + Send + Sync>;
/// Whose certificate it is; `None` = of nobody who may ask (any more).
pub type PeerHost = Box<dyn Fn(&[CertificateDer<'_>]) -> Option<HostId> + Send + Sync>;

/// This edge among others: how it reaches their hosts, and how they reach its own.
pub struct Fleet {
    pub host: HostId,
    /// Bound and listening; as many as threads, with SO_REUSEPORT, are best.
    pub listeners: Vec<TcpListener>,
    /// Asked for each connection, so that a renewed certificate is used at once. It must demand a member's certificate.
    pub tls_server: Box<dyn Fn() -> Arc<ServerConfig> + Send + Sync>,
    pub tls_client: Box<dyn Fn() -> Arc<ClientConfig> + Send + Sync>,
    pub address: AddressOf,
    /// The name that a host's certificate has.
    pub server_name: fn(&HostId) -> ServerName<'static>,
    /// Asked for each request, so that a removed host is cut off at once.
    pub peer_host: PeerHost,
}

/// What an edge asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ask {
    pub admit: AdmitRequest,
    pub wait: Duration,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Forward {
        /// The body comes when it is asked for.
        holds: bool,
        /// The connection to the machine is for this request alone.
        once: bool,
        /// Whoever is asked knows better than who asks: if this machine is not what it was, the request goes to another.
        or_another: bool,
    },
    Wake,
}

impl Ask {
    pub fn value(&self) -> String {
        let AdmitRequest { machine, version, placement, internal_port } = &self.admit;
        let what = match self.what {
            What::Forward { holds: false, once: false, .. } => "go",
            What::Forward { holds: true, once: false, .. } => "hold",
            What::Forward { holds: false, once: true, .. } => "go,once",
            What::Forward { holds: true, once: true, .. } => "hold,once",
            What::Wake => "wake",
        };
        let another = if matches!(self.what, What::Forward { or_another: true, .. }) { OR_ANOTHER } else { "" };
        format!("v1 {machine} {version} {placement} {internal_port} {} {what}{another}", self.wait.as_millis())
    }

    pub fn read(value: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(value).ok()?.split(' ');
        let mut word = || words.next();
        if word()? != "v1" {
            return None;
        }
        let (machine, version) = (word()?.parse().ok()?, word()?.parse().ok()?);
        let (incarnation, revision) = word()?.split_once('.')?;
        let placement = Generation { incarnation: incarnation.parse().ok()?, revision: revision.parse().ok()? };
        let internal_port = word()?.parse().ok()?;
        let wait = Duration::from_millis(word()?.parse().ok()?).min(MAX_WAIT);
        let what = word()?;
        let (what, or_another) = what.strip_suffix(OR_ANOTHER).map_or((what, false), |what| (what, true));
        let what = match what {
            "go" => What::Forward { holds: false, once: false, or_another },
            "hold" => What::Forward { holds: true, once: false, or_another },
            "go,once" => What::Forward { holds: false, once: true, or_another },
            "hold,once" => What::Forward { holds: true, once: true, or_another },
            "wake" if !or_another => What::Wake,
            _ => return None,
        };
        let admit = AdmitRequest { machine, version, placement, internal_port };
        words.next().is_none().then_some(Self { admit, wait, what })
    }
}

/// Why a last hop answers instead of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Denial {
    Refused(AdmitRefusal),
    /// The machine took no connection: not a byte reached it.
    Unreached(String),
    /// It broke off before it answered; `kept` = over a connection that had carried a request before.
    Broken { why: String, kept: bool },
    TooSlow,
}

impl Denial {
    /// What was asked for in a way that this last hop does not know.
    pub fn not_understood() -> Self {
        Self::Unreached("its host does not understand what this edge asks: one of them is to be upgraded".into())
    }

    pub fn status(&self) -> u16 {
        match self {
            Self::Refused(_) | Self::Unreached(_) => 421,
            Self::Broken { .. } => 502,
            Self::TooSlow => 504,
        }
    }

    /// As fields of an answer.
    pub fn fields(&self) -> [(&'static str, String); 2] {
        let (name, code, why) = match self {
            Self::Refused(refusal) => {
                let (code, why) = refusal_code(refusal);
                (REFUSED, code, why)
            }
            Self::Unreached(why) => (REFUSED, "unreached", why.as_str()),
            Self::Broken { why, kept: false } => (FAILED, "broken", why.as_str()),
            Self::Broken { why, kept: true } => (FAILED, "broken-kept", why.as_str()),
            Self::TooSlow => (FAILED, "too-slow", ""),
        };
        [(name, code.into()), (WHY, one_line(why))]
    }

    /// `None`: the machine answered.
    pub fn read(fields: &[Header<'_>]) -> Option<Self> {
        let value = |name: &str| {
            let field = fields.iter().find(|field| field.name.eq_ignore_ascii_case(name))?;
            Some(String::from_utf8_lossy(field.value).into_owned())
        };
        let why = || value(WHY).unwrap_or_default();
        if let Some(code) = value(REFUSED) {
            return Some(match refusal(&code, why) {
                Some(refusal) => Self::Refused(refusal),
                None if code == "unreached" => Self::Unreached(why()),
                None => Self::Unreached(format!("its host refused for a reason that this edge does not know: {}", one_line(&code))),
            });
        }
        let code = value(FAILED)?;
        Some(match &*code {
            "too-slow" => Self::TooSlow,
            _ => Self::Broken { why: why(), kept: code == "broken-kept" },
        })
    }
}

fn refusal_code(refusal: &AdmitRefusal) -> (&'static str, &str) {
    match refusal {
        AdmitRefusal::NotHere => ("not-here", ""),
        AdmitRefusal::OtherVersion => ("other-version", ""),
        AdmitRefusal::Asleep => ("asleep", ""),
        AdmitRefusal::NotRunning => ("not-running", ""),
        AdmitRefusal::Draining => ("draining", ""),
        AdmitRefusal::Cordoned => ("cordoned", ""),
        AdmitRefusal::AtLimit => ("at-limit", ""),
        AdmitRefusal::DidNotWake(why) => ("did-not-wake", why),
        AdmitRefusal::InsufficientCapacity(why) => ("no-capacity", why),
    }
}

fn refusal(code: &str, why: impl FnOnce() -> String) -> Option<AdmitRefusal> {
    Some(match code {
        "not-here" => AdmitRefusal::NotHere,
        "other-version" => AdmitRefusal::OtherVersion,
        "asleep" => AdmitRefusal::Asleep,
        "not-running" => AdmitRefusal::NotRunning,
        "draining" => AdmitRefusal::Draining,
        "cordoned" => AdmitRefusal::Cordoned,
        "at-limit" => AdmitRefusal::AtLimit,
        "did-not-wake" => AdmitRefusal::DidNotWake(why()),
        "no-capacity" => AdmitRefusal::InsufficientCapacity(why()),
        _ => return None,
    })
}

/// A text as a field can have it.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_WHY));
    for c in text.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if line.len() + c.len_utf8() > MAX_WHY {
            break;
        }
        line.push(c);
    }
    line.trim().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_model::{MachineId, MachineVersion};

    fn ask(what: What) -> Ask {
        let admit = AdmitRequest {
            machine: MachineId::from_random([7; 7]),
            version: MachineVersion::new(1, [1; 10]),
            placement: Generation { incarnation: 2, revision: 345 },
            internal_port: 8080,
        };
        Ask { admit, wait: Duration::from_millis(1_500), what }
    }

    #[test]
    fn what_is_asked_arrives() {
        let mut all = vec![ask(What::Wake)];
        for bits in 0..8 {
            all.push(ask(What::Forward { holds: bits & 1 != 0, once: bits & 2 != 0, or_another: bits & 4 != 0 }));
        }
        for ask in all {
            assert_eq!(Ask::read(ask.value().as_bytes()), Some(ask));
        }
    }

    #[test]
    fn what_is_not_clear_is_not_understood() {
        let good = ask(What::Wake).value();
        for bad in [
            String::new(),
            good.replace("v1", "v2"),
            good.replace("wake", "sing"),
            format!("{good}{OR_ANOTHER}"),
            good.replace("8080", "80800"),
            good.replace("2.345", "2"),
            format!("{good} more"),
            good.replace(' ', "  "),
            good.replace("0707", "07"),
        ] {
            assert_eq!(Ask::read(bad.as_bytes()), None, "{bad}");
        }
        let patient = good.replace("1500", "99999999999");
        assert_eq!(Ask::read(patient.as_bytes()).unwrap().wait, MAX_WAIT);
    }

    #[test]
    fn a_denial_arrives_as_it_was_meant() {
        for denial in [
            Denial::Refused(AdmitRefusal::NotHere),
            Denial::Refused(AdmitRefusal::OtherVersion),
            Denial::Refused(AdmitRefusal::Asleep),
            Denial::Refused(AdmitRefusal::NotRunning),
            Denial::Refused(AdmitRefusal::Draining),
            Denial::Refused(AdmitRefusal::Cordoned),
            Denial::Refused(AdmitRefusal::AtLimit),
            Denial::Refused(AdmitRefusal::DidNotWake("its image is gone".into())),
            Denial::Refused(AdmitRefusal::InsufficientCapacity("no memory".into())),
            Denial::Unreached("connection refused".into()),
            Denial::Broken { why: "reset".into(), kept: false },
            Denial::Broken { why: "reset".into(), kept: true },
            Denial::TooSlow,
        ] {
            let said = denial.fields();
            let fields: Vec<_> = said.iter().map(|(name, value)| Header { name, value: value.as_bytes() }).collect();
            assert_eq!(Denial::read(&fields), Some(denial));
        }
        assert_eq!(Denial::read(&[Header { name: "x", value: b"y" }]), None);
    }

    #[test]
    fn no_text_can_add_a_line() {
        let [_, (_, why)] = Denial::Unreached(format!("a\r\nb: c\0{}", "ä".repeat(MAX_WHY))).fields();
        assert!(why.starts_with("a  b: c ä") && why.len() <= MAX_WHY && !why.contains(['\r', '\n', '\0']), "{why}");
    }
}
